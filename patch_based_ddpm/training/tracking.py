"""Where a run reports to: always metrics.jsonl, and wandb when it is enabled - online, offline or not at all.

wandb must never end a run: without a login it records offline, and if it cannot start the run goes on without it.
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
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.saver import tell_unwritten

DEFAULT_PROJECT = "patch_based_ddpm"


class Tracker:
    """Writes scalars and pictures of the main process; on the other processes it does nothing.

    Args:
        accelerator: made with `log_with="wandb"` where the config enables wandb.
        config: the run's configuration, shown beside the curves.
        folder: the run's folder.
    """

    def __init__(self, accelerator: Accelerator, config: Config, folder: RunFolder) -> None:
        self.accelerator = accelerator
        self.config = config
        self.folder = folder
        self.wandb = None
        self._unwritten: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start wandb if it is enabled, as the same wandb run when this one is resumed."""
        if not self.config.trainer.wandb_enabled or not self.accelerator.is_main_process:
            return
        try:
            import wandb
        except ImportError:
            self.accelerator.print("wandb is enabled but not installed; the metrics go to metrics.jsonl alone.")
            return
        for attempt in _modes(wandb, self.folder.root, self.accelerator.print):
            try:
                self._start_wandb(attempt)
                return
            except Exception as error:  # whatever keeps wandb from starting, the run matters more
                self.accelerator.print(f"wandb could not start ({type(error).__name__}: {error}).")
                self.accelerator.trackers = []  # or the next attempt would start the failed one again
        self.accelerator.print("The run goes on without wandb; the metrics are in metrics.jsonl.")

    def _start_wandb(self, mode: str | None) -> None:
        trainer = self.config.trainer
        self.accelerator.init_trackers(
            trainer.wandb_project or DEFAULT_PROJECT,
            config=self.config.to_dict(),
            init_kwargs={
                "wandb": {
                    "name": trainer.wandb_name or self.folder.root.name,
                    "id": self._run_id(),
                    "resume": "allow",
                    "dir": str(self.folder.root),
                    "mode": mode,
                }
            },
        )
        self.wandb = self.accelerator.get_tracker("wandb", unwrap=True)
        # Curves over our own step: a resumed run may log a step again, which wandb's own counter would drop.
        self.wandb.define_metric("*", step_metric="step")

    def _run_id(self) -> str:
        if not self.folder.wandb_id.exists():
            self.folder.wandb_id.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        return self.folder.wandb_id.read_text(encoding="utf-8").strip()

    def log(self, step: int, scalars: dict[str, float], heat_map: np.ndarray) -> None:
        """Log one step.

        Args:
            step: the optimizer steps done.
            scalars: what to draw as curves; what is not finite becomes null in metrics.jsonl.
            heat_map: (N, N) the mean loss of each patch, as it lies in the image.
        """
        if not self.accelerator.is_main_process:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        losses = [[value if math.isfinite(value) else None for value in row] for row in heat_map.tolist()]
        self._unwritten.append({"step": step, **finite, "patch_loss": losses})
        try:
            self.folder.append_metrics(self._unwritten)
            self._unwritten = []
        except OSError as error:  # they are written with the next ones
            tell_unwritten(self.folder.metrics, error)
        self._show(step, scalars, patch_loss=_heat(heat_map))

    def log_preview(self, step: int, grid: np.ndarray) -> None:
        """Show a grid of sampled images, (H, W, c) uint8."""
        self._show(step, {}, preview=grid)

    def _show(self, step: int, scalars: dict[str, float], **pictures: np.ndarray) -> None:
        if self.wandb is None:
            return
        import wandb

        try:
            self.wandb.log({"step": step, **scalars, **{name: wandb.Image(array) for name, array in pictures.items()}})
        except Exception as error:
            self.accelerator.print(f"wandb failed and is left out from here on ({type(error).__name__}: {error}).")
            self.wandb = None

    def finish(self) -> None:
        """Let wandb upload what it holds."""
        if self.wandb is None:
            return
        try:
            self.wandb.finish()
        except Exception as error:
            self.accelerator.print(f"wandb could not finish ({type(error).__name__}: {error}).")


def record(config: dict[str, Any], scalars: dict[str, float], *, project: str | None, folder: Path) -> None:
    """Report figures to wandb as a run of their own, online, offline or not at all; says so, and never fails.

    Args:
        config: what they are figures of.
        scalars: the figures.
        project: wandb project; None: this package's.
        folder: where wandb keeps its files.
    """
    try:
        import wandb
    except ImportError:
        print("wandb is not installed; the figures were not reported to it.")
        return
    for mode in _modes(wandb, folder, print):
        try:
            run = wandb.init(
                project=project or DEFAULT_PROJECT, job_type="evaluate", config=config, dir=str(folder), mode=mode
            )
            run.log(scalars)
            run.finish()
            return
        except Exception as error:  # the figures are printed, whatever wandb does
            print(f"wandb could not record the figures ({type(error).__name__}: {error}).")


def _modes(wandb: Any, folder: Path, say: Callable[[str], None]) -> list[str | None]:
    """The ways to start wandb, in order: as the user set it up, then without the network."""
    if "WANDB_MODE" in os.environ or _logged_in(wandb):
        return [None, "offline"]
    say(f"wandb: no login found, recording offline below {folder / 'wandb'}.")
    return ["offline"]


def _logged_in(wandb: Any) -> bool:
    try:
        return wandb.login(prompt=False, verify=False)
    except Exception:  # settings that wandb cannot read
        return False


def _heat(values: np.ndarray) -> np.ndarray:
    """(N, N) -> uint8 grey picture of 16 pixels a patch, black at 0 and white at the largest value."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0)
    scaled = values / max(float(values.max()), 1e-12) * 255
    return np.kron(scaled.round().astype(np.uint8), np.ones((16, 16), dtype=np.uint8))
