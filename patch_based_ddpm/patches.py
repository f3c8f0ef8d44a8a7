"""Cutting images into patches, and what each patch is told of the whole (Sec. 3.1 and 3.2 of the paper).

Pure functions of tensors; the network never sees a whole image, only what these return.

Shapes: `b` images, `n` patches in the pass, `c` channels, `H W` image, `h w` patch, `N` patches a side.
Patches are patch-major: row `s * b + k` of a batch of patches is patch `s` (row-major in the picture) of image `k`.
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


def take(images: Tensor, patch_divider: int, rows: Tensor) -> Tensor:
    """Copy some patches out of images: `split(images, N)[rows]`, without cutting up the rest.

    Args:
        images: (b, c, H, W); N divides H and W.
        patch_divider: N.
        rows: (n,) int64, numbers of patches in patch-major order, in [0, N*N*b).

    Returns:
        (n, c, h, w).
    """
    return _by_patch(images, patch_divider)[_places(rows, len(images), patch_divider)]


def put(images: Tensor, patch_divider: int, rows: Tensor, patches: Tensor) -> None:
    """Write patches into images, where `take` would find them.

    Args:
        images: (b, c, H, W), changed in place; N divides H and W.
        patch_divider: N.
        rows: (n,) int64, as in `take`.
        patches: (n, c, h, w).
    """
    _by_patch(images, patch_divider)[_places(rows, len(images), patch_divider)] = patches


def _by_patch(images: Tensor, patch_divider: int) -> Tensor:
    return rearrange(images, "b c (i h) (j w) -> i j b c h w", i=patch_divider, j=patch_divider)


def _places(rows: Tensor, images: int, patch_divider: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = rows // images
    return numbers // patch_divider, numbers % patch_divider, rows % images


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


def patch_batch(x_t: Tensor, content: Tensor, t: Tensor, patch_divider: int, rows: Tensor) -> PatchBatch:
    """Gather the network's inputs for some patches of noisy images.

    Args:
        x_t: (b, c, H, W) noisy images.
        content: (b, c, h, w) their global content.
        t: (b,) int64 timesteps.
        patch_divider: N.
        rows: (n,) int64, numbers of patches in patch-major order, in [0, N*N*b).
    """
    of_image = rows % len(x_t)
    return PatchBatch(
        patches=take(x_t, patch_divider, rows),
        content=content[of_image],
        position=one_hot_positions(rows // len(x_t), patch_divider),
        t=t[of_image],
    )
