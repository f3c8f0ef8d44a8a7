"""Cuts images into patches and builds the conditioning of each patch (Sec. 3.1 and 3.2 of the paper).

Shapes: `b` images, `n` patches in the pass, `c` channels, `H W` image, `h w` patch, `N` patches a side, `k` halo.
N divides H and W. A haloed patch has `k` more pixels of the image on every side: (h + 2k) x (w + 2k).
`patch_indices` are (n,) int64 in [0, N*N*b), patch-major: `s * b + i` is patch `s` (row-major) of image `i`.
"""

from typing import NamedTuple

from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F


def pad(images: Tensor, halo: int) -> Tensor:
    """Pad images (b, c, H, W) with zeros to (b, c, H + 2k, W + 2k), so that haloed patches at the edges are complete.

    For k = 0 it returns the images themselves, not a copy.
    """
    return F.pad(images, (halo, halo, halo, halo)) if halo else images


def gather(images: Tensor, patch_divider: int, patch_indices: Tensor, halo: int = 0) -> Tensor:
    """Copy haloed patches (n, c, h + 2k, w + 2k) out of images (b, c, H + 2k, W + 2k), padded by `pad`."""
    height, width = ((side - 2 * halo) // patch_divider for side in images.shape[2:])
    haloed = images.unfold(2, height + 2 * halo, height).unfold(3, width + 2 * halo, width)  # a view
    return rearrange(haloed, "b c i j h w -> i j b c h w")[_locate(patch_indices, len(images), patch_divider)]


def scatter(images: Tensor, patch_divider: int, patch_indices: Tensor, patches: Tensor) -> None:
    """Write patches (n, c, h, w) into images (b, c, H, W), in place: the inverse of `gather` with k = 0."""
    by_patch = rearrange(images, "b c (i h) (j w) -> i j b c h w", i=patch_divider, j=patch_divider)
    by_patch[_locate(patch_indices, len(images), patch_divider)] = patches


def _locate(patch_indices: Tensor, images: int, patch_divider: int) -> tuple[Tensor, Tensor, Tensor]:
    """The row, the column and the image of each patch."""
    positions = patch_indices // images
    return positions // patch_divider, positions % patch_divider, patch_indices % images


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
        position: (n, N*N) one-hot.
        t: (n,) int64 timestep of each patch's image.
    """

    patches: Tensor
    content: Tensor
    position: Tensor
    t: Tensor


def patch_batch(
    x_t: Tensor, content: Tensor, t: Tensor, patch_divider: int, patch_indices: Tensor, halo: int = 0
) -> PatchBatch:
    """Gather the inputs of some patches.

    Args:
        x_t: (b, c, H + 2k, W + 2k) noisy images, padded by `pad`.
        content: (b, c, h + 2k, w + 2k) their global content.
        t: (b,) int64 timesteps.
        patch_divider: N.
        patch_indices: (n,).
        halo: k.
    """
    images = patch_indices % len(x_t)
    return PatchBatch(
        patches=gather(x_t, patch_divider, patch_indices, halo),
        content=content[images],
        position=F.one_hot(patch_indices // len(x_t), patch_divider**2).float(),
        t=t[images],
    )
