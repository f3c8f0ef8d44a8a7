"""Sliced Wasserstein distance between patches of two image sets, at each level of a Laplacian pyramid.

Fine levels compare texture, coarse ones composition. After Karras et al. 2018, "Progressive Growing of GANs", Sec. 5:
patches of 7 x 7, normalised per channel, projected on 512 random directions.

Shapes: `b` images, `k` patches an image, `m` patches in all, `c` channels, `H W` image, `d` values of a patch, 49 c.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation.filters import separable
from patch_based_ddpm.randomness import Purpose, generator

PATCH = 7
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
SMALLEST_LEVEL = 16  # pixels of the shorter side
DIRECTIONS = 512
DIRECTIONS_AT_A_TIME = 64
MOST_PATCHES_AN_IMAGE = 128
MOST_PATCHES = 2**17  # of a level and set: in half precision 37 MiB of RGB
SEED = 0


def levels(height: int, width: int) -> list[tuple[int, int]]:
    """The sizes (H, W) of the pyramid's levels, the image itself first.

    Raises:
        InputError: the image is too small for a single level.
    """
    if min(height, width) < SMALLEST_LEVEL:
        raise InputError(f"the images are {height} x {width} pixels; each side must be {SMALLEST_LEVEL} or more.")
    sizes = []
    while min(height, width) >= SMALLEST_LEVEL:
        sizes.append((height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    return sizes


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Split images into bands: each level holds what the next, coarser one cannot show; the last holds the rest.

    Args:
        images: (b, c, H, W), 16 pixels a side or more.

    Returns:
        For each of `levels`, (b, c, its H, its W); added up from the coarsest, enlarged each time, they are the images.

    Source: Burt and Adelson 1983, the 5 x 5 binomial filter.
    """
    pyramid = []
    for _ in levels(*images.shape[2:])[1:]:
        smaller = _blur(images)[:, :, ::2, ::2]
        pyramid.append(images - enlarge(smaller, *images.shape[2:]))
        images = smaller
    return [*pyramid, images]


def enlarge(images: Tensor, height: int, width: int) -> Tensor:
    """Double a level: (b, c, h, w) -> (b, c, H, W), zeros between the pixels, then the filter."""
    sparse = images.new_zeros(*images.shape[:2], height, width)
    sparse[:, :, ::2, ::2] = images
    return _blur(sparse) * 4


def _blur(images: Tensor) -> Tensor:
    return separable(F.pad(images, (2, 2, 2, 2), mode="reflect"), BINOMIAL)


def patches_an_image(count: int) -> int:
    """How many patches each of `count` images gives to a level, so that their number stays bounded."""
    return max(1, min(MOST_PATCHES_AN_IMAGE, MOST_PATCHES // count))


def descriptors(images: Tensor, positions: range, count: int) -> list[Tensor]:
    """Cut random patches out of every level of the pyramid.

    Args:
        images: (b, c, H, W), 16 pixels a side or more; b is at least 1.
        positions: of the images in their set; where their patches lie depends on nothing else.
        count: images in the set.

    Returns:
        For each of `levels`, (b*k, d) float16 on the CPU.
    """
    pieces = patches_an_image(count)
    randoms = [generator(SEED, Purpose.CUT, position) for position in positions]
    image = torch.arange(len(images))[:, None, None, None]
    cut = []
    for level in laplacian_pyramid(images.float()):
        y, x = (
            torch.stack([torch.randint(side - PATCH + 1, (pieces, 1), generator=random) for random in randoms])
            + torch.arange(PATCH)
            for side in level.shape[2:]
        )  # (b, k, 7) each
        patches = level[image, :, y[..., :, None], x[..., None, :]]  # (b, k, 7, 7, c)
        cut.append(rearrange(patches, "b k h w c -> (b k) (c h w)").half().cpu())
    return cut


def normalise(patches: Tensor, channels: int) -> Tensor:
    """Patches with mean 0 and standard deviation 1 in each channel, over all of a set: (m, d) -> (m, d) float32."""
    split = rearrange(patches.float(), "m (c p) -> m c p", c=channels)
    deviation, mean = torch.std_mean(split.double(), dim=(0, 2), correction=0, keepdim=True)
    # A channel that never changes stays 0, whatever rounding left of it.
    split = (split - mean.float()) / deviation.float().clamp(min=1e-8)
    return rearrange(split, "m c p -> m (c p)")


def distance(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance of two point clouds, projected on random directions, averaged over these.

    Args:
        a: (m, d) float32.
        b: (m', d) float32; of the larger cloud, as many quantiles are taken as the smaller one has points.

    Returns:
        The mean over 512 unit vectors, always the same ones.

    Source: Rabin et al. 2011; in one dimension, the mean distance of the sorted points.
    """
    directions = torch.randn(DIRECTIONS, a.shape[1], generator=generator(SEED, Purpose.PROJECT))
    directions = F.normalize(directions, dim=1)
    total = 0.0
    for some in directions.split(DIRECTIONS_AT_A_TIME):
        first, second = (torch.sort(some @ cloud.T, dim=1).values for cloud in (a, b))  # (directions, m) each
        number = min(first.shape[1], second.shape[1])
        first, second = (_quantiles(points, number) for points in (first, second))
        total += float((first - second).abs().mean(1, dtype=torch.float64).sum())
    return total / DIRECTIONS


def _quantiles(points: Tensor, number: int) -> Tensor:
    """Of sorted points (n, m), `number` evenly spaced ones; all of them where that is their number."""
    places = ((torch.arange(number) + 0.5) * points.shape[1] / number).long()
    return points[:, places]
