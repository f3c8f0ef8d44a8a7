"""The files of a run, in the folder `trainer.log_dir`."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint
from patch_based_ddpm.errors import explain_os_error
from patch_based_ddpm.files import SUFFIX, atomic_write, flush_folder


class RunFolder:
    """The folder `trainer.log_dir`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = root / "checkpoints"
        self.last_checkpoint = self.checkpoints / "model-last.pt"
        self.previews = root / "sampled"
        self.image_cache = root / "image_cache.npy"
        self.wandb_id = root / "wandb_run_id"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"model-{step}.pt"

    def preview(self, step: int) -> Path:
        return self.previews / f"{step}.png"

    def create(self) -> None:
        """Make the folders. Raises InputError."""
        with explain_os_error(f"trainer.log_dir {str(self.root)!r} cannot be used"):
            for folder in (self.checkpoints, self.previews):
                folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = [path.stem.removeprefix("model-") for path in self.checkpoints.glob("model-*.pt")]
        return sorted(int(name) for name in names if name.isdecimal())

    def by_age(self) -> list[Path]:
        """The checkpoints of single steps, newest first; after `--restart-step` a lower step may be newer."""
        paths = map(self.checkpoint, reversed(self.steps()))
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def candidates(self, resume: str) -> list[Path]:
        """The checkpoints to try in this order, given "latest" or one file; none if a new folder has no latest."""
        if resume != "latest":
            return [Path(resume)]
        if not self.last_checkpoint.exists():
            return self.by_age()
        return [self.last_checkpoint, *(path for path in self.by_age() if not path.samefile(self.last_checkpoint))]

    def save_checkpoint(self, step: int, contents: dict[str, Any], total_limit: int | None) -> None:
        """Write model-STEP.pt, link model-last.pt to it, then remove all but the `total_limit` newest checkpoints.

        Raises:
            OSError: the checkpoint cannot be written; nothing is removed.
        """
        path = self.checkpoint(step)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, contents)
        self.point_last_at(path)
        if total_limit is not None:
            older = [old for old in self.by_age() if old != path]  # excludes the new one even if the clock is wrong
            for old in older[total_limit - 1 :]:
                with contextlib.suppress(OSError):  # the next save tries again
                    old.unlink()

    def point_last_at(self, path: Path) -> None:
        """Make model-last.pt a hard link to a checkpoint, or a copy where the file system has no links."""
        unfinished = self.last_checkpoint.with_name(self.last_checkpoint.name + SUFFIX)
        unfinished.unlink(missing_ok=True)
        try:
            os.link(path, unfinished)
        except OSError:
            with open(path, "rb") as source, atomic_write(self.last_checkpoint) as copy:
                shutil.copyfileobj(source, copy)
            return
        unfinished.replace(self.last_checkpoint)
        flush_folder(self.checkpoints)

    def discard_after(self, step: int) -> None:
        """Remove metrics of later steps, which a resumed run logs again, and the partly written files of a killed run.

        Raises:
            OSError: a file cannot be removed.
        """
        if step == 0:
            self.wandb_id.unlink(missing_ok=True)  # of a run that never saved
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            with atomic_write(self.metrics) as file:
                file.writelines(f"{line}\n".encode() for line in lines if _logged_step(line) <= step)
        for folder in (self.checkpoints, self.previews):
            for path in folder.glob("*" + SUFFIX):
                path.unlink(missing_ok=True)

    def append_metrics(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl, all or none. Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with open(self.metrics, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(data) < len(data):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _logged_step(line: str) -> float:
    """The step of a line; infinity for a line that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def report_unwritten(path: Path, error: OSError) -> str:
    """Print above the progress bar that a file could not be written; returns the sentence."""
    sentence = f"{path} could not be written: {error.strerror or error}."
    tqdm.write(f"{sentence} The run continues.")
    return sentence
