"""From noise to images: pure functions of a diffusion model and x_T. All randomness is passed in.

Symbols: `x_T` pure noise, `x_t` noisy image, `x_0` image, `z` noise, `t` timestep in [0, T).
Shapes: `b` images, `c` channels, `H W` image.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.randomness import ImageNoise
from patch_based_ddpm.samplers import coefficients, timesteps
from patch_based_ddpm.samplers.loop import Noise, Observe, Progress, denoise
from patch_based_ddpm.samplers.options import check, defaults


def ddpm(
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    *,
    noise: Noise,
    steps: int | None = None,
    spacing: str = "trailing",
    patch_batch_size: int | None = None,
    progress: Progress = iter,
    observe: Observe | None = None,
) -> Tensor:
    """Ancestral sampling: each x_s is drawn from the posterior q(x_s | x_t, x_0) at the predicted, clipped x_0.

    Args:
        diffusion: the model.
        x_T: (b, c, H, W) standard normal.
        noise: draws each z, (b, c, H, W) standard normal.
        steps: timesteps visited, in [1, T]; None: all, which is the algorithm of the paper.
        spacing: how they are spread, see `timesteps.visited`.
        patch_batch_size: patches per forward pass, counted over all images; None: all.
        progress: wraps the list of timesteps, to show how far it is.
        observe: is shown (t, x_t, predicted x_0) at every timestep visited.

    Returns:
        x_0, (b, c, H, W) in [-1, 1].

    Raises:
        InputError: `steps` is out of range, or there is no such spacing.

    Source: DDPM algorithm 2; over fewer steps `updates.ancestral`.
    """
    visited, alpha_bar = _visited(diffusion, steps, spacing)
    return denoise(
        diffusion, x_T, visited, coefficients.ancestral(alpha_bar), noise, patch_batch_size, progress, observe
    )


def ddim(
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    *,
    steps: int | None = None,
    eta: float = 0.0,
    noise: Noise | None = None,
    spacing: str = "trailing",
    patch_batch_size: int | None = None,
    progress: Progress = iter,
    observe: Observe | None = None,
) -> Tensor:
    """DDIM over a subsequence of the timesteps.

    Args:
        diffusion: the model.
        x_T: (b, c, H, W) standard normal.
        steps: timesteps visited, in [1, T]; None: all.
        eta: 0 is deterministic, 1 is ancestral sampling. In [0, 1].
        noise: draws each z, (b, c, H, W) standard normal; needed where eta > 0.
        spacing: see `ddpm`.
        patch_batch_size: see `ddpm`.
        progress: see `ddpm`.
        observe: see `ddpm`.

    Returns:
        x_0, (b, c, H, W) in [-1, 1].

    Raises:
        InputError: `steps` or `eta` is out of range, eta > 0 comes without noise, or there is no such spacing.

    Source: DDIM (Song et al. 2021) eq. 12 and 16, see `updates.ddim`.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}; it must lie in [0, 1].")
    _check_noise(eta, noise)
    visited, alpha_bar = _visited(diffusion, steps, spacing)
    return denoise(
        diffusion, x_T, visited, coefficients.ddim(alpha_bar, eta), noise, patch_batch_size, progress, observe
    )


def dpm_solver_pp(
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    *,
    steps: int | None = None,
    order: int = 2,
    eta: float = 0.0,
    noise: Noise | None = None,
    spacing: str = "logsnr",
    patch_batch_size: int | None = None,
    progress: Progress = iter,
    observe: Observe | None = None,
) -> Tensor:
    """DPM-Solver++, multistep: the x_0 predicted at earlier timesteps say how it will change.

    Args:
        diffusion: the model.
        x_T: (b, c, H, W) standard normal.
        steps: timesteps visited, in [1, T]; None: 20, or all where there are fewer.
        order: 1, 2 or 3.
        eta: 0 is deterministic; 1 solves the equation with noise (SDE-DPM-Solver++).
        noise: draws each z, (b, c, H, W) standard normal; needed where eta is 1.
        spacing: see `ddpm`.
        patch_batch_size: see `ddpm`.
        progress: see `ddpm`.
        observe: see `ddpm`.

    Returns:
        x_0, (b, c, H, W) in [-1, 1].

    Raises:
        InputError: `steps`, `order` or `eta` is out of range, eta 1 comes without noise, or there is no such spacing.

    Source: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), see `updates.dpm_solver_pp`.
    """
    check("dpm-solver++", eta=eta, order=order)
    _check_noise(eta, noise)
    steps = defaults("dpm-solver++", diffusion.timesteps)["steps"] if steps is None else steps
    visited, alpha_bar = _visited(diffusion, steps, spacing)
    rows = coefficients.dpm_solver_pp(alpha_bar, order, stochastic=eta == 1)
    return denoise(diffusion, x_T, visited, rows, noise, patch_batch_size, progress, observe)


def _visited(diffusion: GaussianDiffusion, steps: int | None, spacing: str) -> tuple[list[int], Tensor]:
    alpha_bar = diffusion.exact_alpha_bar
    visited = timesteps.visited(alpha_bar, diffusion.timesteps if steps is None else steps, spacing)
    return visited, alpha_bar[visited]


def _check_noise(eta: float, noise: Noise | None) -> None:
    if eta > 0 and noise is None:
        raise InputError(f"eta is {eta} but no noise was given; only eta 0 does without.")


def draw(
    diffusion: GaussianDiffusion,
    seeds: Iterable[int],
    *,
    sampler: str,
    steps: int | None,
    eta: float,
    order: int | None = None,
    spacing: str | None = None,
    patch_batch_size: int | None,
    progress: Progress = iter,
    observe: Observe | None = None,
) -> Tensor:
    """Draw one image per seed; an image depends on its seed, not on its neighbours in the batch.

    Args:
        diffusion: the model.
        seeds: b of them, in [0, 2^32).
        sampler: "ddpm", "ddim" or "dpm-solver++".
        steps: in [1, T]; None: the sampler's own, all T, or 20 of "dpm-solver++".
        eta: for "ddim" and "dpm-solver++", see there.
        order: for "dpm-solver++", see there; None: 2.
        spacing: see `ddpm`; None: "trailing", or "logsnr" of "dpm-solver++".
        patch_batch_size: see `ddpm`.
        progress: see `ddpm`.
        observe: see `ddpm`.

    Returns:
        (b, c, H, W) in [-1, 1].

    Raises:
        InputError: there is no such sampler, or it cannot take these options.
    """
    check(sampler, eta=eta, order=order)
    noise = ImageNoise(seeds, diffusion.image_shape, diffusion.alpha_bar.device)
    given = {"steps": steps, "order": order, "spacing": spacing}
    options = defaults(sampler, diffusion.timesteps)
    options |= {name: value for name, value in given.items() if value is not None}
    options |= {"noise": noise, "patch_batch_size": patch_batch_size, "progress": progress, "observe": observe}
    match sampler:
        case "ddpm":
            return ddpm(diffusion, noise(), **options)
        case "ddim":
            return ddim(diffusion, noise(), eta=eta, **options)
        case "dpm-solver++":
            return dpm_solver_pp(diffusion, noise(), eta=eta, **options)
