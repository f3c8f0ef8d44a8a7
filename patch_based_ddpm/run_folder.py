"""A run's folder on disk: where everything lies, which checkpoint is the newest, and the log of metrics.

LOG_DIR/ holds config.json (every default filled in), metrics.jsonl (one object per logged step), checkpoints/
(model-STEP.pt and model-last.pt), sampled/ (previews), wandb/, and image_cache.npy where trainer.cache_images is true.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_based_ddpm.errors import InputError


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

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `--resume` asks for; "latest" is the one saved last, not the one of the most steps.

        Args:
            resume: "latest", or a file.

        Returns:
            The file; None for "latest" where there is none yet, so that one command line starts and restarts a run.
        """
        if resume != "latest":
            return Path(resume)
        if self.last_checkpoint.exists():
            return self.last_checkpoint
        steps = self.steps()
        return self.checkpoint(steps[-1]) if steps else None

    def point_last_at(self, checkpoint: Path) -> None:
        """Let model-last.pt be this checkpoint: a hard link, or a copy where the file system has no links."""
        unfinished = self.last_checkpoint.with_suffix(".pt.unfinished")
        unfinished.unlink(missing_ok=True)
        try:
            os.link(checkpoint, unfinished)
        except OSError:
            shutil.copyfile(checkpoint, unfinished)
        unfinished.replace(self.last_checkpoint)

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop what was logged after `step`, and a line that was cut off: a resumed run logs it again."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text(encoding="utf-8").splitlines() if _logged_step(line) <= step]
        unfinished = self.metrics.with_suffix(".unfinished")
        unfinished.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        unfinished.replace(self.metrics)


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
