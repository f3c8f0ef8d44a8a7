"""Multi-scale structural similarity of two images: 1 when they are equal. Low between random samples: they are diverse.

Shapes: `b` pairs, `c` channels, `H W` image.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation.filters import separable

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first; Wang et al. 2003, Sec. 4.2
WINDOW, SIGMA = 11, 1.5
SMALLEST_SCALE = 8  # pixels of the shorter side of the coarsest level; at 128 pixels all five scales are used
SMALLEST_IMAGE = 16
C_1, C_2 = 0.01**2, 0.03**2  # for values in [0, 1]


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Compare images pair by pair: luminance at the coarsest scale, contrast and structure at all of them.

    MS-SSIM = l_M^{w_M} prod_j cs_j^{w_j}, with l_j and cs_j the means over pixels and channels. An image from 16 to 127
    pixels has fewer scales than five; their weights are scaled to the sum 1. A negative cs_j counts as 0.

    Args:
        a: (b, c, H, W) in [-1, 1], each side 16 pixels or more.
        b: the other image of each pair.

    Returns:
        (b,) float32 in [0, 1].

    Raises:
        InputError: the images are too small.

    Source: Wang, Simoncelli and Bovik 2003, "Multiscale structural similarity", eq. 7; window 11 x 11, sigma 1.5,
    which shrinks with a level that is smaller.
    """
    side = min(a.shape[2:])
    if side < SMALLEST_IMAGE:
        raise InputError(
            f"the images are {a.shape[2]} x {a.shape[3]} pixels; each side must be {SMALLEST_IMAGE} or more."
        )
    scales = sum(side >> scale >= SMALLEST_SCALE for scale in range(len(WEIGHTS)))
    total = sum(WEIGHTS[:scales])
    a, b = (a.float() + 1) / 2, (b.float() + 1) / 2
    similarity = torch.ones(len(a), device=a.device)
    for scale, weight in enumerate(WEIGHTS[:scales]):
        if scale > 0:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        luminance, structure = _ssim(a, b)
        similarity = similarity * structure.clamp(min=0) ** (weight / total)
    return similarity * luminance ** (weight / total)


def _ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure: (b,) each, means over the windows that lie inside the image."""
    largest = min(a.shape[2:])
    size = min(WINDOW, largest - 1 + largest % 2)  # odd
    window = _gaussian(size, SIGMA * size / WINDOW)
    mean_a, mean_b = separable(a, window), separable(b, window)
    variance_a, variance_b = separable(a * a, window) - mean_a**2, separable(b * b, window) - mean_b**2
    covariance = separable(a * b, window) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C_1) / (mean_a**2 + mean_b**2 + C_1)
    structure = (2 * covariance + C_2) / (variance_a + variance_b + C_2)
    return luminance.mean((1, 2, 3)), structure.mean((1, 2, 3))


def _gaussian(size: int, sigma: float) -> list[float]:
    values = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [value / sum(values) for value in values]
