"""Cuts images into patches and builds the conditioning of each patch (Sec. 3.1 and 3.2 of the paper).

Shapes: `b` images, `n` patches in the pass, `c` channels, `H W` image, `h w` patch, `N` patches a side, `k` halo,
`G` grids. N divides H and W. A haloed patch has `k` more pixels of the image on every side: (h + 2k) x (w + 2k).
`patch_indices` are (n,) int64 in [0, N*N*b), patch-major: `s * b + i` is patch `s` (row-major) of image `i`.
`grid` is (b,) int64 in [0, G), the grid of each image; None: 0 for all. Grid 0 is the paper's, and its patches end at
the image's edges. The others are moved by half a patch, see `SHIFTS`, and go on at the opposite edge, so that every
grid has N x N patches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

# Whether each grid is moved by half a patch: down, and to the right.
SHIFTS = ((False, False), (True, True), (True, False), (False, True))


def pad(images: Tensor, halo: int) -> Tensor:
    """Pad images (b, c, H, W) with zeros to (b, c, H + 2k, W + 2k), so that haloed patches at the edges are complete.

    For k = 0 it returns the images themselves, not a copy.
    """
    return F.pad(images, (halo, halo, halo, halo)) if halo else images


def gather(
    images: Tensor, patch_divider: int, patch_indices: Tensor, halo: int = 0, grid: Tensor | None = None
) -> Tensor:
    """Copy haloed patches (n, c, h + 2k, w + 2k) out of images (b, c, H + 2k, W + 2k), padded by `pad`."""
    image, rows, columns = _pixels(images, patch_divider, patch_indices, halo, grid)
    return rearrange(images[image, :, rows, columns], "n h w c -> n c h w")


def scatter(
    images: Tensor,
    patch_divider: int,
    patch_indices: Tensor,
    patches: Tensor,
    grid: Tensor | None = None,
    *,
    add: bool = False,
) -> None:
    """Write or add patches (n, c, h, w) to images (b, c, H, W), in place: the inverse of `gather` with k = 0."""
    pixels = _pixels(images, patch_divider, patch_indices, 0, grid)
    pixels = (pixels[0], slice(None), *pixels[1:])
    values = rearrange(patches, "n c h w -> n h w c")
    # Not `accumulate=True`, which would count a patch twice that a padded pass repeats.
    images[pixels] = images[pixels] + values if add else values


def _pixels(
    images: Tensor, patch_divider: int, patch_indices: Tensor, halo: int, grid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The image (n, 1, 1), the rows (n, h + 2k, 1) and the columns (n, 1, w + 2k) of each patch in padded images."""
    positions, image = patch_indices // len(images), patch_indices % len(images)
    places = (positions // patch_divider, positions % patch_divider)
    rows, columns = (
        _span(place, side - 2 * halo, patch_divider, halo, None if grid is None else _is_shifted(grid[image], axis))
        for axis, (place, side) in enumerate(zip(places, images.shape[2:], strict=True))
    )
    return image[:, None, None], rows[:, :, None], columns[:, None, :]


def _is_shifted(grids: Tensor, axis: int) -> Tensor:
    """Whether each of some grids (n,) is shifted: (n,) bool. No values are copied to the device, which would wait."""
    return torch.stack([grids == number for number, shifts in enumerate(SHIFTS) if shifts[axis]]).any(0)


def _span(place: Tensor, side: int, patch_divider: int, halo: int, shifted: Tensor | None) -> Tensor:
    """Coordinates in a padded axis of `side` pixels, (n, h + 2k), of patches at `place`, `shifted` (None: none is)."""
    length = side // patch_divider
    first = (place * length)[:, None]  # (n, 1)
    span = first + torch.arange(length + 2 * halo, device=place.device)  # (n, h + 2k)
    if shifted is None:
        return span
    return torch.where(shifted[:, None], (span + length // 2 - halo) % side + halo, span)


def inherited_positions(patch_divider: int, saved: int, wanted: int) -> Tensor:
    """How the positions of a model with `wanted` grids follow from those of one with `saved`: (saved N^2, wanted N^2).

    Each column adds up to 1. A patch of a new grid is the mean of the patches of grid 0 that it overlaps.
    """
    patches = torch.eye(patch_divider**2).unflatten(1, (patch_divider, patch_divider))  # (N^2, N, N)
    columns = []
    for number in range(wanted):
        if number < saved:
            columns.append(torch.eye(saved * patch_divider**2)[:, number * patch_divider**2 :][:, : patch_divider**2])
            continue
        mean = patches
        for axis, shifted in enumerate(SHIFTS[number], 1):
            mean = (mean + mean.roll(-1, axis)) / 2 if shifted else mean
        columns.append(F.pad(mean.flatten(1), (0, 0, 0, (saved - 1) * patch_divider**2)))
    return torch.cat(columns, dim=1)


def blend_weights(height: int, width: int, grids: Sequence[int], device: torch.device) -> Tensor:
    """The weight of the prediction of each of some grids, at the pixels of its own patches: (len(grids), h, w).

    It is the squared distance from the nearest border of the patch, divided by the sum over the grids at that pixel.
    So the weights of all grids at a pixel add up to 1, and across a border of one grid another one decides.
    """
    squares = []
    for number in grids:
        distances = []
        for side, shifted in zip((height, width), SHIFTS[number]):
            place = (torch.arange(side, device=device) - shifted * (side // 2)) % side + 0.5
            distances.append(torch.minimum(place, side - place))
        squares.append(torch.minimum(distances[0][:, None], distances[1]) ** 2)
    weights = torch.stack(squares) / torch.stack(squares).sum(0)  # at the pixels of the patches of grid 0
    for i, number in enumerate(grids):
        down, right = SHIFTS[number]
        weights[i] = weights[i].roll((-down * (height // 2), -right * (width // 2)), (0, 1))
    return weights


def crop(patches: Tensor, halo: int) -> Tensor:
    """Remove the halo: a view (n, c, h, w) of patches (n, c, h + 2k, w + 2k)."""
    return patches[..., halo : patches.shape[-2] - halo, halo : patches.shape[-1] - halo]


def global_content(images: Tensor, patch_divider: int, halo: int = 0) -> Tensor:
    """Global Content Conditioning: the image, average-pooled to the size of a haloed patch.

    Args:
        images: (b, c, H, W), not padded.
        patch_divider: N; for k = 0 each value is the mean of an N x N block.
        halo: k; for k > 0 blocks overlap by a pixel or differ in size by one.

    Returns:
        (b, c, h + 2k, w + 2k); all patches of an image share it.
    """
    if halo:
        return F.adaptive_avg_pool2d(images, tuple(side // patch_divider + 2 * halo for side in images.shape[2:]))
    return reduce(images, "b c (h u) (w v) -> b c h w", "mean", u=patch_divider, v=patch_divider)


class PatchBatch(NamedTuple):
    """The inputs of one forward pass: the arguments of `UNet.forward`.

    Attributes:
        patches: (n, c, h + 2k, w + 2k) noisy patches, haloed.
        content: (n, c, h + 2k, w + 2k) global content of each patch's image.
        position: (n, G*N*N) one-hot.
        t: (n,) int64 timestep of each patch's image.
    """

    patches: Tensor
    content: Tensor
    position: Tensor
    t: Tensor


def patch_batch(
    x_t: Tensor,
    content: Tensor,
    t: Tensor,
    patch_divider: int,
    patch_indices: Tensor,
    halo: int = 0,
    grid: Tensor | None = None,
    grids: int = 1,
) -> PatchBatch:
    """Gather the inputs of some patches.

    Args:
        x_t: (b, c, H + 2k, W + 2k) noisy images, padded by `pad`.
        content: (b, c, h + 2k, w + 2k) their global content.
        t: (b,) int64 timesteps.
        patch_divider: N.
        patch_indices: (n,).
        halo: k.
        grid: (b,).
        grids: G; every patch of every grid has a position of its own.
    """
    images, positions = patch_indices % len(x_t), patch_indices // len(x_t)
    if grid is not None:
        positions = positions + patch_divider**2 * grid[images]
    return PatchBatch(
        patches=gather(x_t, patch_divider, patch_indices, halo, grid),
        content=content[images],
        position=F.one_hot(positions, grids * patch_divider**2).float(),
        t=t[images],
    )
