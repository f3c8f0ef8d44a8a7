"""Samplers turn noise into images with a diffusion model.

Each has its own file, with the coefficients of its steps and a `Sampler`, listed in `SAMPLERS`. `Sampler.__call__` is
the loop that all of them share, and `timesteps` chooses the timesteps to visit. All randomness is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.randomness import ImageNoise
from patch_based_ddpm.samplers.ddim import ddim
from patch_based_ddpm.samplers.ddpm import ddpm
from patch_based_ddpm.samplers.dpm_solver_pp import dpm_solver_pp
from patch_based_ddpm.samplers.sampler import SAMPLERS, Observe, Progress, SamplerConfig
from patch_based_ddpm.samplers.unipc import unipc

SAMPLERS.update({sampler.name: sampler for sampler in (ddpm, ddim, dpm_solver_pp, unipc)})
SEED_LIMIT = 2**32  # PyTorch's CPU generator keeps 32 bits of a seed


def draw(
    diffusion: GaussianDiffusion,
    seeds: Iterable[int],
    *,
    sampler: SamplerConfig | str = SamplerConfig(),  # noqa: B008 - frozen
    patch_batch_size: int | None = None,
    progress: Progress = iter,
    observe: Observe | None = None,
    **options: Any,
) -> Tensor:
    """Draw one image per seed; an image does not depend on the others in the batch.

    Args:
        diffusion: the model.
        seeds: b integers in [0, 2^32).
        sampler: the configuration of a sampler, or its name.
        patch_batch_size: see `Sampler.__call__`, also for `progress` and `observe`.
        progress: wraps the list of timesteps.
        observe: is called at every timestep.
        options: fields of `SamplerConfig` that replace those of the configuration.

    Returns:
        (b, c, H, W) in [-1, 1].

    Raises:
        InputError: there is no seed, or one out of range; there is no such sampler, or it does not take these options.
    """
    config = SamplerConfig(name=sampler, **options) if isinstance(sampler, str) else replace(sampler, **options)
    seeds = list(seeds)
    if not seeds:
        raise InputError("there are no seeds; an image needs one.")
    for seed in seeds:
        if not 0 <= seed < SEED_LIMIT:
            raise InputError(f"the seed is {seed}; it must lie in [0, {SEED_LIMIT}).")
    noise = ImageNoise(seeds, diffusion.image_shape, diffusion.alpha_bar.device)
    run = {"noise": noise, "patch_batch_size": patch_batch_size, "progress": progress, "observe": observe}
    options = asdict(config)
    return SAMPLERS[options.pop("name")](diffusion, noise(), **run, **options)
