"""Seams: do neighbouring pixels differ more across a border between patches than elsewhere?

Shapes: `b` images, `c` channels, `H W` image, `h w` patch, `N` patches a side.
"""

import math

import torch
from torch import Tensor

Profile = tuple[Tensor, Tensor]  # mean absolute differences between neighbouring rows (H - 1,) and columns (W - 1,)


def profiles(images: Tensor) -> Profile:
    """The profile of each image (b, c, H, W), in float64: (b, H - 1) and (b, W - 1); that of a set is their mean."""
    images = images.double()
    return images.diff(dim=2).abs().mean((1, 3)), images.diff(dim=3).abs().mean((1, 2))


def contrast(profile: Profile, patch_divider: int, *, offset: float = 0) -> float:
    """Mean absolute difference of the pixel pairs across the borders between patches, over that of all other pairs.

    Args:
        profile: of one image or of a set.
        patch_divider: N; divides H and W.
        offset: moves the grid by this part of a patch, in [0, 1), to where no border of the model is.

    Returns:
        The ratio; NaN where one kind of pair is missing, or all other pairs are equal.
    """
    sums, pairs = [0.0, 0.0], [0, 0]  # elsewhere, across a border
    for differences, others in (profile, profile[::-1]):
        length, side = len(others) + 1, (len(differences) + 1) // patch_divider
        second = torch.arange(1, len(differences) + 1) - int(offset * side)  # the second pixel of each pair
        border = second % side == 0
        for kind, chosen in enumerate((~border, border)):
            sums[kind] += float(differences[chosen].sum()) * length
            pairs[kind] += int(chosen.sum()) * length
    if not pairs[1] or sums[0] == 0:
        return float("nan")
    return (sums[1] / pairs[1]) / (sums[0] / pairs[0])


def worst_ratio(samples: Profile, real: Profile, patch_divider: int) -> float:
    """The largest seam ratio of all phases of the grid: a seam counts wherever it is.

    Args:
        samples: the profile of generated images.
        real: that of real ones.
        patch_divider: N; the grid of N x N patches is moved pixel by pixel.

    Returns:
        The largest ratio of the samples' contrast to the real images' one; NaN if one cannot be computed.
    """
    phases = max((len(differences) + 1) // patch_divider for differences in samples)
    ratios = []
    for phase in range(phases):
        found, wanted = (contrast(one, patch_divider, offset=phase / phases) for one in (samples, real))
        ratios.append(found / wanted if wanted else math.nan)
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)
