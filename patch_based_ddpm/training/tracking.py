"""Averages the metrics of a log interval, and reports metrics and previews to metrics.jsonl and, if enabled, wandb.

wandb never ends a run: without a login it records offline, and after a failure the run continues without it.
"""

import contextlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from patch_based_ddpm.config import Config
from patch_based_ddpm.training.run_folder import RunFolder, report_unwritten
from patch_based_ddpm.training.step import StepResult

DEFAULT_PROJECT = "patch_based_ddpm"


class IntervalMetrics(NamedTuple):
    """Means over the applied steps of a log interval, NaN if all were skipped; see `StepResult`."""

    loss: float
    grad_norm: float
    patch_loss: Tensor  # float64, on the CPU
    steps_per_second: float  # skipped ones included
    skipped_in_a_row: int  # the longest row of skipped steps that ends in the interval or continues after it


class TrainingMetrics:
    """Keeps the results of steps on the device until the log interval ends, so that no step waits for the device.

    Args:
        skipped_steps: of the run so far.
    """

    def __init__(self, skipped_steps: int = 0) -> None:
        self._skipped_before = skipped_steps
        self._skipped_in_a_row = 0
        self._start_interval()

    def _start_interval(self) -> None:
        self._steps: list[Tensor] = []  # (3 + N*N,) each
        self._start = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Add the result of a step."""
        scalars = torch.stack([result.applied.float(), result.loss, result.grad_norm])
        self._steps.append(torch.cat([scalars, result.patch_loss]))

    def skipped_steps(self) -> int:
        """Skipped steps of the whole run; waits for the device."""
        applied = torch.stack(self._steps)[:, 0].tolist() if self._steps else []
        return self._skipped_before + applied.count(False)

    def end_interval(self) -> IntervalMetrics:
        """Average the steps since the last call, at least one; waits for the device."""
        steps = torch.stack(self._steps).cpu().double()  # (n, 3 + N*N)
        seconds = time.perf_counter() - self._start
        applied = steps[:, 0].bool()
        means = steps[applied, 1:].mean(dim=0)
        rows = list(accumulate(applied.tolist(), lambda row, ok: 0 if ok else row + 1, initial=self._skipped_in_a_row))
        self._skipped_in_a_row = rows[-1]
        self._skipped_before += len(steps) - int(applied.sum())
        self._start_interval()
        return IntervalMetrics(means[0].item(), means[1].item(), means[2:], len(steps) / seconds, max(rows[1:]))


class Tracker:
    """Reports for the main process; on the other processes it does nothing."""

    def __init__(self, accelerator: Accelerator, config: Config, folder: RunFolder) -> None:
        self.accelerator = accelerator
        self.config = config
        self.folder = folder
        self.wandb = None  # the wandb run
        self._unwritten: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start wandb if it is enabled; a resumed run continues its wandb run."""
        trainer = self.config.trainer
        if not trainer.wandb_enabled or not self.accelerator.is_main_process:
            return
        if not self.folder.wandb_id.exists():
            self.folder.wandb_id.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        self.wandb = _start_wandb(
            self.folder.root,
            self.accelerator.print,
            project=trainer.wandb_project,
            name=trainer.wandb_name or self.folder.root.name,
            id=self.folder.wandb_id.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=self.config.to_dict(),
        )
        if self.wandb is None:
            self.accelerator.print("The run continues without wandb; the metrics are in metrics.jsonl.")
            return
        # Curves over our own step: a resumed run may log a step again, which wandb's own counter would drop.
        self.wandb.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float], patch_loss: np.ndarray) -> None:
        """Log one step.

        Args:
            step: the optimizer steps done.
            scalars: drawn as curves; values that are not finite become null in metrics.jsonl.
            patch_loss: (N, N) the mean loss of each patch, as it lies in the image.
        """
        if not self.accelerator.is_main_process:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        losses = [[value if math.isfinite(value) else None for value in row] for row in patch_loss.tolist()]
        self._unwritten.append({"step": step, **finite, "patch_loss": losses})
        try:
            self.folder.append_metrics(self._unwritten)
            self._unwritten = []
        except OSError as error:  # the next call writes them
            report_unwritten(self.folder.metrics, error)
        self._log_wandb(step, scalars, patch_loss=_heat_map(patch_loss))

    def log_preview(self, step: int, grid: np.ndarray) -> None:
        """Log a grid of sampled images, (H, W, c) uint8."""
        self._log_wandb(step, {}, preview=grid)

    def _log_wandb(self, step: int, scalars: dict[str, float], **pictures: np.ndarray) -> None:
        if self.wandb is None:
            return
        import wandb

        run, self.wandb = self.wandb, None
        with _printed(self.accelerator.print, "failed and is left out from here on"):
            run.log({"step": step, **scalars, **{name: wandb.Image(array) for name, array in pictures.items()}})
            self.wandb = run

    def finish(self) -> None:
        """Let wandb upload the rest."""
        if self.wandb is not None:
            with _printed(self.accelerator.print, "could not finish"):
                self.wandb.finish()


def record(config: dict[str, Any], scalars: dict[str, float], *, project: str | None, folder: Path) -> None:
    """Report an evaluation's settings and results to wandb as a run of its own; prints a failure instead of raising it.

    Files of wandb lie in `folder`; no `project` means this package's.
    """
    run = _start_wandb(folder, print, project=project, job_type="evaluate", config=config)
    if run is not None:
        with _printed(print, "could not record the figures"):
            run.log(scalars)
            run.finish()


def _start_wandb(folder: Path, say: Callable[[str], None], *, project: str | None, **options: Any) -> Any:
    """Start a wandb run as the user set wandb up, or else offline; None if wandb cannot start."""
    try:
        import wandb
    except ImportError:
        say("wandb is not installed.")
        return None
    modes, logged_in = [None, "offline"], False  # None: as WANDB_MODE says, or else online
    with contextlib.suppress(Exception):  # settings that wandb cannot read
        logged_in = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
    if not logged_in:
        say(f"wandb: no login found, recording offline below {folder / 'wandb'}.")
        modes = ["offline"]
    for mode in modes:
        with _printed(say, "could not start"):
            return wandb.init(project=project or DEFAULT_PROJECT, dir=str(folder), mode=mode, **options)
    return None


@contextlib.contextmanager
def _printed(say: Callable[[str], None], failure: str) -> Iterator[None]:
    """Print an exception of wandb, which may be of any kind, instead of raising it."""
    try:
        yield
    except Exception as error:
        say(f"wandb {failure} ({type(error).__name__}: {error}).")


def _heat_map(values: np.ndarray) -> np.ndarray:
    """(N, N) -> uint8 grey picture of 16 pixels a patch, black at 0 and white at the largest value."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0)
    scaled = values / max(float(values.max()), 1e-12) * 255
    return np.kron(scaled.round().astype(np.uint8), np.ones((16, 16), dtype=np.uint8))
