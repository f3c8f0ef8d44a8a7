"""The measurements of a log interval, averaged; and the count of skipped steps."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from patch_based_ddpm.training.step import StepResult


class IntervalMetrics(NamedTuple):
    """Means over the applied steps of a log interval, NaN if all were skipped; see `StepResult`."""

    loss: float
    grad_norm: float
    patch_loss: Tensor  # float64, on the CPU
    steps_per_second: float  # skipped ones included
    skipped_in_a_row: int  # at most, in a row that reaches into the interval


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
        longest = 0
        for was_applied in applied.tolist():
            self._skipped_in_a_row = 0 if was_applied else self._skipped_in_a_row + 1
            longest = max(longest, self._skipped_in_a_row)
        self._skipped_before += len(steps) - int(applied.sum())
        self._start_interval()
        return IntervalMetrics(means[0].item(), means[1].item(), means[2:], len(steps) / seconds, longest)
