"""Sliced Wasserstein distance (SWD) between patches of two image sets, at each level of a Laplacian pyramid.

Fine levels compare texture, coarse ones composition. After Karras et al. 2018, "Progressive Growing of GANs", Sec. 5:
patches of 7 x 7 pixels, normalised per channel, projected on 512 random directions.

Shapes: `b` images, `k` patches of an image, `m` of a set, `c` channels, `H W` image, `d` = 49 c values of a patch.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation.ms_ssim import separable_filter
from patch_based_ddpm.randomness import Purpose, generator

SMALLEST_SIDE = 16
PATCH = 7
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
DIRECTIONS = 512
DIRECTIONS_AT_A_TIME = 64
MOST_PATCHES_PER_IMAGE = 128
MOST_PATCHES = 2**17  # of a set at each level: 37 MiB of RGB in half precision
SEED = 0


def check_size(height: int, width: int) -> None:
    """Refuse images that are too small for a pyramid, with an InputError."""
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(f"the images are {height} x {width} pixels; each side must be {SMALLEST_SIDE} or more.")


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Split images (b, c, H, W) into frequency bands, finest first; each half as large, down to 16 pixels a side.

    Each band holds the details that the next, coarser one lacks: bands that are enlarged and added up, from the
    coarsest on, are the images. Source: Burt and Adelson 1983, the 5 x 5 binomial filter.
    """
    pyramid = []
    while (min(images.shape[2:]) + 1) // 2 >= SMALLEST_SIDE:
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
    return separable_filter(F.pad(images, (2, 2, 2, 2), mode="reflect"), BINOMIAL)


def descriptors(images: Tensor, positions: range, count: int) -> dict[str, Tensor]:
    """Cut random patches out of every level of the pyramid: by its size, (b*k, d) float16 on the CPU.

    Args:
        images: (b, c, H, W), 16 pixels a side or more; b is at least 1.
        positions: of the images in their set; they alone decide where the patches lie.
        count: images in the set; the more there are, the fewer patches are cut from each.
    """
    k = max(1, min(MOST_PATCHES_PER_IMAGE, MOST_PATCHES // count))
    generators = [generator(SEED, Purpose.CUT, position) for position in positions]
    image = torch.arange(len(images))[:, None, None, None]
    cut = {}
    for level in laplacian_pyramid(images.float()):
        height, width = level.shape[2:]
        y, x = (
            torch.stack([torch.randint(side - PATCH + 1, (k, 1), generator=g) for g in generators])
            + torch.arange(PATCH)
            for side in (height, width)
        )  # (b, k, 7) each
        patches = level[image, :, y[..., :, None], x[..., None, :]]  # (b, k, 7, 7, c)
        size = f"{height} px" if height == width else f"{height} x {width} px"
        cut[size] = rearrange(patches, "b k h w c -> (b k) (c h w)").half().cpu()
    return cut


def normalise(patches: Tensor) -> Tensor:
    """Scale each channel to mean 0 and standard deviation 1 over all patches of a set: (m, d) -> (m, d) float32."""
    split = rearrange(patches.float(), "m (c p) -> m c p", p=PATCH**2)
    deviation, mean = torch.std_mean(split.double(), dim=(0, 2), correction=0, keepdim=True)
    # Without a minimum, rounding errors of a constant channel would be divided by a deviation of almost 0.
    split = (split - mean.float()) / deviation.float().clamp(min=1e-8)
    return rearrange(split, "m c p -> m (c p)")


def distance(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance of two point clouds, projected on random directions and averaged over these.

    Args:
        a: (m, d) float32.
        b: (m', d) float32; the larger cloud is reduced to as many quantiles as the smaller one has points.

    Source: Rabin et al. 2011; in one dimension, the mean distance of the sorted points.
    """
    directions = torch.randn(DIRECTIONS, a.shape[1], generator=generator(SEED, Purpose.PROJECT))
    m = min(len(a), len(b))
    quantiles = [((torch.arange(m) + 0.5) * len(cloud) / m).long() for cloud in (a, b)]
    total = 0.0
    for some in F.normalize(directions, dim=1).split(DIRECTIONS_AT_A_TIME):
        sorted_a, sorted_b = (torch.sort(some @ cloud.T, dim=1).values for cloud in (a, b))  # (directions, m or m')
        differences = sorted_a[:, quantiles[0]] - sorted_b[:, quantiles[1]]
        total += float(differences.abs().mean(1, dtype=torch.float64).sum())
    return total / DIRECTIONS
