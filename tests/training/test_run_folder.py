import json
import os
import resource
from pathlib import Path

import pytest

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_steps_are_numbers_and_not_names(folder):
    for name in ("model-900.pt", "model-1000.pt", "model-last.pt", "model-2000.pt.unfinished", "model-x.pt"):
        (folder.checkpoints / name).touch()
    assert folder.steps() == [900, 1000]


def dated(path, seconds):
    path.write_text(path.name)
    os.utime(path, (seconds, seconds))
    return path


def test_those_saved_last_come_first(folder):
    """Step 50 was saved after step 100: the run was taken back. Equal times leave the higher step in front."""
    paths = [dated(folder.checkpoint(step), seconds) for step, seconds in ((50, 3), (100, 2), (99, 1), (2, 1))]
    assert folder.by_age() == paths


def test_latest_is_the_one_saved_last(folder):
    """A run that was taken back to step 3 and saved step 50 goes on from there, not from the abandoned step 100."""
    for step in (100, 50):
        folder.checkpoint(step).write_text(str(step))
        folder.point_last_at(folder.checkpoint(step))
    assert folder.candidates("latest")[0].read_text() == "50"


def test_candidates_behind_the_latest(folder):
    for step in (1, 2, 3):
        dated(folder.checkpoint(step), seconds=step)
    assert folder.candidates("latest") == [folder.checkpoint(step) for step in (3, 2, 1)]
    folder.point_last_at(folder.checkpoint(2))  # as a run that is killed between the two leaves it
    assert folder.candidates("latest") == [folder.last_checkpoint, folder.checkpoint(3), folder.checkpoint(1)]


def test_no_candidates_without_checkpoints(folder):
    assert folder.candidates("latest") == []
    assert folder.candidates("elsewhere/model.pt") == [Path("elsewhere/model.pt")]


def test_what_a_killed_run_left_behind_goes(folder):
    for name in ("model-1.pt", "model-last.pt", "model-2.pt.unfinished", "model-last.pt.unfinished"):
        (folder.checkpoints / name).touch()
    (folder.root / "sampled" / "2.png.here-7.unfinished").touch()
    folder.preview(1).touch()
    folder.discard_after(0)
    assert list((folder.root / "sampled").iterdir()) == [folder.preview(1)]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["model-1.pt", "model-last.pt"]


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


def test_metrics_after_the_resumed_step_are_removed(folder):
    folder.append_metrics([{"step": 10}, {"step": 20}])
    folder.append_metrics([{"step": 30}])
    with open(folder.metrics, "a") as file:
        file.write('{"step": 4')  # cut off by a kill
    folder.discard_after(20)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == [{"step": 10}, {"step": 20}]


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match=r"trainer\.log_dir .*run' cannot be used"):
        RunFolder(tmp_path / "run").create()


def test_metrics_are_added_whole_or_not_at_all(folder):
    folder.append_metrics([{"step": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (folder.metrics.stat().st_size + 5, before[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="No space left"):
            folder.append_metrics([{"step": 2}, {"step": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.metrics.read_text() == '{"step": 1}\n'
