import argparse

import pytest

from patch_based_ddpm import benchmark, command_line, evaluate, memory, sample, train
from patch_based_ddpm.checkpoint import __main__ as export
from patch_based_ddpm.errors import InputError
from support.commands import write_config


def test_both_spellings_of_a_flag_and_values_untouched():
    parser = command_line.Parser()
    parser.add_argument("--out-dir")
    for words in (["--out-dir", "a_b"], ["--out_dir", "a_b"], ["--out_dir=a_b"]):
        assert parser.parse_args(words).out_dir == "a_b"


def test_input_errors_are_printed_and_bugs_are_not_hidden(capsys):
    def refuse():
        raise InputError("FILE: the field is 3; it must be 4.")

    def bug():
        raise ValueError("internal")

    with pytest.raises(SystemExit) as ended:
        command_line.run(refuse)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: FILE: the field is 3; it must be 4.\n"
    with pytest.raises(ValueError, match="internal"):
        command_line.run(bug)


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * 2**30), ("1.5 MB", 1_500_000), ("1000", 1000), ("2kib", 2048), ("7B", 7)]
)
def test_byte_counts(text, size):
    assert command_line.byte_count(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "6 apples", "1.2.3MB", "-5GiB", "\u0666GiB"])
def test_what_is_no_byte_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be an amount of memory, for example 6GiB or 500MB"):
        command_line.byte_count(text)


HUGE = "9" * 400
BAD_COMMANDS = [
    (train, [], "the following arguments are required: --config"),
    (train, ["--config", "missing.json"], "missing.json: cannot be read: No such file or directory."),
    (train, ["--config", "."], ".: cannot be read: Is a directory."),
    (train, ["--config", "empty.json"], "empty.json: is empty"),
    (train, ["--config", "good.json", "--restart-step", "-1"], "'-1' must be a whole number of at least 0"),
    (train, ["--config", "good.json", "--restart-step", "7"], "model-7.pt: there is no such file"),
    (train, ["--config", "good.json", "--resume", "."], ".: is a folder, not a checkpoint file"),
    (train, ["--config", "good.json", "--resume", "latest", "--restart-step", "1"], "not allowed with argument"),
    (train, ["--config", "good.json", "--max-memory", "-1GiB"], "expected one argument"),
    (train, ["--config", "good.json", "--max-memory", "1XiB"], "'1XiB' must be an amount of memory"),
    (train, ["--config", "good.json", "--conf", "x"], "unrecognized arguments: --conf x"),
    (train, ["--config", "good.json", "--max-memory", f"{HUGE}GiB"], "must be less than 9223372036854775808 bytes"),
    (train, ["--config", "good.json", "--restart-step", HUGE], "must be less than 4294967296"),
    (memory, ["--config", "missing.json"], "missing.json: cannot be read"),
    (memory, ["--config", "good.json", "--batch-size", HUGE], "must be less than 4294967296"),
    (memory, ["--config", "good.json", "--batch-size", "0"], "'0' must be a whole number of at least 1"),
    (memory, ["--config", "good.json", "--patch-batch-size", "1.5"], "'1.5' must be a whole number of at least 1"),
    (memory, ["--config", "good.json", "--mixed-precision", "fp8"], "invalid choice: 'fp8'"),
    (memory, ["--config", "good.json", "--dtype", "int8"], "invalid choice: 'int8'"),
    (memory, ["--config", "."], ".: cannot be read: Is a directory."),
    (sample, ["--out-dir", "out"], "the following arguments are required: --ckpt"),
    (sample, ["--ckpt", "good.json"], "the following arguments are required: --out-dir"),
    (sample, ["--ckpt", "good.json", "--out-dir", "good.json/below"], "cannot be used: '"),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--config", "."], ".: cannot be read: Is a directory."),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--config", "empty.json"], "empty.json: is empty"),
    (
        sample,
        ["--ckpt", "good.json", "--out-dir", "out", "--config", "good.json", "--steps", "1001"],
        "steps is 1001; it must lie in [1, 1000]",
    ),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--n-samples", "0"], "'0' must be a whole number of at least"),
    (
        sample,
        ["--ckpt", "good.json", "--out-dir", "out", "--seeds", "5-2"],
        "'5-2' in '5-2' must be a seed, or a range",
    ),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--seeds", "1,,2"], "'' in '1,,2' must be a seed, or a range"),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--batch-size", HUGE], "must be less than 4294967296"),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--patch-batch-size", "-3"], "'-3' must be a whole number"),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--weights", "last"], "invalid choice: 'last'"),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--dtype", "half"], "invalid choice: 'half'"),
    (sample, ["--ckpt", ".", "--out-dir", "out"], ".: is a folder, not a checkpoint file"),
    (sample, ["--ckpt", "missing.pt", "--out-dir", "out"], "missing.pt: there is no such file"),
    (
        sample,
        ["--ckpt", "good.json", "--out-dir", "good.json"],
        "--out-dir 'good.json' cannot be used: 'good.json' is a file",
    ),
    (sample, ["--ckpt", "good.json", "--out-dir", "out"], "good.json: is damaged or not a checkpoint"),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--order", "4"], "invalid choice: 4"),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--eta", "nan"], "eta is nan, but ddpm always draws"),
    (sample, ["--ckpt", "good.json", "--out-dir", "out", "--trajectory", "a.png"], "'a.png' must end in .webp or .gif"),
    (benchmark, ["--repeats", "0"], "'0' must be a whole number of at least 1"),
    (benchmark, ["--dtypes", "float8"], "float8"),
    (benchmark, ["--patch-dividers", "1,x"], "'x' must be a whole number of at least 1"),
    (benchmark, ["--config", "no-data.json"], "there is no folder 'nowhere'"),
    (benchmark, ["--config", "good.json", "--dim", "8"], "do not go with --config"),
    (benchmark, ["--config", "."], ".: cannot be read: Is a directory."),
    (benchmark, ["--patch-batch-sizes", "1,some"], "'some' must be a whole number of at least 1, or all"),
    (benchmark, ["--dim", "7"], "model.dim is 7; it must be even"),
    (benchmark, ["--out-dir", "good.json"], "--out-dir 'good.json' cannot be used: File exists"),
    (export, [], "the following arguments are required: action, --ckpt, --out"),
    (export, ["import", "--ckpt", "good.json", "--out", "out"], "invalid choice: 'import'"),
    (export, ["export", "--ckpt", "missing.pt", "--out", "out"], "missing.pt: there is no such file"),
    (export, ["export", "--ckpt", ".", "--out", "out"], ".: is a folder, not a checkpoint file"),
    (export, ["export", "--ckpt", "good.json", "--out", "out"], "good.json: is damaged or not a checkpoint"),
    (export, ["export", "--ckpt", "good.json", "--out", "out", "--config", "."], ".: cannot be read: Is a directory."),
    (export, ["export", "--ckpt", "good.json", "--out", "."], "--out '.' is a folder; it must be a file"),
    (export, ["export", "--ckpt", "good.json", "--out", "no/out"], "there is no folder 'no'"),
    (export, ["export", "--ckpt", "good.json", "--out", "out", "--dtype", "int8"], "invalid choice: 'int8'"),
    (export, ["export", "--ckpt", "good.json", "--out", "out", "--weights", "x"], "invalid choice: 'x'"),
    (evaluate, ["--data", "missing", "--config", "good.json"], "there is no folder 'missing'"),
]


@pytest.mark.parametrize(("command", "flags", "words"), BAD_COMMANDS, ids=lambda value: str(value)[-40:])
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, capsys, command, flags, words):
    write_config(tmp_path).rename(tmp_path / "good.json")
    (tmp_path / "empty.json").touch()
    write_config(tmp_path, train_dataset_dir="nowhere").rename(tmp_path / "no-data.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: command.main(flags))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1, message
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"good.json", "empty.json", "no-data.json"}
