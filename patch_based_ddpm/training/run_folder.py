"""A run's folder on disk: where everything lies, which checkpoint is the newest, and the log of metrics.

LOG_DIR/ holds config.json (every default filled in), metrics.jsonl (one object per logged step), checkpoints/
(model-STEP.pt and model-last.pt), sampled/ (previews), wandb/, and image_cache.npy where trainer.cache_images is true.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import SUFFIX, atomic_write, flush_folder


@dataclass(frozen=True)
class RunFolder:
    """Paths below LOG_DIR.

    Attributes:
        root: LOG_DIR.
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def wandb_id(self) -> Path:
        return self.root / "wandb_run_id"

    @property
    def image_cache(self) -> Path:
        return self.root / "image_cache.npy"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"model-{step}.pt"

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoints / "model-last.pt"

    def preview(self, step: int) -> Path:
        return self.root / "sampled" / f"{step}.png"

    def create(self) -> None:
        """Make the folders.

        Raises:
            InputError: a file is in the way, or the place is read-only.
        """
        try:
            for folder in (self.checkpoints, self.preview(0).parent):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"trainer.log_dir {str(self.root)!r} cannot be used: {error.strerror}.") from None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = [re.fullmatch(r"model-(\d+)\.pt", path.name) for path in self.checkpoints.glob("model-*.pt")]
        return sorted(int(name[1]) for name in names if name)

    def saved(self) -> list[Path]:
        """The checkpoints, those saved last first; a run that was taken back saves lower steps after higher ones."""
        paths = [self.checkpoint(step) for step in reversed(self.steps())]
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def candidates(self, resume: str) -> list[Path]:
        """The checkpoints that `--resume` may mean, best first: a later one is for when those before are damaged.

        Args:
            resume: "latest", or a file.

        Returns:
            Files; none for "latest" where there are none yet, so that one command line starts and restarts a run.
        """
        if resume != "latest":
            return [Path(resume)]
        if not self.last_checkpoint.exists():
            return self.saved()
        return [self.last_checkpoint, *(path for path in self.saved() if not path.samefile(self.last_checkpoint))]

    def point_last_at(self, checkpoint: Path) -> None:
        """Let model-last.pt be this checkpoint: a hard link, or a copy where the file system has no links."""
        unfinished = self.last_checkpoint.with_name(self.last_checkpoint.name + SUFFIX)
        unfinished.unlink(missing_ok=True)
        try:
            os.link(checkpoint, unfinished)
        except OSError:
            with open(checkpoint, "rb") as source, atomic_write(self.last_checkpoint) as copy:
                shutil.copyfileobj(source, copy)
            return
        unfinished.replace(self.last_checkpoint)
        flush_folder(self.checkpoints)

    def remove_unfinished(self) -> None:
        """Remove what a killed run had begun to write."""
        for folder in (self.checkpoints, self.preview(0).parent):
            for path in folder.glob("*" + SUFFIX):
                path.unlink(missing_ok=True)

    def append_metrics(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl, all or none."""
        self.root.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with open(self.metrics, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(data) < len(data):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def forget_metrics_after(self, step: int) -> None:
        """Drop what was logged after `step`, and a line that was cut off: a resumed run logs it again."""
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
