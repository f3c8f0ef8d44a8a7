"""From noise to images: pure functions of a diffusion model and x_T. All randomness is passed in.

Symbols: `x_T` pure noise, `x_t` noisy image, `x_0` image, `eps` noise, `t` timestep in [0, T).
Shapes: `b` images, `c` channels, `H W` image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from patch_based_ddpm.config import SAMPLERS
from patch_based_ddpm.diffusion import GaussianDiffusion
from patch_based_ddpm.errors import InputError

Noise = Callable[[], Tensor]
Progress = Callable[[list[int]], Iterable[int]]


class ImageNoise:
    """Standard normal noise in which each image's part depends on that image's seed alone.

    It is drawn on the CPU, so that a seed means the same on every device.

    Args:
        seeds: one per image, in [0, 2^64); the low 32 bits count.
        shape: (c, H, W).
        device: where the noise goes.
    """

    def __init__(self, seeds: Iterable[int], shape: tuple[int, int, int], device: torch.device | str) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """Draw the next (b, c, H, W) float32: x_T first, then what each step asks for."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def ddpm(
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    *,
    noise: Noise,
    patch_batch_size: int | None = None,
    progress: Progress = iter,
) -> Tensor:
    """Ancestral sampling over all T steps: x_{t-1} = mean(x_t) + sqrt(variance_t) z, and no z at t = 0.

    Args:
        diffusion: the model.
        x_T: (b, c, H, W) standard normal.
        noise: draws each z, (b, c, H, W) standard normal.
        patch_batch_size: patches per forward pass, counted over all images; None: all.
        progress: wraps the list of timesteps, to show how far it is.

    Returns:
        x_0, (b, c, H, W) in [-1, 1].

    Source: DDPM algorithm 2.
    """
    x_t = x_T
    for step in progress(list(range(diffusion.timesteps))[::-1]):
        mean, _, log_variance = diffusion.p_mean_variance(x_t, _filled(x_t, step), patch_batch_size)
        x_t = mean + (0.5 * log_variance).exp() * noise() if step > 0 else mean
    return x_t


def ddim(
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    *,
    steps: int,
    eta: float = 0.0,
    noise: Noise | None = None,
    patch_batch_size: int | None = None,
    progress: Progress = iter,
) -> Tensor:
    """DDIM over a subsequence of the timesteps.

    x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z, with s the timestep after t,
    sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s),
    x_0 the clipped prediction and eps the noise that it leaves in x_t.

    Args:
        diffusion: the model.
        x_T: (b, c, H, W) standard normal.
        steps: timesteps visited, evenly spaced from T - 1 downwards; in [1, T].
        eta: 0 is deterministic; 1, over all steps, is ancestral sampling. In [0, 1].
        noise: draws each z, (b, c, H, W) standard normal; needed where eta > 0.
        patch_batch_size: patches per forward pass, counted over all images; None: all.
        progress: wraps the list of timesteps, to show how far it is.

    Returns:
        x_0, (b, c, H, W) in [-1, 1].

    Raises:
        InputError: `steps` or `eta` is out of range, or eta > 0 comes without noise.

    Source: DDIM (Song et al. 2021) eq. 12 and 16; spacing after Lin et al. 2024 ("trailing").
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}; it must lie in [0, 1].")
    if eta > 0 and noise is None:
        raise InputError(f"eta is {eta} but no noise was given; only eta 0 does without.")
    timesteps = strided_timesteps(diffusion.timesteps, steps)
    following = dict(zip(timesteps, timesteps[1:]))
    x_t = x_T
    for step in progress(timesteps):
        x_0 = diffusion.predict_x_0(x_t, _filled(x_t, step), patch_batch_size)
        if step not in following:
            break
        alpha_bar_t, alpha_bar_s = diffusion.alpha_bar[step], diffusion.alpha_bar[following[step]]
        eps = (x_t - alpha_bar_t.sqrt() * x_0) / (1 - alpha_bar_t).sqrt()
        sigma = eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t)).sqrt() * (1 - alpha_bar_t / alpha_bar_s).sqrt()
        # At eta 1 the difference can be 0, and round to less.
        x_t = alpha_bar_s.sqrt() * x_0 + (1 - alpha_bar_s - sigma**2).clamp(min=0).sqrt() * eps
        if eta > 0:
            x_t = x_t + sigma * noise()
    return x_0


def strided_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps evenly spaced from T - 1 downwards: round(T - i T / steps) - 1, i = 0..steps-1.

    Args:
        timesteps: T.
        steps: in [1, T]; T gives them all.

    Raises:
        InputError: `steps` is out of range.
    """
    if not 1 <= steps <= timesteps:
        raise InputError(
            f"the number of sampling steps is {steps}; it must lie in [1, {timesteps}], the model's timesteps."
        )
    return [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)]


def _filled(x_t: Tensor, step: int) -> Tensor:
    return torch.full(x_t.shape[:1], step, device=x_t.device, dtype=torch.int64)


def draw(
    diffusion: GaussianDiffusion,
    seeds: Iterable[int],
    *,
    sampler: str,
    steps: int | None,
    eta: float,
    patch_batch_size: int | None,
    progress: Progress = iter,
) -> Tensor:
    """Draw one image per seed; an image depends on its seed, not on its neighbours in the batch.

    Args:
        diffusion: the model.
        seeds: b of them, in [0, 2^32).
        sampler: "ddpm" or "ddim".
        steps: for "ddim" alone; None: all T.
        eta: for "ddim" alone, see there.
        patch_batch_size: patches per forward pass, counted over all images; None: all.
        progress: wraps the list of timesteps, to show how far it is.

    Returns:
        (b, c, H, W) in [-1, 1].

    Raises:
        InputError: there is no such sampler, or `ddim` cannot take these steps or this eta.
    """
    if sampler not in SAMPLERS:
        raise InputError(f'the sampler is "{sampler}"; it must be one of {", ".join(SAMPLERS)}.')
    noise = ImageNoise(seeds, diffusion.image_shape, diffusion.alpha_bar.device)
    options = {"noise": noise, "patch_batch_size": patch_batch_size, "progress": progress}
    if sampler == "ddpm":
        return ddpm(diffusion, noise(), **options)
    return ddim(diffusion, noise(), steps=diffusion.timesteps if steps is None else steps, eta=eta, **options)
