"""Previews of a model in training: images from the same noise every time, drawn by all processes together."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from patch_based_ddpm import processes, samplers
from patch_based_ddpm.config import Config, TrainerConfig
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.samplers import SamplerConfig


def check_preview(config: Config) -> None:
    """Refuse the options of a preview that do not go together; `Config`, which imports no sampler, cannot.

    Raises:
        InputError: there is no such sampler, or it does not take these options.
    """
    try:
        _sampler(config.trainer).resolve(config.diffusion.timesteps)
    except InputError as error:
        raise InputError(f"trainer.preview_sampler and its options: {error}") from None


def _sampler(config: TrainerConfig) -> SamplerConfig:
    return SamplerConfig(
        name=config.preview_sampler,
        steps=config.preview_steps,
        eta=config.preview_eta,
        order=config.preview_order,
    )


def draw_preview(
    diffusion: GaussianDiffusion, config: TrainerConfig, accelerator: Accelerator, progress: samplers.Progress
) -> Tensor:
    """Draw the images of seeds 0..preview_count-1; collective.

    Args:
        diffusion: the averaged model.
        config: count, sampler, steps, batch and patch batch.
        accelerator: its processes share the images.
        progress: wraps the timesteps of each batch; all processes visit equally many timesteps.

    Returns:
        (preview_count, c, H, W) in [-1, 1], on the CPU of every process.
    """
    share = math.ceil(config.preview_count / accelerator.num_processes)
    # Where the images do not divide evenly, some are drawn twice, so that no process has fewer batches.
    own = [(accelerator.process_index + accelerator.num_processes * i) % config.preview_count for i in range(share)]
    drawn: dict[int, Tensor] = {}
    for start in range(0, share, config.train_batch_size):
        seeds = own[start : start + config.train_batch_size]
        with torch.inference_mode(), accelerator.autocast():
            images = samplers.draw(
                diffusion,
                seeds,
                sampler=_sampler(config),
                patch_batch_size=config.patch_batch_size,
                progress=progress,
            )
        drawn |= zip(seeds, images.cpu(), strict=True)
    images = {seed: image for part in processes.gather(drawn) for seed, image in part.items()}
    return torch.stack([images[seed] for seed in range(config.preview_count)])
