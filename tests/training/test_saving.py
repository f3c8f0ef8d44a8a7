import errno
import os
import resource
import shutil

import pytest
import torch

from patch_based_ddpm import checkpoint
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.signals import SignalRequest
from patch_based_ddpm.training.trainer import MAX_FAILED_SAVES
from support.runs import contents, make_trainer


@pytest.fixture
def full_disk(monkeypatch):
    """A switch: `full_disk(True)` and no checkpoint can be written."""
    save, state = torch.save, {"full": False}

    def maybe(data, file):
        if state["full"]:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(data, file)

    monkeypatch.setattr(torch, "save", maybe)
    return lambda full: state.update(full=full)


def test_a_run_survives_a_disk_that_is_full_for_a_while(tmp_path, full_disk, capsys):
    trainer = make_trainer(tmp_path, train_num_steps=12, save_and_sample_every=2, preview_count=0)
    add = trainer.metrics.add

    def fill(result):
        full_disk(trainer.step in (4, 6, 10))
        add(result)

    trainer.metrics.add = fill
    trainer.train()
    assert trainer.folder.steps() == [2, 8, 12]
    said = capsys.readouterr().out
    for step in (4, 6, 10):
        assert f"model-{step}.pt could not be written: No space left on device. The run continues." in said
    assert [path.name for path in trainer.folder.checkpoints.glob("*.unfinished")] == []


def test_a_run_that_cannot_save_stops(tmp_path, full_disk):
    trainer = make_trainer(tmp_path, train_num_steps=20, save_and_sample_every=2, preview_count=0)
    full_disk(True)
    with pytest.raises(InputError, match=r"^stopped at step 6, as 3 saves in a row failed; the last: .*model-6\.pt"):
        trainer.train()
    assert trainer.step == 2 * MAX_FAILED_SAVES


def test_a_run_whose_last_step_is_not_saved_has_failed(tmp_path, full_disk):
    trainer = make_trainer(tmp_path, train_num_steps=2, save_and_sample_every=2, preview_count=0)
    full_disk(True)
    with pytest.raises(InputError, match=r"^step 2, the last one, could not be saved\.$"):
        trainer.train()


def test_a_stopped_run_whose_step_is_not_saved_has_failed(tmp_path, full_disk, monkeypatch):
    """A job scheduler would start it again and again from the same checkpoint."""
    trainer = make_trainer(tmp_path, train_num_steps=9, save_and_sample_every=9, preview_count=0)
    monkeypatch.setattr(trainer.signals, "requested", lambda: SignalRequest.STOP if trainer.step == 4 else 0)
    full_disk(True)
    with pytest.raises(InputError, match=r"^step 4, the last one, could not be saved\.$"):
        trainer.train()


def test_the_real_thing_a_file_that_may_not_grow(tmp_path):
    """torch hides the reason behind an error of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            checkpoint.save(tmp_path / "model.pt", {"model": torch.zeros(1000, 1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_vanishes_is_made_anew(tmp_path):
    trainer = make_trainer(tmp_path, train_num_steps=6, save_and_sample_every=3, preview_count=1)
    add = trainer.metrics.add

    def vanish(result):
        if trainer.step == 4:
            shutil.rmtree(trainer.folder.root)
        add(result)

    trainer.metrics.add = vanish
    trainer.train()
    assert contents(trainer, 6)["step"] == 6
    assert trainer.folder.preview(6).exists()
    assert [line[:10] for line in trainer.folder.metrics.read_text().splitlines()] == [
        '{"step": 4',
        '{"step": 5',
        '{"step": 6',
    ]


def test_what_else_cannot_be_written_is_told_and_written_later(tmp_path, capsys):
    """Metrics and previews; a folder in the place of a file stands for a disk that refuses."""
    trainer = make_trainer(tmp_path, train_num_steps=4, save_and_sample_every=2, preview_count=1)
    trainer.folder.metrics.mkdir()
    trainer.folder.preview(2).mkdir()
    add = trainer.metrics.add

    def mend(result):
        if trainer.step == 3:
            trainer.folder.metrics.rmdir()
        add(result)

    trainer.metrics.add = mend
    trainer.train()
    said = capsys.readouterr().out
    assert "metrics.jsonl could not be written: Is a directory. The run continues." in said
    assert "2.png could not be written: Is a directory. The run continues." in said
    assert [line[:10] for line in trainer.folder.metrics.read_text().splitlines()] == [
        f'{{"step": {i}' for i in (1, 2, 3, 4)
    ]
    assert trainer.folder.preview(4).is_file()


@pytest.mark.parametrize(("limit", "kept"), [(None, [2, 4, 6, 8]), (1, [8]), (3, [4, 6, 8])])
def test_old_checkpoints_go_when_the_new_one_is_safe(tmp_path, monkeypatch, limit, kept):
    trainer = make_trainer(
        tmp_path, train_num_steps=8, save_and_sample_every=2, preview_count=0, checkpoints_total_limit=limit
    )
    seen = []
    save = checkpoint.save

    def spied(path, contents):
        save(path, contents)
        seen.append(trainer.folder.steps())

    monkeypatch.setattr(checkpoint, "save", spied)
    trainer.train()
    assert trainer.folder.steps() == kept
    assert all(len(steps) > 1 for steps in seen[1:])  # the one before is there until the new one is written
    assert trainer.folder.last_checkpoint.samefile(trainer.folder.checkpoint(8))


def test_a_save_that_fails_takes_no_old_checkpoint_away(tmp_path, full_disk):
    options = {"train_num_steps": 2, "save_and_sample_every": 2, "preview_count": 0, "checkpoints_total_limit": 1}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    full_disk(True)
    trainer.step = 4
    assert not trainer.save()
    assert trainer.folder.steps() == [2]
    assert checkpoint.read(trainer.folder.last_checkpoint)["step"] == 2


def test_a_clock_that_was_put_back_does_not_make_the_new_checkpoint_old(tmp_path):
    trainer = make_trainer(tmp_path, preview_count=0, checkpoints_total_limit=1)
    for step in (1, 2):
        trainer.step = step
        trainer.save()
        os.utime(trainer.folder.checkpoint(step), (2**33, 2**33))
    assert trainer.folder.steps() == [2]


def test_an_abandoned_branch_goes_before_what_was_saved_after_it(tmp_path):
    """A run that was taken back to step 1 keeps what it saves from then on, not the higher steps from before."""
    trainer = make_trainer(tmp_path, preview_count=0, checkpoints_total_limit=2)
    for step in (100, 200, 2, 3):
        trainer.step = step
        trainer.save()
    assert trainer.folder.steps() == [2, 3]
