"""Cutting images into patches, and what each patch is told of the whole (Sec. 3.1 and 3.2 of the paper).

Pure functions of tensors; the network never sees a whole image, only what these return.

Shapes: `b` images, `n` patches in the pass, `c` channels, `H W` image, `h w` patch, `N` patches a side.
Patches are patch-major: row `s * b + k` of a batch of patches is patch `s` (row-major in the picture) of image `k`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from patch_based_ddpm.errors import InputError


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


def one_hot_positions(indices: Tensor, patch_divider: int) -> Tensor:
    """Tell each patch where it lies.

    Args:
        indices: (n,) int64, the patch's number in [0, N*N), counted row by row.
        patch_divider: N.

    Returns:
        (n, N*N) float32, a one at the patch's number.
    """
    return F.one_hot(indices, patch_divider**2).float()


def global_content(images: Tensor, patch_divider: int) -> Tensor:
    """Global Content Conditioning: the image average-pooled to the size of a patch.

    Args:
        images: (b, c, H, W).
        patch_divider: N; each value is the mean of an N x N block.

    Returns:
        (b, c, h, w), the same for every patch of the image.
    """
    return reduce(images, "b c (h u) (w v) -> b c h w", "mean", u=patch_divider, v=patch_divider)


class PatchBatch(NamedTuple):
    """The network's inputs for `n` patches that are denoised in one forward pass.

    Attributes:
        patches: (n, c, h, w) noisy patches.
        content: (n, c, h, w) global content of the image that each patch belongs to.
        position: (n, N*N) one-hot.
        t: (n,) int64 timestep of the image that each patch belongs to.
    """

    patches: Tensor
    content: Tensor
    position: Tensor
    t: Tensor


def patch_batches(x_t: Tensor, t: Tensor, patch_divider: int, patch_batch_size: int | None) -> Iterator[PatchBatch]:
    """Walk through all patches of noisy images, a few at a time, in patch-major order.

    Args:
        x_t: (b, c, H, W) noisy images.
        t: (b,) int64 timesteps.
        patch_divider: N.
        patch_batch_size: patches per batch, counted over all images; the last batch may hold fewer. None: all at once.

    Yields:
        Batches whose patches, joined, are `split(x_t, N)`.

    Raises:
        InputError: `patch_batch_size` is less than 1.
    """
    if patch_batch_size is not None and patch_batch_size < 1:
        raise InputError(
            f"patch_batch_size is {patch_batch_size}; it must be at least 1, or None for all patches at once."
        )
    images = x_t.shape[0]
    patches = split(x_t, patch_divider)  # (N*N*b, c, h, w)
    content = global_content(x_t, patch_divider)  # (b, c, h, w)
    total = patches.shape[0]
    size = patch_batch_size or total
    for start in range(0, total, size):
        rows = torch.arange(start, min(start + size, total), device=x_t.device)
        yield PatchBatch(
            patches=patches[start : start + size],
            content=content[rows % images],
            position=one_hot_positions(rows // images, patch_divider),
            t=t[rows % images],
        )
