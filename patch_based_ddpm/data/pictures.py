"""Images in [-1, 1] -> uint8 pictures, grids of them, and PNG files."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from patch_based_ddpm.data.dataset import to_uint8
from patch_based_ddpm.files import atomic_write

GAP = 2  # pixels between the pictures of a grid


def pixels(image: Tensor) -> np.ndarray:
    """One image (c, H, W) in [-1, 1] as uint8: (H, W, c), or (H, W) when it is grey."""
    array = rearrange(to_uint8(image), "c h w -> h w c").cpu().numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def tile(images: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Arrange uint8 pictures, all (H, W) or all (H, W, c), in a grid with white lines around and between them.

    The default is about as many columns as rows. Unlike torchvision's `make_grid`, grey pictures stay grey and a single
    picture has lines around it.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    channels = [(0, 0)] * (images[0].ndim - 2)
    blanks = -len(images) % columns
    cells = np.pad(np.stack(images), [(0, blanks), (GAP, 0), (GAP, 0), *channels], constant_values=255)
    grid = rearrange(cells, "(rows columns) h w ... -> (rows h) (columns w) ...", columns=columns)
    return np.pad(grid, [(0, GAP), (0, GAP), *channels], constant_values=255)


def enlarge(picture: np.ndarray, times: int) -> np.ndarray:
    """Show each pixel of an (H, W) or (H, W, c) picture as a square of `times` pixels a side."""
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a uint8 picture, (H, W), (H, W, 3) or (H, W, 4), whole or not at all. Raises OSError."""
    with atomic_write(path, shared=True) as file:
        Image.fromarray(picture).save(file, format="PNG")
