import json
from pathlib import Path

import pytest

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_steps_are_numbers_and_not_names(folder):
    for name in ("model-900.pt", "model-1000.pt", "model-last.pt", "model-2000.pt.unfinished", "model-x.pt"):
        (folder.checkpoints / name).touch()
    assert folder.steps() == [900, 1000]
    folder.last_checkpoint.unlink()
    assert folder.find("latest") == folder.checkpoint(1000)


def test_latest_is_the_one_saved_last(folder):
    """A run that was taken back to step 3 and saved step 50 goes on from there, not from the abandoned step 100."""
    for step in (100, 50):
        folder.checkpoint(step).write_text(str(step))
        folder.point_last_at(folder.checkpoint(step))
    assert folder.find("latest").read_text() == "50"


def test_find_without_checkpoints(folder):
    assert folder.find("latest") is None
    assert folder.find("elsewhere/model.pt") == Path("elsewhere/model.pt")


def test_last_points_at_the_newest(folder):
    for step in (1, 2):
        folder.checkpoint(step).write_text(f"step {step}")
        folder.point_last_at(folder.checkpoint(step))
    assert folder.last_checkpoint.read_text() == "step 2"
    assert folder.checkpoint(1).read_text() == "step 1"


def test_last_is_a_copy_where_there_are_no_links(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refuse)
    folder.checkpoint(1).write_text("step 1")
    folder.point_last_at(folder.checkpoint(1))
    assert folder.last_checkpoint.read_text() == "step 1"


def test_metrics_after_the_resumed_step_are_forgotten(folder):
    for step in (10, 20, 30):
        folder.append_metrics({"step": step})
    with open(folder.metrics, "a") as file:
        file.write('{"step": 4')  # cut off by a kill
    folder.forget_metrics_after(20)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == [{"step": 10}, {"step": 20}]


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match=r"trainer\.log_dir .*run' cannot be used"):
        RunFolder(tmp_path / "run").create()
