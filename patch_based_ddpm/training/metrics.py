"""What a run measures between two reports, kept on the device until a report asks: a step waits for nothing."""

import math
import time

import torch
from torch import Tensor

from patch_based_ddpm.training.step import StepResult


class Window:
    """The steps between two reports; the first ones may have been taken before the run was resumed.

    Args:
        rows: (n, 3 + N*N) what `rows` returned then; None: there were none.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self._rows = [] if rows is None else list(rows)
        self._earlier = len(self._rows)
        self._started = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Take note of one step."""
        figures = torch.stack([result.applied.float(), result.loss, result.grad_norm])
        self._rows.append(torch.cat([figures, result.patch_loss]))

    @property
    def rows(self) -> Tensor | None:
        """(n, 3 + N*N): applied, loss, gradient norm and patch losses of each step; None: there are none."""
        return torch.stack(self._rows) if self._rows else None

    def steps_per_second(self) -> float:
        """Over the steps since the window was opened."""
        return (len(self._rows) - self._earlier) / (time.perf_counter() - self._started)

    def means(self) -> tuple[float, float, Tensor]:
        """Loss and gradient norm over the applied steps (NaN if there is none), and the patch loss (N*N,) over all."""
        patch_loss = self.rows[:, 3:].mean(dim=0)
        applied = [(loss, norm) for counts, loss, norm in self.rows[:, :3].tolist() if counts]
        if not applied:
            return math.nan, math.nan, patch_loss
        loss, grad_norm = (math.fsum(values) / len(applied) for values in zip(*applied))
        return loss, grad_norm, patch_loss


def own_rows(saved: Tensor | None, process_index: int, num_processes: int, device: torch.device) -> Tensor | None:
    """A process's part of the rows in a checkpoint.

    Args:
        saved: (processes that saved, n, 3 + N*N), or None.
        process_index: of this one.
        num_processes: how many there are now; where they are others than those that saved, each takes the mean.
        device: where they go.
    """
    if saved is None:
        return None
    rows = saved[process_index] if len(saved) == num_processes else saved.mean(dim=0)
    return rows.to(device)


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
