"""Cutting images into patches, and what each patch is told of the whole (Sec. 3.1 and 3.2 of the paper).

Pure functions of tensors; the network never sees a whole image, only what these return.

Shapes: `b` images, `n` patches in the pass, `c` channels, `H W` image, `h w` patch, `N` patches a side, `k` halo.
A window is a patch with `k` pixels of the image on every side, (h + 2k) x (w + 2k); where `k` is 0 it is the patch.
Patches are patch-major: row `s * b + i` of a batch of patches is patch `s` (row-major in the picture) of image `i`.
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
    """Put patches back together: the inverse of `split`.

    Args:
        patches: (N*N*b, c, h, w), patch-major.
        patch_divider: N.

    Returns:
        (b, c, H, W).
    """
    return rearrange(patches, "(i j b) c h w -> b c (i h) (j w)", i=patch_divider, j=patch_divider)


def pad(images: Tensor, halo: int) -> Tensor:
    """Surround images with zeros, so that the windows at their edges are whole.

    Args:
        images: (b, c, H, W).
        halo: k.

    Returns:
        (b, c, H + 2k, W + 2k); the images themselves where k is 0.
    """
    return F.pad(images, (halo, halo, halo, halo)) if halo else images


def gather(images: Tensor, patch_divider: int, patch_indices: Tensor, halo: int = 0) -> Tensor:
    """Copy some windows out of images: where k is 0, `split(images, N)[patch_indices]`, without cutting up the rest.

    Args:
        images: (b, c, H + 2k, W + 2k), as `pad` returns them; N divides H and W.
        patch_divider: N.
        patch_indices: (n,) int64, numbers of patches in patch-major order, in [0, N*N*b).
        halo: k.

    Returns:
        (n, c, h + 2k, w + 2k).
    """
    height, width = ((side - 2 * halo) // patch_divider for side in images.shape[2:])
    windows = images.unfold(2, height + 2 * halo, height).unfold(3, width + 2 * halo, width)  # a view
    return rearrange(windows, "b c i j h w -> i j b c h w")[_places(patch_indices, len(images), patch_divider)]


def scatter(images: Tensor, patch_divider: int, patch_indices: Tensor, patches: Tensor) -> None:
    """Write patches into images, where `gather` would find them.

    Args:
        images: (b, c, H, W), changed in place; N divides H and W.
        patch_divider: N.
        patch_indices: (n,) int64, as in `gather`.
        patches: (n, c, h, w).
    """
    by_patch = rearrange(images, "b c (i h) (j w) -> i j b c h w", i=patch_divider, j=patch_divider)
    by_patch[_places(patch_indices, len(images), patch_divider)] = patches


def crop(windows: Tensor, halo: int) -> Tensor:
    """Cut the halo off windows (n, c, h + 2k, w + 2k); returns a view, (n, c, h, w)."""
    return windows[..., halo : windows.shape[-2] - halo, halo : windows.shape[-1] - halo]


def _places(patch_indices: Tensor, images: int, patch_divider: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = patch_indices // images
    return numbers // patch_divider, numbers % patch_divider, patch_indices % images


def one_hot_positions(indices: Tensor, patch_divider: int) -> Tensor:
    """Tell each patch where it lies.

    Args:
        indices: (n,) int64, the patch's number in [0, N*N), counted row by row.
        patch_divider: N.

    Returns:
        (n, N*N) float32, a one at the patch's number.
    """
    return F.one_hot(indices, patch_divider**2).float()


def global_content(images: Tensor, patch_divider: int, halo: int = 0) -> Tensor:
    """Global Content Conditioning: the image average-pooled to the size of a window.

    Args:
        images: (b, c, H, W), without a margin.
        patch_divider: N; where k is 0 each value is the mean of an N x N block.
        halo: k; where it is more than 0, blocks overlap by a pixel or differ in size by one.

    Returns:
        (b, c, h + 2k, w + 2k), the same for every patch of the image.
    """
    if halo:
        return F.adaptive_avg_pool2d(images, tuple(side // patch_divider + 2 * halo for side in images.shape[2:]))
    return reduce(images, "b c (h u) (w v) -> b c h w", "mean", u=patch_divider, v=patch_divider)


class PatchBatch(NamedTuple):
    """The network's inputs for `n` patches that are denoised in one forward pass.

    Attributes:
        patches: (n, c, h + 2k, w + 2k) noisy patches with their halo.
        content: (n, c, h + 2k, w + 2k) global content of the image that each patch belongs to.
        position: (n, N*N) one-hot.
        t: (n,) int64 timestep of the image that each patch belongs to.
    """

    patches: Tensor
    content: Tensor
    position: Tensor
    t: Tensor


def patch_batch(
    x_t: Tensor, content: Tensor, t: Tensor, patch_divider: int, patch_indices: Tensor, halo: int = 0
) -> PatchBatch:
    """Gather the network's inputs for some patches of noisy images.

    Args:
        x_t: (b, c, H + 2k, W + 2k) noisy images with their `pad`.
        content: (b, c, h + 2k, w + 2k) their global content.
        t: (b,) int64 timesteps.
        patch_divider: N.
        patch_indices: (n,) int64, numbers of patches in patch-major order, in [0, N*N*b).
        halo: k.
    """
    of_image = patch_indices % len(x_t)
    return PatchBatch(
        patches=gather(x_t, patch_divider, patch_indices, halo),
        content=content[of_image],
        position=one_hot_positions(patch_indices // len(x_t), patch_divider),
        t=t[of_image],
    )
