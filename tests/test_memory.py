import pytest

from patch_based_ddpm import Config, memory
from patch_based_ddpm.planning import planner
from patch_based_ddpm.planning.live_memory import MIB
from support.commands import write_config


def table(capsys):
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == " ".join(memory.HEADER).split()
    return title, [row.split() for row in rows]


def test_the_table_holds_what_the_planner_says(tmp_path, capsys):
    path = write_config(tmp_path, mixed_precision="bf16")
    memory.main(["--config", str(path), "--patch-batch-size", "3"])
    title, rows = table(capsys)
    assert title == "MiB of tensors, 2 image(s) at a time; training in precision bf16, sampling in float32"
    assert [row[:4] for row in rows] == [[str(n), str(min(3, 2 * n * n)), "of", str(2 * n * n)] for n in (1, 2, 4, 8)]
    config = Config.load(path)  # N = 2
    training = planner.training_peak(config, batch_size=2, patch_batch_size=3, precision="bf16")
    sampling = planner.sampling_peak(config, batch_size=2, patch_batch_size=3)
    wanted = (training.activations, training.total, sampling.activations, sampling.total)
    assert rows[1][4:] == [f"{figure / MIB:,.1f}" for figure in wanted]


def test_one_patch_and_all_where_the_config_is_silent_and_no_divider_that_does_not_fit(tmp_path, capsys):
    path = write_config(tmp_path, model={"image_size": 12, "patch_divider": 3})
    memory.main(["--config", str(path), "--batch-size", "1"])
    _, rows = table(capsys)
    assert [row[:4] for row in rows] == [
        ["1", "1", "of", "1"],
        ["2", "1", "of", "4"],
        ["2", "4", "of", "4"],
        ["3", "1", "of", "9"],
        ["3", "9", "of", "9"],
    ]


def test_a_halo_goes_with_every_divider_but_one(tmp_path, capsys):
    path = write_config(tmp_path, model={"halo": 1})
    memory.main(["--config", str(path), "--batch-size", "1", "--patch-batch-size", "1"])
    _, rows = table(capsys)
    assert [row[0] for row in rows] == ["1", "2", "4", "8"]
    config = Config.load(path)  # N = 2
    assert rows[1][6] == f"{planner.sampling_peak(config, batch_size=1, patch_batch_size=1).activations / MIB:,.1f}"
    whole, halved = config.model.divided(1), config.model.divided(4)
    assert (whole.patch_divider, whole.halo) == (1, 0)
    assert (halved.patch_divider, halved.halo) == (4, 1)


@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--mixed-precision", "bf16"]])
def test_precision_changes_what_it_should(tmp_path, capsys, flags):
    path = write_config(tmp_path, model={"dim": 32})
    both = []
    for more in ([], flags):
        memory.main(["--config", str(path), "--patch-batch-size", "8", *more])
        both.append([[float(cell) for cell in row[4:]] for row in table(capsys)[1]])
    column = {"--dtype": 2, "--mixed-precision": 0}[flags[0]]
    for usual, changed in zip(*both, strict=True):
        assert changed[column] <= usual[column]
        assert changed[2 - column] == usual[2 - column]
    assert both[1] != both[0]
