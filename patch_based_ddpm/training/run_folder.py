"""The files of a run: checkpoints, the newest of which is model-last.pt, metrics.jsonl and previews."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint
from patch_based_ddpm.errors import explain_os_error
from patch_based_ddpm.files import SUFFIX, atomic_write, flush_folder


class RunFolder:
    """LOG_DIR: config.json, metrics.jsonl, checkpoints/, sampled/, wandb/ and, if enabled, image_cache.npy.

    Args:
        root: LOG_DIR.
    """

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
        """Make the folders.

        Raises:
            InputError: a file is in the way, or the file system is read-only.
        """
        with explain_os_error(f"trainer.log_dir {str(self.root)!r} cannot be used"):
            for folder in (self.checkpoints, self.previews):
                folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = [re.fullmatch(r"model-(\d+)\.pt", path.name) for path in self.checkpoints.glob("model-*.pt")]
        return sorted(int(name[1]) for name in names if name)

    def by_age(self) -> list[Path]:
        """The checkpoints of single steps, newest first; after `--restart-step` a lower step may be newer."""
        paths = [self.checkpoint(step) for step in reversed(self.steps())]
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def candidates(self, resume: str) -> list[Path]:
        """The checkpoints to resume from, best first; the later ones are for the case that the first are damaged.

        Args:
            resume: "latest", which finds none in a new folder, or a file.
        """
        if resume != "latest":
            return [Path(resume)]
        if not self.last_checkpoint.exists():
            return self.by_age()
        return [self.last_checkpoint, *(path for path in self.by_age() if not path.samefile(self.last_checkpoint))]

    def save_checkpoint(self, step: int, contents: dict[str, Any], total_limit: int | None) -> None:
        """Write model-STEP.pt, let model-last.pt be the same file, then remove the oldest checkpoints.

        Args:
            step: the optimizer steps done.
            contents: see `checkpoint.save`.
            total_limit: how many checkpoints stay; None: all.

        Raises:
            OSError: the checkpoint cannot be written; nothing is removed then.
        """
        path = self.checkpoint(step)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, contents)
        self.point_last_at(path)
        if total_limit is not None:
            older = [old for old in self.by_age() if old != path]  # `path` is the newest even if the clock was put back
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

    def remove_unfinished(self) -> None:
        """Remove the partly written files of a killed run."""
        for folder in (self.checkpoints, self.previews):
            for path in folder.glob("*" + SUFFIX):
                path.unlink(missing_ok=True)

    def append_metrics(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl, all or none.

        Raises:
            OSError: they cannot be written.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with open(self.metrics, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(data) < len(data):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def remove_metrics_after(self, step: int) -> None:
        """Remove the lines of later steps, which a resumed run logs again, and a line that was cut off."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text(encoding="utf-8").splitlines() if _logged_step(line) <= step]
        with atomic_write(self.metrics) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def report_unwritten(path: Path, error: OSError) -> str:
    """Print above the progress bar that a file could not be written; returns the sentence."""
    sentence = f"{path} could not be written: {error.strerror or error}."
    tqdm.write(f"{sentence} The run goes on.")
    return sentence
