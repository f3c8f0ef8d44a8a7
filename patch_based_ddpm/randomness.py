"""Everything random is a function of named integers: a seed, what the draw is for, and where in the run it happens.

Nothing is drawn from a global generator. So a resumed run repeats the uninterrupted one, and what is drawn does not
depend on how many processes or workers there are.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a draw is for: the name after the seed, so that two kinds of draws never share their numbers."""

    SHUFFLE = 1
    FLIP = 2
    DIFFUSE = 3
    CHOOSE = 4
    CUT = 5
    PROJECT = 6


def generator(*names: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on the given integers alone, in their order.

    PyTorch's CPU generator keeps 32 bits of a seed, so among 100 000 differently named ones about one pair is equal.

    Args:
        names: integers in [0, 2^64), for example `(seed, Purpose.FLIP, epoch, index)`.
        device: where the generator draws; the same names give other numbers on another kind of device.

    Returns:
        A freshly seeded generator.

    Raises:
        ValueError: a name is not an integer in [0, 2^64).
    """
    for name in names:
        if not isinstance(name, (int, np.integer)) or not 0 <= name < 2**64:
            raise ValueError(f"a generator's name is {name!r}; it must be an integer in [0, 2^64).")
    # SeedSequence takes (1, 2) and (1, 2, 0) for the same, and 2^32 for (0, 1): words of one width and their count
    # in front keep them apart.
    words = [len(names), *(int(name) >> shift & 0xFFFFFFFF for name in names for shift in (0, 32))]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


class ImageNoise:
    """Standard normal noise in which each image's part depends on that image's seed alone.

    It is drawn on the CPU, so that a seed means the same on every device.

    Args:
        seeds: one per image, in [0, 2^64); the low 32 bits count.
        shape: (c, H, W).
        device: where the noise goes.
    """

    def __init__(self, seeds: Iterable[int], shape: tuple[int, int, int], device: torch.device | str) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """Draw the next (b, c, H, W) float32: x_T first, then what each step asks for."""
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        if torch.device(self.device).type == "cuda":
            noise = noise.pin_memory()  # so that the copy waits for the GPU's work before it, and nobody for the copy
        return noise.to(self.device, non_blocking=True)
