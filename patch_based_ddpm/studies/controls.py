"""Real faces with a known defect: they show which figure notices what.

Shapes: `b` images, `c` channels, `H W` image, `N` patches a side.
"""

import re
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from patch_based_ddpm.randomness import Purpose, generator

SEED = 0
SEAM = 0.1  # standard deviation of the tone that is added to a patch, on the scale [-1, 1]
NOISE = 0.1

Defect = Callable[[Tensor, int, torch.Generator], Tensor]


def _halves(images: Tensor, N: int, random: torch.Generator) -> Tensor:
    half = images.shape[3] // 2
    return torch.cat([images[..., :half], images.roll(1, 0)[..., half:]], dim=3)


def _patches_of_several(images: Tensor, N: int, random: torch.Generator) -> Tensor:
    patches = _split(images, N)  # (N*N, b, c, h, w)
    return _merge(torch.stack([patch.roll(number, 0) for number, patch in enumerate(patches)]), N)


def _shuffled(images: Tensor, N: int, random: torch.Generator) -> Tensor:
    return _merge(_split(images, N)[torch.randperm(N * N, generator=random)], N)


def _seams(images: Tensor, N: int, random: torch.Generator) -> Tensor:
    patches = _split(images, N)
    return _merge(patches + SEAM * torch.randn(*patches.shape[:2], 1, 1, 1, generator=random), N).clamp(-1, 1)


def _blurred(images: Tensor, N: int, random: torch.Generator) -> Tensor:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def _noisy(images: Tensor, N: int, random: torch.Generator) -> Tensor:
    return (images + NOISE * torch.randn(images.shape, generator=random)).clamp(-1, 1)


DEFECTS: dict[str, Defect] = {
    "halves of two people": _halves,
    "each patch of another person": _patches_of_several,
    "patches shuffled": _shuffled,
    f"patches lighter or darker by {SEAM:g}": _seams,
    "blurred, 3 x 3": _blurred,
    f"noise of {NOISE:g}": _noisy,
}


def control_name(defect: str) -> str:
    """The name of the result of real faces with a defect."""
    return "control-" + re.sub(r"[^a-z0-9.]+", "-", defect)


def spoil(images: Tensor, defect: str, N: int) -> Tensor:
    """Images (b, c, H, W) in [-1, 1] with a defect of `DEFECTS`, on the grid of N x N patches; always the same."""
    return DEFECTS[defect](images, N, generator(SEED, Purpose.SPOIL))


def _split(images: Tensor, N: int) -> Tensor:
    return rearrange(images, "b c (i h) (j w) -> (i j) b c h w", i=N, j=N)


def _merge(patches: Tensor, N: int) -> Tensor:
    return rearrange(patches, "(i j) b c h w -> b c (i h) (j w)", i=N, j=N)
