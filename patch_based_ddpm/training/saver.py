"""Writing a run's checkpoints: a failure is told and survived, and old ones go when the new one is safe."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.training.run_folder import RunFolder

MAX_FAILED_SAVES = 3  # in a row; a run that cannot save is not worth its electricity


def tell_unwritten(path: Path, error: OSError) -> str:
    """Say that a file could not be written, above the progress bar; returns what was said."""
    sentence = f"{path} could not be written: {error.strerror or error}."
    tqdm.write(f"{sentence} The run goes on.")
    return sentence


class Saver:
    """Writes the checkpoints of a run.

    Args:
        accelerator: its main process writes; all learn whether it could.
        folder: the run's folder, made anew should it vanish.
        total_limit: so many checkpoints stay; None: all.
    """

    def __init__(self, accelerator: Accelerator, folder: RunFolder, total_limit: int | None) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.total_limit = total_limit
        self.failures = 0

    def save(self, step: int, contents: Callable[[], dict[str, Any]]) -> bool:
        """Write the checkpoint of a step and let model-last.pt be it; called by all processes together.

        Args:
            step: the optimizer steps done.
            contents: makes what goes into it, see `checkpoint`; the main process alone calls it.

        Returns:
            Whether it was written.

        Raises:
            InputError: it could not be written, for the `MAX_FAILED_SAVES`th time in a row.
        """
        failure = self._write(step, contents()) if self.accelerator.is_main_process else None
        (failure,) = broadcast_object_list([failure])
        self.failures = 0 if failure is None else self.failures + 1
        if self.failures == MAX_FAILED_SAVES:
            raise InputError(f"stopped at step {step}, as {self.failures} saves in a row failed; the last: {failure}")
        return failure is None

    def _write(self, step: int, contents: dict[str, Any]) -> str | None:
        """Returns what went wrong."""
        path = self.folder.checkpoint(step)
        try:
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.save(path, contents)
            self.folder.point_last_at(path)
        except OSError as error:
            return tell_unwritten(path, error)
        if self.total_limit is not None:
            before = [old for old in self.folder.saved() if old != path]  # whatever the clock says, it is not old
            for old in before[self.total_limit - 1 :]:
                with contextlib.suppress(OSError):  # it is tried again after the next save
                    old.unlink()
        return None
