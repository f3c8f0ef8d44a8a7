"""How patches are dealt out to forward passes: how many at a time, and fewer once the device has run out of memory.

Any number gives the same prediction and the same gradient, so it may change in the middle of a run.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_based_ddpm.errors import InputError, OnePatchTooMany


@dataclass
class PatchBatching:
    """The size of forward passes.

    Attributes:
        limit: the most patches that share a pass, whatever is requested for; None: no limit. `shrink` lowers it.
        padded: fill smaller passes up, so that a compiled network sees tensors of one size.
        largest: patches of the largest pass so far, to which a padded one is filled up; 0: none.
    """

    limit: int | None = None
    padded: bool = False
    largest: int = 0

    def size(self, total: int, requested: int | None) -> int:
        """How many patches of `total` share a pass, where `requested` (None: all) are wanted.

        A padded pass is as large as the largest before it, which this remembers.

        Raises:
            InputError: `requested` is less than 1.
        """
        if requested is not None and requested < 1:
            raise InputError(
                f"patch_batch_size is {requested}; it must be at least 1, or None for all patches at once."
            )
        size = min(size for size in (total, requested, self.limit) if size is not None)
        if self.padded:
            size = self.largest = max(size, self.largest)
        return size

    def indices(self, start: int, size: int, total: int, device: torch.device) -> Tensor:
        """The numbers of a pass's patches, int64: [start, start + size) cut off at `total`.

        A padded pass goes on with the last patch instead; only its first `total - start` rows count.
        """
        if self.padded:
            return torch.arange(start, start + size, device=device).clamp(max=total - 1)
        return torch.arange(start, min(start + size, total), device=device)

    def shrink(self, size: int) -> None:
        """Halve the patches of a pass after the device ran out of memory with `size` of them.

        Raises:
            OnePatchTooMany: there was only one.
        """
        if size == 1:
            raise OnePatchTooMany(
                "the device ran out of memory with a single patch in a pass; fewer images at a time, a larger "
                "patch_divider or a smaller dim would need less."
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.limit, self.largest = size // 2, 0
        warnings.warn(
            f"the device ran out of memory with {size} patches in a pass; going on with {self.limit}, to the same "
            "result.",
            RuntimeWarning,
            stacklevel=3,
        )
