import pytest

from patch_based_ddpm import Config, memory
from patch_based_ddpm.planning import planner
from patch_based_ddpm.planning.live_memory import MIB, Peak
from support.commands import write_config


def table(capsys):
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == " ".join(memory.HEADER).split()
    return title, [row.split() for row in rows]


@pytest.mark.slow
def test_the_table_holds_what_the_planner_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "DIVIDERS", (1, 2))
    path = write_config(tmp_path, mixed_precision="bf16")
    memory.main(["--config", str(path), "--patch-batch-size", "3"])
    title, rows = table(capsys)
    assert title == "MiB of tensors, 2 image(s) at a time; training in precision bf16, sampling in float32"
    assert [row[:4] for row in rows] == [[str(n), str(min(3, 2 * n * n)), "of", str(2 * n * n)] for n in (1, 2)]
    config = Config.load(path)  # N = 2
    training = planner.training_peak(config, batch_size=2, patch_batch_size=3, precision="bf16")
    sampling = planner.sampling_peak(config, batch_size=2, patch_batch_size=3)
    wanted = (training.activations, training.total, sampling.activations, sampling.total)
    assert rows[1][4:] == [f"{figure / MIB:,.1f}" for figure in wanted]


@pytest.fixture
def unplanned(monkeypatch):
    """Predictions take no time: all are zero."""
    for name in ("training_peak", "sampling_peak"):
        monkeypatch.setattr(planner, name, lambda config, **options: Peak(0, 0, 0, 0, 0, 0))


def test_every_divider_that_the_image_allows_is_planned(unplanned, tmp_path, capsys):
    memory.main(["--config", str(write_config(tmp_path)), "--batch-size", "3", "--patch-batch-size", "2"])
    assert [row[:4] for row in table(capsys)[1]] == [[str(n), "2", "of", str(3 * n * n)] for n in (1, 2, 4, 8)]


def test_one_patch_and_all_if_the_config_names_no_patch_batch(unplanned, tmp_path, capsys):
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


def test_a_halo_goes_with_every_divider_but_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "DIVIDERS", (1, 2))
    path = write_config(tmp_path, model={"halo": 1})
    memory.main(["--config", str(path), "--batch-size", "1", "--patch-batch-size", "1"])
    _, rows = table(capsys)
    assert [row[0] for row in rows] == ["1", "2"]
    config = Config.load(path)  # N = 2
    assert rows[1][6] == f"{planner.sampling_peak(config, batch_size=1, patch_batch_size=1).activations / MIB:,.1f}"
    whole, halved = config.model.divided(1), config.model.divided(4)
    assert (whole.patch_divider, whole.halo) == (1, 0)
    assert (halved.patch_divider, halved.halo) == (4, 1)


@pytest.mark.slow
def test_each_precision_changes_its_own_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "DIVIDERS", (2,))
    path = write_config(tmp_path, model={"dim": 32})
    rows = []
    for flags in ([], ["--mixed-precision", "bf16"], ["--dtype", "bf16"]):
        memory.main(["--config", str(path), "--patch-batch-size", "8", *flags])
        ((_, _, _, _, *figures),) = table(capsys)[1]
        rows.append([float(figure) for figure in figures])
    usual, mixed, halved = rows
    assert mixed[0] < usual[0]
    assert mixed[2:] == usual[2:]
    assert halved[:2] == usual[:2]
    assert (halved[2] < usual[2], halved[3] < usual[3]) == (True, True)
