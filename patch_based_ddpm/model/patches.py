"""Cuts images into patches and builds the conditioning of each patch (Sec. 3.1 and 3.2 of the paper).

Pure functions of tensors. Their results are the only inputs of the network.

Shapes: `b` images, `n` patches in the pass, `c` channels, `H W` image, `h w` patch, `N` patches a side, `k` halo.
A haloed patch has `k` more pixels of the image on every side: (h + 2k) x (w + 2k).
Batches of patches are patch-major: index `s * b + i` is patch `s` (row-major in the image) of image `i`.
"""

from typing import NamedTuple

from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F


def split(images: Tensor, patch_divider: int) -> Tensor:
    """Cut images into N x N patches.

    Args:
        images: (b, c, H, W); N divides H and W.
        patch_divider: N.

    Returns:
        (N*N*b, c, h, w), patch-major.
    """
    return rearrange(images, "b c (i h) (j w) -> (i j b) c h w", i=patch_divider, j=patch_divider)


def merge(patches: Tensor, patch_divider: int) -> Tensor:
    """Join patches to images: the inverse of `split`.

    Args:
        patches: (N*N*b, c, h, w), patch-major.
        patch_divider: N.

    Returns:
        (b, c, H, W).
    """
    return rearrange(patches, "(i j b) c h w -> b c (i h) (j w)", i=patch_divider, j=patch_divider)


def pad(images: Tensor, halo: int) -> Tensor:
    """Pad images with zeros, so that haloed patches at their edges are complete.

    Args:
        images: (b, c, H, W).
        halo: k.

    Returns:
        (b, c, H + 2k, W + 2k); for k = 0 the images themselves, not a copy.
    """
    return F.pad(images, (halo, halo, halo, halo)) if halo else images


def gather(images: Tensor, patch_divider: int, patch_indices: Tensor, halo: int = 0) -> Tensor:
    """Copy some haloed patches out of images. For k = 0 it equals `split(images, N)[patch_indices]`.

    Args:
        images: (b, c, H + 2k, W + 2k), padded by `pad`; N divides H and W.
        patch_divider: N.
        patch_indices: (n,) int64 in [0, N*N*b), patch-major.
        halo: k.

    Returns:
        (n, c, h + 2k, w + 2k).
    """
    height, width = ((side - 2 * halo) // patch_divider for side in images.shape[2:])
    haloed = images.unfold(2, height + 2 * halo, height).unfold(3, width + 2 * halo, width)  # a view
    return rearrange(haloed, "b c i j h w -> i j b c h w")[_locate(patch_indices, len(images), patch_divider)]


def scatter(images: Tensor, patch_divider: int, patch_indices: Tensor, patches: Tensor) -> None:
    """Write patches into images: the inverse of `gather`.

    Args:
        images: (b, c, H, W), changed in place; N divides H and W.
        patch_divider: N.
        patch_indices: (n,) int64, as in `gather`.
        patches: (n, c, h, w).
    """
    by_patch = rearrange(images, "b c (i h) (j w) -> i j b c h w", i=patch_divider, j=patch_divider)
    by_patch[_locate(patch_indices, len(images), patch_divider)] = patches


def crop(patches: Tensor, halo: int) -> Tensor:
    """Remove the halo: a view (n, c, h, w) of patches (n, c, h + 2k, w + 2k)."""
    return patches[..., halo : patches.shape[-2] - halo, halo : patches.shape[-1] - halo]


def _locate(patch_indices: Tensor, images: int, patch_divider: int) -> tuple[Tensor, Tensor, Tensor]:
    positions = patch_indices // images
    return positions // patch_divider, positions % patch_divider, patch_indices % images


def one_hot_positions(indices: Tensor, patch_divider: int) -> Tensor:
    """Encode the position of each patch.

    Args:
        indices: (n,) int64 in [0, N*N), row-major.
        patch_divider: N.

    Returns:
        (n, N*N) float32, one-hot.
    """
    return F.one_hot(indices, patch_divider**2).float()


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
    """The inputs of one forward pass.

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
        patch_indices: (n,) int64 in [0, N*N*b), patch-major.
        halo: k.
    """
    image_indices = patch_indices % len(x_t)
    return PatchBatch(
        patches=gather(x_t, patch_divider, patch_indices, halo),
        content=content[image_indices],
        position=one_hot_positions(patch_indices // len(x_t), patch_divider),
        t=t[image_indices],
    )
