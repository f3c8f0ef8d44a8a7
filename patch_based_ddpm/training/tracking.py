"""Reports metrics and previews: to metrics.jsonl always, and to wandb if it is enabled.

wandb never ends a run: without a login it records offline, and if it cannot start the run goes on without it.
"""

import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from patch_based_ddpm.config import Config
from patch_based_ddpm.training.run_folder import RunFolder, report_unwritten

DEFAULT_PROJECT = "patch_based_ddpm"


class Tracker:
    """Reports for the main process; on the other processes it does nothing.

    Args:
        accelerator: tells which process this is.
        config: the run's configuration, shown beside the curves.
        folder: the run's folder.
    """

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
        self.wandb = start_wandb(
            self.folder.root,
            self.accelerator.print,
            project=trainer.wandb_project,
            name=trainer.wandb_name or self.folder.root.name,
            id=self.folder.wandb_id.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=self.config.to_dict(),
        )
        if self.wandb is None:
            self.accelerator.print("The run goes on without wandb; the metrics are in metrics.jsonl.")
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

        try:
            self.wandb.log({"step": step, **scalars, **{name: wandb.Image(array) for name, array in pictures.items()}})
        except Exception as error:
            self.accelerator.print(f"wandb failed and is left out from here on ({type(error).__name__}: {error}).")
            self.wandb = None

    def finish(self) -> None:
        """Let wandb upload the rest."""
        if self.wandb is None:
            return
        try:
            self.wandb.finish()
        except Exception as error:
            self.accelerator.print(f"wandb could not finish ({type(error).__name__}: {error}).")


def record(config: dict[str, Any], scalars: dict[str, float], *, project: str | None, folder: Path) -> None:
    """Report the figures of an evaluation to wandb, as a run of their own; a failure is printed and not raised.

    Args:
        config: settings of the evaluation.
        scalars: the figures.
        project: wandb project; None: this package's.
        folder: where wandb keeps its files.
    """
    run = start_wandb(folder, print, project=project, job_type="evaluate", config=config)
    if run is None:
        return
    try:
        run.log(scalars)
        run.finish()
    except Exception as error:
        print(f"wandb could not record the figures ({type(error).__name__}: {error}).")


def start_wandb(folder: Path, say: Callable[[str], None], *, project: str | None, **options: Any) -> Any:
    """Start a wandb run: as the user set wandb up, or else offline.

    Args:
        folder: where wandb keeps its files.
        say: prints why something did not work.
        project: wandb project; None: this package's.
        options: of `wandb.init`.

    Returns:
        The run, or None where wandb cannot start.
    """
    try:
        import wandb
    except ImportError:
        say("wandb is not installed.")
        return None
    modes = [None, "offline"]  # None: as WANDB_MODE says, or else online
    if "WANDB_MODE" not in os.environ and not _logged_in(wandb):
        say(f"wandb: no login found, recording offline below {folder / 'wandb'}.")
        modes = ["offline"]
    for mode in modes:
        try:
            return wandb.init(project=project or DEFAULT_PROJECT, dir=str(folder), mode=mode, **options)
        except Exception as error:  # of any kind: metrics.jsonl holds the figures too
            say(f"wandb could not start ({type(error).__name__}: {error}).")
    return None


def _logged_in(wandb: Any) -> bool:
    try:
        return wandb.login(prompt=False, verify=False)
    except Exception:  # settings that wandb cannot read
        return False


def _heat_map(values: np.ndarray) -> np.ndarray:
    """(N, N) -> uint8 grey picture of 16 pixels a patch, black at 0 and white at the largest value."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0)
    scaled = values / max(float(values.max()), 1e-12) * 255
    return np.kron(scaled.round().astype(np.uint8), np.ones((16, 16), dtype=np.uint8))
