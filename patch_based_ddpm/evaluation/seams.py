"""Seams: do neighbouring pixels differ more across a border between patches than elsewhere?

Shapes: `b` images, `c` channels, `H W` image, `h w` patch, `N` patches a side.
"""

import torch
from torch import Tensor

Profile = tuple[Tensor, Tensor]  # mean absolute differences between neighbouring rows (H - 1,) and columns (W - 1,)


def profiles(images: Tensor) -> Profile:
    """The profile of each image (b, c, H, W), in float64: (b, H - 1) and (b, W - 1); that of a set is their mean."""
    images = images.double()
    return images.diff(dim=2).abs().mean((1, 3)), images.diff(dim=3).abs().mean((1, 2))


def contrast(profile: Profile, patch_divider: int, *, shifted: bool = False) -> float:
    """Mean absolute difference of the pixel pairs across the borders between patches, over that of all other pairs.

    Args:
        profile: of one image or of a set.
        patch_divider: N; divides H and W.
        shifted: move the grid by half a patch, to where no border is: the control.

    Returns:
        The ratio; NaN where one kind of pair is missing, or all other pairs are equal.
    """
    sums, pairs = [0.0, 0.0], [0, 0]  # elsewhere, across a border
    for differences, others in (profile, profile[::-1]):
        length, side = len(others) + 1, (len(differences) + 1) // patch_divider
        second = torch.arange(1, len(differences) + 1) - (side // 2 if shifted else 0)  # the second pixel of each pair
        border = second % side == 0
        for kind, chosen in enumerate((~border, border)):
            sums[kind] += float(differences[chosen].sum()) * length
            pairs[kind] += int(chosen.sum()) * length
    if not pairs[1] or sums[0] == 0:
        return float("nan")
    return (sums[1] / pairs[1]) / (sums[0] / pairs[0])
