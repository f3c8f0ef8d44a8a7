"""One optimizer step: forward and backward over chunks of patches, then an update if loss and gradient are finite.

The gradients of all chunks of patches add up to exactly the whole-image gradient of `GaussianDiffusion.loss`.
Shapes: `b` images of a micro-batch, `c` channels, `H W` image, `N` patches a side.
"""

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from einops import reduce
from torch import Tensor

from patch_based_ddpm.config import TrainerConfig
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.randomness import Purpose, generator


@dataclass(frozen=True)
class StepResult:
    """Measurements of one optimizer step, on the training device."""

    loss: Tensor  # scalar, averaged over processes
    grad_norm: Tensor  # scalar, L2 norm of the exchanged gradient, before clipping
    patch_loss: Tensor  # (N*N,) this process's mean loss of each patch
    applied: Tensor  # scalar bool: loss and gradient were finite, so that the weights changed


@dataclass(frozen=True)
class TrainingStep:
    """Takes optimizer steps.

    Attributes:
        diffusion: its network is prepared by the accelerator.
        optimizer: a fused Adam, prepared by the accelerator.
    """

    config: TrainerConfig
    accelerator: Accelerator
    diffusion: GaussianDiffusion
    optimizer: AcceleratedOptimizer

    def __call__(self, step: int, micro_batches: Iterable[Tensor]) -> StepResult:
        """Accumulate the gradient of all micro-batches and apply it if loss and gradient are finite.

        Args:
            step: the optimizer steps done before; seeds timesteps and noise, together with seed and process.
            micro_batches: `gradient_accumulate_every` times (b, c, H, W) in [-1, 1].
        """
        warmth = min(1.0, (step + 1) / max(1, self.config.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.train_lr * warmth
        patch_loss = self._gradient(step, list(micro_batches))  # (N*N,)
        loss = self.accelerator.reduce(patch_loss.mean(), reduction="mean")
        grad_norm = self._clip()
        # Both are the same on all processes, so all of them decide alike.
        applied = loss.isfinite() & grad_norm.isfinite()
        if self.accelerator.scaler is None:
            # Fused Adam reads the flag on the device and skips the update there, so that the CPU need not wait for it.
            self.optimizer.optimizer.found_inf = (~applied).float()
            self.optimizer.step()
        elif applied:
            self.optimizer.step()
        else:
            self.accelerator.scaler.update()  # lowers the scale of fp16 losses
        self._zero_gradient()
        return StepResult(loss, grad_norm, patch_loss, applied)

    def _zero_gradient(self) -> None:
        # With several processes, gradients are views of the buckets in which they are exchanged, and stay allocated.
        self.optimizer.zero_grad(set_to_none=self.accelerator.num_processes == 1)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the state dict of an Adam, fused or not.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: it does not fit the parameters.
        """
        groups = [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]
        self.optimizer.load_state_dict({**state, "param_groups": groups})  # compares no shapes
        for parameter, moments in self.optimizer.optimizer.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if moments[key].shape != parameter.shape:
                    raise ValueError(f"{key} has the shape {moments[key].shape} instead of {parameter.shape}")
                # Fused Adam needs moments in the memory layout of their parameters.
                moments[key] = torch.empty_like(parameter).copy_(moments[key])

    def _gradient(self, step: int, micro_batches: list[Tensor]) -> Tensor:
        """Add up the gradient of all micro-batches; returns the mean loss of each patch, (N*N,).

        When memory runs out, the step is repeated with smaller passes and the same random draws.

        Raises:
            InputError: a single patch does not fit, or memory runs out while gradients are exchanged.
        """
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                losses = [self._backward(step, micro_step, x_0) for micro_step, x_0 in enumerate(micro_batches)]
                return torch.stack(losses).mean(dim=0)
            self._zero_gradient()
            self.diffusion.patch_batching.shrink(self._patches_a_pass(micro_batches[0]))

    def _patches_a_pass(self, x_0: Tensor) -> int:
        patches = self.diffusion.patch_divider**2 * len(x_0)
        return self.diffusion.patch_batching.size(patches, self.config.patch_batch_size)

    def _backward(self, step: int, micro_step: int, x_0: Tensor) -> Tensor:
        """Add one micro-batch's gradient; returns the mean loss of each patch, (N*N,)."""
        x_0 = x_0.to(self.accelerator.device, non_blocking=True)
        names = (self.config.seed, Purpose.DIFFUSE, step, micro_step, self.accelerator.process_index)
        random = generator(*names, device=x_0.device)
        t = torch.randint(self.diffusion.timesteps, x_0.shape[:1], generator=random, device=x_0.device)  # (b,)
        noise = torch.randn(x_0.shape, generator=random, device=x_0.device)  # (b, c, H, W)
        grids = self.diffusion.grids
        grid = torch.randint(grids, t.shape, generator=random, device=t.device) if grids > 1 else None  # (b,)

        accumulate = self.config.gradient_accumulate_every
        no_sync = functools.partial(self.accelerator.no_sync, self.diffusion.unet)
        # Processes exchange gradients in the last pass of an optimizer step.
        with contextlib.nullcontext() if micro_step == accumulate - 1 else no_sync():
            losses = self.diffusion.accumulate_gradient(
                x_0,
                t,
                noise,
                self.config.patch_batch_size,
                grid=grid,
                micro_batches=accumulate,
                backward=functools.partial(self._backward_pass, x_0),
                no_sync=no_sync,
            )
            return reduce(torch.cat(list(losses)), "(s b) -> s", "mean", b=len(x_0))

    def _backward_pass(self, x_0: Tensor, loss: Tensor) -> None:
        """Raises InputError when memory runs out while several processes exchange gradients."""
        try:
            self.accelerator.backward(loss)
        except torch.OutOfMemoryError as error:
            if self.accelerator.num_processes == 1 or not self.diffusion.unet.require_backward_grad_sync:
                raise
            raise InputError(  # the other processes take part in the exchange and would not repeat it
                f"the device of process {self.accelerator.process_index} ran out of memory while gradients were "
                f"exchanged, with {self._patches_a_pass(x_0)} patches in a pass; set trainer.patch_batch_size to less."
            ) from error

    def _clip(self) -> Tensor:
        """Clip the gradient if the config says so; returns its norm before clipping."""
        parameters = list(self.diffusion.parameters())
        if self.config.max_grad_norm is not None:
            return self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self.accelerator.unscale_gradients()
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
