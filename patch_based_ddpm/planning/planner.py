"""What training and sampling will hold at most, found by running them on fake tensors: shapes without values.

The real code runs, on no data and without a GPU, so the prediction is a count and not a formula. Passes of
the same size hold the same, so two of them stand for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from patch_based_ddpm import samplers
from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.planning.live_memory import MIB, LiveMemory, Peak
from patch_based_ddpm.samplers import SAMPLERS, SamplerConfig

ENOUGH = 2  # passes after which nothing new is held
# sampling steps after which no sampler keeps more of what it predicted
ENOUGH_STEPS = 1 + max(order for sampler in SAMPLERS.values() for order in (1, *sampler.orders))


class _FewPasses(nn.Module):
    """Runs a network for the first passes of one sampling step, and else makes up the shape of its answer."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.left = 0

    def steps(self, steps: list[int]) -> Iterator[int]:
        """The first of the sampling steps; the network runs in the last of them."""
        *before, last = steps[:ENOUGH_STEPS]
        yield from before
        self.left = ENOUGH
        yield last

    def forward(self, patches: Tensor, *inputs: Tensor) -> Tensor:
        self.left -= 1
        return self.unet(patches, *inputs) if self.left >= 0 else torch.empty_like(patches)


def sampling_peak(
    config: Config,
    *,
    batch_size: int,
    patch_batch_size: int | None,
    dtype: torch.dtype = torch.float32,
    sampler: SamplerConfig = SamplerConfig(),  # noqa: B008 - frozen
) -> Peak:
    """Predict the peak of drawing images.

    Args:
        config: `model` and `diffusion` are read.
        batch_size: images at a time.
        patch_batch_size: patches per forward pass, counted over all images; None: all.
        dtype: of the network's weights.
        sampler: one of higher order holds earlier predictions of the images.
    """
    with FakeTensorMode(), torch.inference_mode():
        diffusion = GaussianDiffusion.from_config(config)
        for parameter in diffusion.parameters():
            parameter.data = parameter.data.to(dtype)
        diffusion.unet = _FewPasses(diffusion.unet)
        with LiveMemory(diffusion) as memory:
            samplers.draw(
                diffusion,
                range(batch_size),
                sampler=replace(sampler, spacing="trailing"),  # chosen without the values that fake tensors lack
                patch_batch_size=patch_batch_size,
                progress=diffusion.unet.steps,
            )
    return memory.peak()


def training_peak(
    config: Config, *, batch_size: int, patch_batch_size: int | None, precision: str = "no", processes: int = 1
) -> Peak:
    """Predict the peak of an optimizer step, once the optimizer has its moments; the averaged weights count too.

    Args:
        config: `model`, `diffusion`, `trainer.gradient_accumulate_every` and `trainer.recompute_activations` are read.
        batch_size: images of a micro-batch.
        patch_batch_size: patches per forward-backward pass; None: all.
        precision: "no", "bf16" or "fp16", of the activations.
        processes: that train together; the gradients of several stay, in the buckets in which they are exchanged.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = torch.autocast("cpu", dtypes[precision]) if precision in dtypes else contextlib.nullcontext()
    with FakeTensorMode():
        diffusion = GaussianDiffusion.from_config(config)
        diffusion.unet.recompute = config.trainer.recompute_activations
        averaged = GaussianDiffusion.from_config(config).requires_grad_(False)
        optimizer = torch.optim.Adam(diffusion.parameters(), fused=True)
        for parameter in diffusion.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        if config.trainer.gradient_accumulate_every == 1 and processes == 1:
            optimizer.zero_grad()  # else there are gradients already when the last micro-batch begins
        with LiveMemory(nn.ModuleList([diffusion, averaged]), optimizer) as memory:
            x_0 = torch.zeros(batch_size, *diffusion.image_shape)
            t = torch.zeros(batch_size, dtype=torch.int64)
            batches = diffusion.training_batches(x_0, t, torch.zeros_like(x_0), patch_batch_size)
            for _, batch in zip(range(ENOUGH), batches):
                with autocast:
                    loss = diffusion.patch_losses(batch).sum()
                loss.backward()
            optimizer.step()
    return memory.peak()


def sentence(patch_batch_size: int, patches: int, peak: Peak, max_memory: int) -> str:
    """What was picked, for the user."""
    return (
        f"Within {max_memory / MIB:,.1f} MiB, {patch_batch_size} of {patches} patches share a pass: "
        f"{peak.total / MIB:,.1f} MiB of tensors, {peak.activations / MIB:,.1f} of them activations."
    )


def largest_patch_batch(peak_of: Callable[[int], Peak], patches: int, max_memory: int) -> tuple[int, Peak]:
    """Find the largest patch batch whose peak fits.

    Args:
        peak_of: the peak of a patch batch; grows with it, nearly along a line.
        patches: of all images together, the most that can share a pass.
        max_memory: bytes.

    Returns:
        The patch batch, in [1, patches], and its peak.

    Raises:
        InputError: not even one patch at a time fits; the message says what would.
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
