"""What a run measures between two reports, kept on the device until a report asks: a step waits for nothing."""

import math
import time

import torch
from torch import Tensor

from patch_based_ddpm.training_step import StepResult


class Window:
    """The steps between two reports."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.results: list[StepResult] = []

    @property
    def seconds(self) -> float:
        """Time since the window was opened."""
        return time.perf_counter() - self.started

    def means(self) -> tuple[float, float, Tensor]:
        """Loss and gradient norm over the applied steps (NaN if there is none), and the patch loss (N*N,) over all."""
        patch_loss = torch.stack([result.patch_loss for result in self.results]).mean(dim=0)
        figures = torch.stack(
            [torch.stack([result.applied.float(), result.loss, result.grad_norm]) for result in self.results]
        )
        applied = [(loss, norm) for counts, loss, norm in figures.tolist() if counts]
        if not applied:
            return math.nan, math.nan, patch_loss
        loss, grad_norm = (math.fsum(values) / len(applied) for values in zip(*applied))
        return loss, grad_norm, patch_loss


class Skips:
    """Counts the steps that were not applied.

    Args:
        total: how many there were before.
        device: where the steps' results lie.
    """

    def __init__(self, total: int, device: torch.device) -> None:
        self._counts = torch.tensor([total, 0, 0], device=device)  # in all; in a row up to now; at most in a row

    def count(self, applied: Tensor) -> None:
        """Take note of one step."""
        total, in_a_row, longest = self._counts
        in_a_row = torch.where(applied, 0, in_a_row + 1)
        self._counts = torch.stack([total + ~applied, in_a_row, torch.maximum(longest, in_a_row)])

    def figures(self) -> tuple[int, int]:
        """How many there were in all, and how many in a row at most since this was made. Waits for the device."""
        total, _, longest = self._counts.tolist()
        return total, longest
