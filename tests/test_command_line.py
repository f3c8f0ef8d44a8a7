import argparse

import pytest

from patch_based_ddpm import command_line
from patch_based_ddpm.errors import InputError


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
