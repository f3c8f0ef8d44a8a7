"""Drawn faces as tensors, whole and cut up."""

import numpy as np
import torch
from einops import rearrange

from patch_based_ddpm.data.faces import Face, attributes, draw


def images(faces: list[Face], height: int, width: int) -> torch.Tensor:
    drawn = torch.from_numpy(np.stack([draw(face, height, width) for face in faces]))
    return rearrange(drawn, "b h w c -> b c h w") / 127.5 - 1


def crowd(count: int, seed: int = 0) -> list[Face]:
    return [attributes(index, seed) for index in range(count)]


def mixed(parts: list[torch.Tensor], patches: int) -> torch.Tensor:
    """Patch (row, column) of the result comes from `parts[(row * patches + column) % len(parts)]`."""
    split = [rearrange(part, "b c (i h) (j w) -> i j b c h w", i=patches, j=patches) for part in parts]
    cells = [split[(i * patches + j) % len(parts)][i, j] for i in range(patches) for j in range(patches)]
    return rearrange(cells, "(i j) b c h w -> b c (i h) (j w)", i=patches)
