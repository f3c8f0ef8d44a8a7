"""Seams: do neighbouring pixels differ more across a border between patches than elsewhere?

Shapes: `b` images, `c` channels, `H W` image, `h w` patch, `N` patches a side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from patch_based_ddpm.errors import InputError


class Profile(NamedTuple):
    """How much neighbouring pixels differ at each place, of one image or on average over many.

    Attributes:
        rows: (H - 1,) float64, mean absolute difference between row i and row i + 1.
        columns: (W - 1,) float64, the same between columns.
    """

    rows: Tensor
    columns: Tensor


def profiles(images: Tensor) -> Profile:
    """Take the profile of each image; the mean over a set, whatever N is, says all that `contrast` asks for.

    Args:
        images: (b, c, H, W).

    Returns:
        Rows (b, H - 1) and columns (b, W - 1).
    """
    images = images.double()
    return Profile(images.diff(dim=2).abs().mean((1, 3)), images.diff(dim=3).abs().mean((1, 2)))


def contrast(profile: Profile, patch_divider: int, *, shifted: bool = False) -> float:
    """Mean absolute difference of pixel pairs that straddle a border between patches, over that of all other pairs.

    Args:
        profile: of one image or of a set.
        patch_divider: N, at least 2; divides H and W.
        shifted: take the grid half a patch further right and down, where no border is: the control.

    Returns:
        The ratio; NaN where there is no pair of one kind, or no difference between any pixels.

    Raises:
        InputError: N does not divide both sides.
    """
    height, width = len(profile.rows) + 1, len(profile.columns) + 1
    if height % patch_divider or width % patch_divider:
        raise InputError(f"the patch divider is {patch_divider}; it must divide both sides, {height} and {width}.")
    across = elsewhere = 0.0
    pairs_across = pairs_elsewhere = 0
    for differences, length in ((profile.rows, width), (profile.columns, height)):
        side = (len(differences) + 1) // patch_divider
        after = torch.arange(1, len(differences) + 1) - (side // 2 if shifted else 0)  # the pixel behind each gap
        border = after % side == 0
        across += float(differences[border].sum()) * length
        elsewhere += float(differences[~border].sum()) * length
        pairs_across += int(border.sum()) * length
        pairs_elsewhere += int((~border).sum()) * length
    if not pairs_across or elsewhere == 0:
        return float("nan")
    return (across / pairs_across) / (elsewhere / pairs_elsewhere)
