"""Gaussian diffusion over whole images: splits them, runs the UNet over the patches, merges the predictions.

The patches of a step interact only through the noisy image, so any number of them may share a forward pass: every
`patch_batch_size` gives the same prediction and the same gradient.

Symbols: `x_0` image, `x_t` noisy image, `eps` noise, `t` timestep in [0, T).
Shapes: `b` images, `n` patches in the pass, `c` channels, `H W` image, `h w` patch, `N` patches a side, `k` halo,
`G` grids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model import schedule
from patch_based_ddpm.model.patch_batching import PatchBatching
from patch_based_ddpm.model.patches import (
    PatchBatch,
    blend_weights,
    crop,
    gather,
    global_content,
    pad,
    patch_batch,
    scatter,
)
from patch_based_ddpm.model.unet import UNet

# Called with reduction="none".
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


class GaussianDiffusion(nn.Module):
    """A patch-wise denoiser and its noise schedule.

    Args:
        unet: a module with the signature of `UNet.forward`.
        config: the sections `model` (geometry) and `diffusion` (schedule, objective, loss) are read.

    Attributes:
        patch_batching: bounds the patches of a forward pass, whatever a call requests.
    """

    def __init__(self, unet: nn.Module, config: Config) -> None:
        super().__init__()
        self.unet = unet
        self.config = config
        self.patch_divider = config.model.patch_divider
        self.halo = config.model.halo
        self.grids = config.model.grids
        self.timesteps = config.diffusion.timesteps
        self.patch_batching = PatchBatching()
        alpha_bar = self.exact_alpha_bar
        posterior = schedule.posterior(schedule.cosine_betas(self.timesteps))
        buffers = {
            "alpha_bar": alpha_bar,
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "posterior_x_0": posterior.x_0_coefficient,
            "posterior_x_t": posterior.x_t_coefficient,
            "posterior_variance": posterior.variance,
            "posterior_log_variance": posterior.log_variance,
        }
        for name, values in buffers.items():  # not persistent, as they follow from the config
            self.register_buffer(name, values.float(), persistent=False)

    @classmethod
    def from_config(cls, config: Config) -> GaussianDiffusion:
        """Build a freshly initialised diffusion model."""
        return cls(UNet.from_config(config.model), config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, H, W)."""
        return (self.config.model.channels, *self.config.model.image_shape)

    @property
    def exact_alpha_bar(self) -> Tensor:
        """alpha_bar, (T,) float64 on the CPU: float32 loses the digits of differences such as 1 - alpha_bar."""
        return schedule.alpha_bars(schedule.cosine_betas(self.timesteps))

    def predict(
        self, x_t: Tensor, t: Tensor, patch_batch_size: int | None = None, grids: Sequence[int] = (0,)
    ) -> Tensor:
        """Run the network over all patches of noisy images.

        Args:
            x_t: (b, c, H, W) noisy images.
            t: (b,) int64 timesteps in [0, T).
            patch_batch_size: patches per forward pass, counted over all images; None: all at once.
            grids: the grids of patches, in [0, G) each. Of several, the predictions are blended, see `blend_weights`.

        Returns:
            (b, c, H, W) float32: noise, x_0 or v, depending on `diffusion.objective` of the config.

        Raises:
            InputError: `patch_batch_size` is less than 1, or the model has no such grid.
        """
        for number in grids:
            if not 0 <= number < self.grids:
                raise InputError(f"the grid is {number}; this model has {self.grids}, numbered from 0.")
        content = global_content(x_t, self.patch_divider, self.halo)  # (b, c, h + 2k, w + 2k)
        padded = pad(x_t, self.halo)  # (b, c, H + 2k, W + 2k)
        blended = len(grids) > 1
        prediction = torch.zeros_like(x_t, dtype=torch.float32)  # (b, c, H, W)
        weights = blend_weights(*self.config.model.patch_shape, grids, x_t.device) if blended else None  # (g, h, w)
        for i, number in enumerate(grids):
            grid = torch.full_like(t, number) if number else None  # (b,)
            start, total = 0, self.patch_divider**2 * len(x_t)
            while start < total:
                size = self.patch_batching.size(total, patch_batch_size)
                patch_indices = self.patch_batching.indices(start, size, total, x_t.device)
                with suppress(torch.OutOfMemoryError):
                    inputs = (padded, content, t, self.patch_divider, patch_indices, self.halo, grid, self.grids)
                    patches = self._denoise(patch_batch(*inputs))  # (n, c, h, w)
                    patches = patches * weights[i] if blended else patches
                    scatter(prediction, self.patch_divider, patch_indices, patches, grid, add=blended)
                    start += size
                    continue
                self.patch_batching.shrink(size)  # here the error no longer holds tensors
        return prediction

    def _denoise(self, batch: PatchBatch) -> Tensor:
        # The network may be in half precision; everything outside it stays float32.
        dtype = next(self.unet.parameters()).dtype
        prediction = self.unet(batch.patches.to(dtype), batch.content.to(dtype), batch.position, batch.t)
        return crop(prediction, self.halo).float()

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Diffuse images: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

        Args:
            x_0: (b, c, H, W) in [-1, 1].
            t: (b,) int64 in [0, T).
            noise: (b, c, H, W) standard normal.

        Returns:
            (b, c, H, W).

        Source: DDPM eq. 4.
        """
        return extract(self.sqrt_alpha_bar, t) * x_0 + extract(self.sqrt_one_minus_alpha_bar, t) * noise

    def predict_x_0(
        self, x_t: Tensor, t: Tensor, patch_batch_size: int | None = None, grids: Sequence[int] = (0,)
    ) -> Tensor:
        """Predict x_0, clipped to [-1, 1].

        pred_noise: x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)    DDPM eq. 15
        pred_v:     x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v          Salimans & Ho 2022, App. D

        Args: see `predict`.

        Returns:
            (b, c, H, W) in [-1, 1]; NaN where the prediction is not finite (clipping would hide an infinity).
        """
        prediction = self.predict(x_t, t, patch_batch_size, grids)
        signal, noise = extract(self.sqrt_alpha_bar, t), extract(self.sqrt_one_minus_alpha_bar, t)
        match self.config.diffusion.objective:
            case "pred_noise":
                x_0 = (x_t - noise * prediction) / signal
            case "pred_x0":
                x_0 = prediction
            case "pred_v":
                x_0 = signal * x_t - noise * prediction
        return x_0.clamp(-1, 1).masked_fill(~prediction.isfinite(), torch.nan)

    def p_mean_variance(
        self, x_t: Tensor, t: Tensor, patch_batch_size: int | None = None, grids: Sequence[int] = (0,)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The reverse step p(x_{t-1} | x_t), as the posterior q(x_{t-1} | x_t, x_0) at the predicted, clipped x_0.

        Args: see `predict`.

        Returns:
            mean (b, c, H, W), variance (b, 1, 1, 1) and log variance (b, 1, 1, 1).

        Source: DDPM eq. 6 and 7.
        """
        x_0 = self.predict_x_0(x_t, t, patch_batch_size, grids)
        mean = extract(self.posterior_x_0, t) * x_0 + extract(self.posterior_x_t, t) * x_t
        return mean, extract(self.posterior_variance, t), extract(self.posterior_log_variance, t)

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The target of the network: eps, x_0, or v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0."""
        match self.config.diffusion.objective:
            case "pred_noise":
                return noise
            case "pred_x0":
                return x_0
            case "pred_v":
                return extract(self.sqrt_alpha_bar, t) * noise - extract(self.sqrt_one_minus_alpha_bar, t) * x_0

    def training_batches(
        self, x_0: Tensor, t: Tensor, noise: Tensor, patch_batch_size: int | None, grid: Tensor | None = None
    ) -> Iterator[tuple[PatchBatch, Tensor]]:
        """Diffuse images once, then iterate over their patches, a few at a time; each patch comes exactly once.

        Args: see `q_sample` and `predict`, and
            grid: (b,) int64 in [0, G), the grid of each image; None: 0.

        Yields:
            The network's inputs, and its target (n, c, h, w). If passes are padded, the inputs are more: they repeat
            the last patch.
        """
        x_t, target = self.q_sample(x_0, t, noise), self.target(x_0, t, noise)  # (b, c, H, W)
        content = global_content(x_t, self.patch_divider, self.halo)  # (b, c, h + 2k, w + 2k)
        x_t = pad(x_t, self.halo)  # (b, c, H + 2k, W + 2k)
        total = self.patch_divider**2 * len(x_0)
        size = self.patch_batching.size(total, patch_batch_size)
        for start in range(0, total, size):
            patch_indices = self.patch_batching.indices(start, size, total, x_0.device)
            inputs = patch_batch(x_t, content, t, self.patch_divider, patch_indices, self.halo, grid, self.grids)
            yield inputs, gather(target, self.patch_divider, patch_indices[: total - start], grid=grid)

    def patch_losses(self, inputs: PatchBatch, target: Tensor) -> Tensor:
        """The mean loss over the pixels of each patch, (n,). Its mean over all patches is the loss of the images."""
        loss = LOSSES[self.config.diffusion.loss_type]
        prediction = self._denoise(inputs)[: len(target)]
        return reduce(loss(prediction, target, reduction="none"), "n c h w -> n", "mean")

    def accumulate_gradient(
        self,
        x_0: Tensor,
        t: Tensor,
        noise: Tensor,
        patch_batch_size: int | None,
        *,
        grid: Tensor | None = None,
        micro_batches: int = 1,
        autocast: AbstractContextManager = nullcontext(),  # noqa: B008 - it has no state
        backward: Callable[[Tensor], None] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Iterator[Tensor]:
        """Add the gradient of `loss` to that of the parameters, a few patches at a time.

        Args:
            x_0: (b, c, H, W) in [-1, 1].
            t: (b,) int64 in [0, T).
            noise: (b, c, H, W) standard normal.
            patch_batch_size: see `predict`.
            grid: see `training_batches`.
            micro_batches: how many batches of images share an optimizer step; each gradient is divided by it.
            autocast: opened around each forward pass.
            backward: runs the backward pass of a scalar loss.
            no_sync: returns the context of every pass but the last, in which processes do not exchange gradients.

        Yields:
            After each pass, the loss of each of its patches, (n,), detached.
        """
        patches, done = self.patch_divider**2 * len(x_0), 0
        for inputs, target in self.training_batches(x_0, t, noise, patch_batch_size, grid):
            done += len(target)
            with nullcontext() if done == patches else no_sync():
                with autocast:
                    losses = self.patch_losses(inputs, target)  # (n,)
                backward(losses.sum() / (patches * micro_batches))
            yield losses.detach()

    def loss(
        self, x_0: Tensor, t: Tensor | None = None, noise: Tensor | None = None, grid: Tensor | None = None
    ) -> Tensor:
        """The training loss of whole images, all patches at once: a scalar, the mean over all pixels.

        Args:
            x_0: (b, c, H, W) in [-1, 1].
            t: (b,) int64 in [0, T); None draws it uniformly.
            noise: (b, c, H, W); None draws it.
            grid: (b,) int64 in [0, G); None draws it uniformly.

        Source: DDPM eq. 14, with the configured distance.
        """
        if t is None:
            t = torch.randint(self.timesteps, x_0.shape[:1], device=x_0.device)
        if noise is None:
            noise = torch.randn_like(x_0)
        if grid is None and self.grids > 1:
            grid = torch.randint(self.grids, x_0.shape[:1], device=x_0.device)
        ((inputs, target),) = self.training_batches(x_0, t, noise, None, grid)
        return self.patch_losses(inputs, target).mean()


def extract(coefficients: Tensor, t: Tensor) -> Tensor:
    """The values of a schedule (T,) at timesteps (b,), shaped (b, 1, 1, 1) to broadcast over images."""
    return rearrange(coefficients[t], "b -> b 1 1 1")
