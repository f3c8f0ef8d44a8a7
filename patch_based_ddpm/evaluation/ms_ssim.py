"""MS-SSIM, the multi-scale structural similarity of two images: 1 where they are equal, low between diverse images.

Shapes: `b` pairs of images, `c` channels, `H W` image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first; Wang et al. 2003, Sec. 4.2
KERNEL, SIGMA = 11, 1.5
SMALLEST_SCALE = 8  # pixels of the shorter side at the coarsest scale; from 128 pixels all five scales are used
C_1, C_2 = 0.01**2, 0.03**2  # for values in [0, 1]


def separable_filter(images: Tensor, taps: Sequence[float]) -> Tensor:
    """Filter rows and columns with the same n symmetric taps, without padding: (b, c, H, W) -> (b, c, H - n + 1, ...).

    A sum of shifted images, because a convolution on a GPU may round to TensorFloat-32, too coarse for differences.
    """
    for dim in (2, 3):
        length = images.shape[dim] - len(taps) + 1
        images = sum(tap * images.narrow(dim, start, length) for start, tap in enumerate(taps))
    return images


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Compare images pair by pair: luminance at the coarsest scale, contrast and structure at every scale.

    MS-SSIM = l_M^{w_M} prod_j cs_j^{w_j}, with l_j and cs_j the means over pixels and channels. Images of 16 to 127
    pixels have fewer than five scales, whose weights are scaled to the sum 1. A negative cs_j counts as 0.

    Args:
        a: (b, c, H, W) in [-1, 1], each side 16 pixels or more.
        b: the other image of each pair.

    Returns:
        (b,) float32 in [0, 1].

    Source: Wang, Simoncelli and Bovik 2003, "Multiscale structural similarity", eq. 7; Gaussian kernel of 11 x 11
    pixels, sigma 1.5, both smaller at a scale that is smaller than the kernel.
    """
    weights = [weight for scale, weight in enumerate(WEIGHTS) if min(a.shape[2:]) >> scale >= SMALLEST_SCALE]
    a, b = (a.float() + 1) / 2, (b.float() + 1) / 2
    similarity = 1
    for weight in weights:
        luminance, structure = _ssim(a, b)
        similarity = similarity * structure.clamp(min=0) ** (weight / sum(weights))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return similarity * luminance ** (weight / sum(weights))


def _ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure: (b,) each, means over channels and the kernel's positions."""
    side = min(a.shape[2:])
    size = min(KERNEL, side - 1 + side % 2)  # odd
    kernel = torch.signal.windows.gaussian(size, std=SIGMA * size / KERNEL, dtype=torch.float64)
    kernel = (kernel / kernel.sum()).tolist()
    mean_a, mean_b, square_a, square_b, product = (separable_filter(x, kernel) for x in (a, b, a * a, b * b, a * b))
    variance_a, variance_b, covariance = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C_1) / (mean_a**2 + mean_b**2 + C_1)
    structure = (2 * covariance + C_2) / (variance_a + variance_b + C_2)
    return luminance.mean((1, 2, 3)), structure.mean((1, 2, 3))
