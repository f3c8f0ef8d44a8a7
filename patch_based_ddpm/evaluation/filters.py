"""Separable filters, in plain sums: a convolution on a GPU may round to TensorFloat-32, too coarse for differences.

Shapes: `b` images, `c` channels, `H W` image.
"""

from collections.abc import Sequence

from torch import Tensor


def separable(images: Tensor, taps: Sequence[float]) -> Tensor:
    """Weigh neighbours by the same taps down and across, without padding.

    Args:
        images: (b, c, H, W).
        taps: n of them, symmetric, from top to bottom and from left to right.

    Returns:
        (b, c, H - n + 1, W - n + 1).
    """
    for dim in (2, 3):
        length = images.shape[dim] - len(taps) + 1
        images = sum(tap * images.narrow(dim, start, length) for start, tap in enumerate(taps))
    return images
