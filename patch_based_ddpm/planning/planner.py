"""Predicts the peak memory of training and sampling, by running their code on fake tensors: shapes without values.

It needs no data and no GPU. Passes of one size need the same memory, so only `PASSES` of them run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from patch_based_ddpm import samplers
from patch_based_ddpm.command_line import DTYPES
from patch_based_ddpm.config import Config, ModelConfig
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.model.patch_batching import PatchBatching
from patch_based_ddpm.model.unet import UNet
from patch_based_ddpm.planning.live_memory import MIB, LiveMemory, Peak
from patch_based_ddpm.samplers import SAMPLERS, SamplerConfig

PASSES = 2  # forward-backward or forward passes after which the peak is reached
# Sampling steps after which every sampler keeps as many predictions as it ever does.
STEPS = 1 + max(order for sampler in SAMPLERS.values() for order in (1, *sampler.orders))


class _FirstPasses(PatchBatching):
    """Runs `PASSES` passes, spread over the patches, and skips the patches between them."""

    def size(self, total: int, requested: int | None) -> int:
        self.patches = super().size(total, requested)
        return max(self.patches, math.ceil(total / PASSES))

    def indices(self, start: int, size: int, total: int, device: torch.device) -> Tensor:
        return super().indices(start, self.patches, total, device)


class _LastStep(GaussianDiffusion):
    """Runs the network in the last sampling step; before it, a prediction is an empty tensor."""

    runs = False

    def steps(self, timesteps: list[int]) -> Iterator[int]:
        """The first timesteps."""
        *before, last = timesteps[:STEPS]
        yield from before
        self.runs = True
        yield last

    def predict(self, x_t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().predict(x_t, *args, **kwargs) if self.runs else torch.empty_like(x_t)


def sampling_peak(
    config: Config,
    *,
    batch_size: int,
    patch_batch_size: int | None,
    dtype: torch.dtype = torch.float32,
    sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 - frozen
) -> Peak:
    """Predict the peak of sampling.

    Args:
        config: `model` and `diffusion` are read.
        batch_size: images at a time.
        patch_batch_size: patches per forward pass, counted over all images; None: all.
        dtype: of the network's weights.
        sampler: one of higher order holds earlier predictions of the images.
    """
    with FakeTensorMode(), torch.inference_mode():
        diffusion = _LastStep.from_config(config)
        diffusion.patch_batching = _FirstPasses()
        for parameter in diffusion.parameters():
            parameter.data = parameter.data.to(dtype)
        with LiveMemory(diffusion) as memory:
            samplers.draw(
                diffusion,
                range(batch_size),
                sampler=replace(sampler, spacing="trailing"),  # needs no values, which fake tensors lack
                patch_batch_size=patch_batch_size,
                progress=diffusion.steps,
            )
    return memory.peak()


def training_peak(
    config: Config, *, batch_size: int, patch_batch_size: int | None, precision: str = "no", processes: int = 1
) -> Peak:
    """Predict the peak of an optimizer step after the first, when Adam has its moments; averaged weights included.

    Args:
        config: `model`, `diffusion`, `trainer.gradient_accumulate_every` and `trainer.recompute_activations` are read.
        batch_size: images of a micro-batch.
        patch_batch_size: patches per forward-backward pass; None: all.
        precision: "no", "bf16" or "fp16", of the activations.
        processes: of the run; several keep their gradients, in the buckets in which they exchange them.
    """
    with FakeTensorMode():
        diffusion = GaussianDiffusion.from_config(config)
        diffusion.unet.recompute = config.trainer.recompute_activations
        averaged = GaussianDiffusion.from_config(config).requires_grad_(False)
        optimizer = torch.optim.Adam(diffusion.parameters(), fused=True)
        for parameter in diffusion.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # creates the moments
        if config.trainer.gradient_accumulate_every == 1 and processes == 1:
            optimizer.zero_grad()  # otherwise the last micro-batch begins with gradients
        with LiveMemory(nn.ModuleList([diffusion, averaged]), optimizer) as memory:
            x_0 = torch.zeros(batch_size, *diffusion.image_shape)
            t = torch.zeros(batch_size, dtype=torch.int64)
            grid = torch.zeros_like(t) if diffusion.grids > 1 else None
            autocast = torch.autocast("cpu", DTYPES.get(precision), enabled=precision in DTYPES)
            batch = (x_0, t, torch.zeros_like(x_0), patch_batch_size)
            passes = diffusion.accumulate_gradient(*batch, grid=grid, autocast=autocast)
            _losses = [losses for _, losses in zip(range(PASSES), passes)]
            optimizer.step()
    return memory.peak()


def prediction_flops(model: ModelConfig) -> int:
    """Floating-point operations of one prediction of one image, a multiplication and an addition counted as two."""
    h, w = (side + 2 * model.halo for side in model.patch_shape)
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        patch = torch.zeros(1, model.channels, h, w)
        UNet.from_config(model)(patch, patch, torch.zeros(1, model.positions), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() * model.patch_divider**2


def limit_patch_batch(
    predict: Callable[..., Peak], config: Config, images: int, requested: int | None, max_memory: int, **options: Any
) -> tuple[int, str]:
    """The largest patch batch, at most `requested`, that fits into `max_memory` bytes; and a sentence for the user.

    `predict` is `sampling_peak` or `training_peak`, with its `options`. Raises InputError, see `largest_patch_batch`.
    """
    patches = config.model.patch_divider**2 * images
    size, peak = largest_patch_batch(
        lambda size: predict(config, batch_size=images, patch_batch_size=size, **options),
        min(patches, requested or patches),
        max_memory,
    )
    return size, (
        f"Within {max_memory / MIB:,.1f} MiB, {size} of {patches} patches share a pass: "
        f"{peak.total / MIB:,.1f} MiB of tensors, {peak.activations / MIB:,.1f} of them activations."
    )


def largest_patch_batch(peak_of: Callable[[int], Peak], patches: int, max_memory: int) -> tuple[int, Peak]:
    """Find the largest patch batch whose peak fits.

    Args:
        peak_of: returns the peak of a patch batch; grows with it, nearly linearly.
        patches: the most that can share a pass.
        max_memory: bytes.

    Returns:
        Its size, in [1, patches], and its peak.

    Raises:
        InputError: one patch at a time does not fit; the message says how much memory it needs.
    """
    least, most = peak_of(1), peak_of(patches)
    if least.total > max_memory:
        kinds = {"weights": least.weights, "gradients": least.gradients, "optimizer": least.optimizer}
        parts = ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in kinds.items() if size)
        raise InputError(
            f"--max-memory {max_memory / MIB:,.1f} MiB is too little: one patch at a time needs "
            f"{least.total / MIB:,.1f} MiB, of which {parts}."
        )
    if most.total <= max_memory:
        return patches, most
    fits, fits_peak, too_large, too_large_total = 1, least, patches, most.total
    while too_large - fits > 1:
        slope = (too_large_total - fits_peak.total) / (too_large - fits)
        guess = fits + int((max_memory - fits_peak.total) / slope)
        guess = min(max(guess, fits + 1), too_large - 1)
        peak = peak_of(guess)
        if peak.total <= max_memory:
            fits, fits_peak = guess, peak
        else:
            too_large, too_large_total = guess, peak.total
    return fits, fits_peak
