"""How much the predictions of the same pixels differ where two patches of different grids overlap.

Shapes: `b` images, `c` channels, `H W` image.
"""

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor

from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.randomness import Purpose, generator

SEED = 0
NOISE_LEVELS = (0.1, 0.5)  # t / T: late and halfway


def overlap_differences(
    diffusion: GaussianDiffusion, batches: Iterable[Tensor], patch_batch_size: int | None
) -> dict[float, float]:
    """Compare the predictions of x_0 of all pairs of grids, from the same noisy real images.

    Args:
        diffusion: a model with two grids or more.
        batches: real images, (b, c, H, W) in [-1, 1] each.
        patch_batch_size: see `GaussianDiffusion.predict`.

    Returns:
        By t / T: the mean absolute difference, on the scale [-1, 1]. 0 if it never matters in which patch a pixel lies.
    """
    device, totals, pixels = diffusion.alpha_bar.device, dict.fromkeys(NOISE_LEVELS, 0.0), 0
    random = generator(SEED, Purpose.OVERLAP)
    for x_0 in batches:
        noise = torch.randn(x_0.shape, generator=random).to(device)
        x_0 = x_0.to(device)
        pixels += x_0.numel()
        for level in NOISE_LEVELS:
            t = torch.full(x_0.shape[:1], round(level * diffusion.timesteps), device=device)
            x_t = diffusion.q_sample(x_0, t, noise)
            with torch.inference_mode():
                guesses = [diffusion.predict_x_0(x_t, t, patch_batch_size, (grid,)) for grid in range(diffusion.grids)]
            pairs = [(a - b).abs().sum().item() for a, b in combinations(guesses, 2)]
            totals[level] += sum(pairs) / len(pairs)
    return {level: total / pixels for level, total in totals.items()}
