"""Random generators seeded by a tuple of integers: the seed, the purpose of the draw, and its place in the run.

Nothing is drawn from a global generator. So a resumed run repeats the uninterrupted one, and draws do not depend on the
number of processes or workers.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """The purpose of a draw, the integer after the seed: it keeps the random numbers of two purposes apart."""

    SHUFFLE = 1
    FLIP = 2
    DIFFUSE = 3
    CHOOSE = 4
    CUT = 5
    PROJECT = 6
    SPOIL = 7
    OVERLAP = 8


def generator(*names: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the given integers and their order alone.

    PyTorch's CPU generator keeps 32 bits of a seed, so among 100,000 different tuples about one pair collides.

    Args:
        names: integers in [0, 2^64), for example `(seed, Purpose.FLIP, epoch, index)`.
        device: of the generator. Other kinds of devices draw other numbers from the same names.

    Returns:
        A freshly seeded generator.
    """
    assert all(isinstance(name, (int, np.integer)) and 0 <= name < 2**64 for name in names), names
    # SeedSequence equates (1, 2) with (1, 2, 0), and 2^32 with (0, 1). Words of one width after their count differ.
    words = [len(names), *(int(name) >> shift & 0xFFFFFFFF for name in names for shift in (0, 32))]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


class ImageNoise:
    """Standard normal noise; each image's part depends on that image's seed alone.

    It is drawn on the CPU, so that a seed gives the same noise on every device.

    Args:
        seeds: one per image, in [0, 2^64); the low 32 bits count.
        shape: (c, H, W).
        device: of the returned noise.
    """

    def __init__(self, seeds: Iterable[int], shape: tuple[int, int, int], device: torch.device | str) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """Draw the next (b, c, H, W) float32: first x_T, then the noise of each step."""
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        if torch.device(self.device).type == "cuda":
            noise = noise.pin_memory()  # lets the copy run asynchronously
        return noise.to(self.device, non_blocking=True)
