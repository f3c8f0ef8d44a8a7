"""The loop that every sampler shares: predict x_0, update x_t, go on to the next timestep.

Symbols: `x_T` pure noise, `x_t` noisy image, `x_0` image, `z` noise, `t` timestep in [0, T).
Shapes: `b` images, `c` channels, `H W` image, `S` steps.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.samplers.coefficients import Updates

Noise = Callable[[], Tensor]
Progress = Callable[[list[int]], Iterable[int]]
Observe = Callable[[int, Tensor, Tensor], None]


def denoise(
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    visited: list[int],
    updates: Updates,
    noise: Noise | None,
    patch_batch_size: int | None,
    progress: Progress,
    observe: Observe | None,
) -> Tensor:
    """Walk down the timesteps.

    Args:
        diffusion: the model.
        x_T: (b, c, H, W) standard normal.
        visited: S timesteps.
        updates: what to do after each of them; the last one leaves the predicted x_0.
        noise: draws each z, (b, c, H, W) standard normal; needed where `updates` has noise. None is drawn at the end.
        patch_batch_size: patches per forward pass, counted over all images; None: all.
        progress: wraps the list of timesteps, to show how far it is.
        observe: is shown (t, x_t, predicted x_0) at every timestep visited.

    Returns:
        x_0, (b, c, H, W) in [-1, 1].
    """
    updates = updates.to(x_T)  # float64 until here
    order = updates.x_0.shape[1]
    x_t, x_0s = x_T, []  # the latest x_0 first
    for i, step in enumerate(progress(visited)):
        t = torch.full(x_t.shape[:1], step, device=x_t.device, dtype=torch.int64)
        x_0s = [diffusion.predict_x_0(x_t, t, patch_batch_size), *x_0s]
        if observe is not None:
            observe(step, x_t, x_0s[0])
        x_t = updates.x_t[i] * x_t + _weighted(updates.x_0[i], x_0s)
        if updates.noise is not None and i + 1 < len(visited):
            x_t = x_t + updates.noise[i] * noise()
        x_0s = x_0s[: order - 1]
    return x_t


def _weighted(weights: Tensor, x_0s: list[Tensor]) -> Tensor:
    return sum((weight * x_0 for weight, x_0 in zip(weights[1:], x_0s[1:])), weights[0] * x_0s[0])
