"""How many patches share a forward pass; fewer after the device ran out of memory.

Every number gives the same prediction and the same gradient, so it may change during a run.
"""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patch_based_ddpm.errors import InputError, OnePatchTooMany


@dataclass
class PatchBatching:
    """Chooses the patches of each forward pass.

    Attributes:
        limit: most patches in a pass, whatever is requested; None: no limit. `shrink` lowers it.
        padded: pad smaller passes to the size of the largest one so far, so that a compiled network sees one shape.
    """

    limit: int | None = None
    padded: bool = False
    _largest: dict[int | None, int] = field(default_factory=dict, init=False)  # size of a pass under each bound

    def size(self, total: int, requested: int | None) -> int:
        """The size of a pass.

        Args:
            total: patches of all images together.
            requested: most patches in a pass; None: all.

        Returns:
            The smallest of both and `limit`. If `padded`, the largest size so far under the same request and limit.

        Raises:
            InputError: `requested` is less than 1.
        """
        if requested is not None and requested < 1:
            raise InputError(
                f"patch_batch_size is {requested}; it must be at least 1, or None for all patches at once."
            )
        bound = min((most for most in (requested, self.limit) if most is not None), default=None)
        size = total if bound is None else min(total, bound)
        if self.padded:
            size = self._largest[bound] = max(size, self._largest.get(bound, 0))
        return size

    def indices(self, start: int, size: int, total: int, device: torch.device) -> Tensor:
        """The patch indices of a pass, int64: [start, start + size), cut off at `total`.

        A padded pass repeats the last patch instead; only its first `total - start` predictions count.
        """
        if self.padded:
            return torch.arange(start, start + size, device=device).clamp(max=total - 1)
        return torch.arange(start, min(start + size, total), device=device)

    def shrink(self, size: int) -> None:
        """Halve the passes after the device ran out of memory with `size` patches in one.

        Raises:
            OnePatchTooMany: `size` is 1.
        """
        if size == 1:
            raise OnePatchTooMany(
                "the device ran out of memory with a single patch in a pass; fewer images at a time, a larger "
                "patch_divider or a smaller dim would need less."
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.limit = size // 2
        warnings.warn(
            f"the device ran out of memory with {size} patches in a pass; going on with {self.limit}, to the same "
            "result.",
            RuntimeWarning,
            stacklevel=3,
        )
