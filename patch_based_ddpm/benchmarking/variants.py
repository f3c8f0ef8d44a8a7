"""Variants of a training step that are compared on a GPU: precision, compilation, group norm and optimizer.

All of them compute the same loss and gradient, up to rounding. What pays on a GPU moves into `model/` or `training/`.

Shapes: `n` patches in the pass, `c` channels, `g` groups, `h w` the feature map's height and width, `p` its pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from patch_based_ddpm.benchmarking.baseline_unet import BaselineUNet
from patch_based_ddpm.command_line import compile_options
from patch_based_ddpm.config import Config
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.model.layers import GroupNorm, ResBlock
from patch_based_ddpm.model.unet import UNet


class PixelGroupNorm(GroupNorm):
    """Group normalisation as sums over pixels: it keeps the `channels_last` format, which PyTorch's kernel does not."""

    def _normalise(self, x: Tensor) -> Tensor:
        pixels = rearrange(x, "n (g c) h w -> n (h w) g c", g=self.num_groups).float()
        variance, mean = torch.var_mean(pixels, dim=(1, 3), keepdim=True, correction=0)  # (n, 1, g, 1)
        normal = ((pixels - mean) * (variance + self.eps).rsqrt()).flatten(2)  # (n, p, c)
        out = normal * self.weight.float() + self.bias.float()
        return rearrange(out, "n (h w) c -> n c h w", h=x.shape[-2]).to(x.dtype)


class FusedResBlock(ResBlock):
    """Compiles what lies between the convolutions, norm, scale, shift and SiLU, and nothing else."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        norm_act = _compiled_norm_act()
        modulation = None if self.modulation is None else self.modulation(condition)  # (n, 2c)
        h = norm_act(self.norm_1, self.conv_1(x), modulation, None)
        return norm_act(self.norm_2, self.conv_2(h), None, self.skip(x))


@cache
def _compiled_norm_act() -> Any:
    return torch.compile(_norm_act, dynamic=True)


def _norm_act(norm: PixelGroupNorm, x: Tensor, modulation: Tensor | None, skip: Tensor | None) -> Tensor:
    h = norm(x)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, h, scale + 1)
    h = F.silu(h)
    return h if skip is None else h + skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run a training step.

    Attributes:
        network: "ours" or "baseline".
        bf16: autocast over float32 weights.
        tf32: TensorFloat-32 for the float32 matrix products and convolutions of a GPU.
        compiled: "network" as `train` does; "loss": the network, the crop and the loss in one graph; None: eager.
        options: of torch.compile, added to those of `train`; a `mode` replaces theirs.
        norm: "torch"; "pixels": `PixelGroupNorm`; "fused": `FusedResBlock` as well.
        foreach: Adam in loops over lists of tensors instead of one fused kernel.
    """

    network: str = "ours"
    bf16: bool = False
    tf32: bool = False
    compiled: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    norm: str = "torch"
    foreach: bool = False

    def build(self, config: Config, device: torch.device) -> tuple[GaussianDiffusion, torch.optim.Adam]:
        """A freshly initialised model and its optimizer."""
        unet = (BaselineUNet if self.network == "baseline" else UNet.from_config)(config.model).to(device)
        for module in unet.modules():
            _replace(module, self.norm)
        adam = torch.optim.Adam(unet.parameters(), lr=config.trainer.train_lr, fused=not self.foreach)
        diffusion = GaussianDiffusion(unet, config).to(device)
        options = compile_options(device, sampling=False) | self.options
        if "options" in options:
            options.pop("mode")  # torch.compile takes one of both
        if self.compiled == "network":
            unet.compile(fullgraph=True, **options)
        elif self.compiled == "loss":
            diffusion.patch_losses = torch.compile(diffusion.patch_losses, fullgraph=True, **options)
        diffusion.patch_batching.padded = self.compiled is not None
        return diffusion, adam

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stay allocated: those that a CUDA graph returns lie in memory that its next run uses."""
        return self.options.get("mode") == "reduce-overhead"

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Set TF32 for the whole process, and restore what was set before."""
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


def _replace(module: nn.Module, norm: str) -> None:
    """Let a module's class be that of the variant; both classes have the same parameters."""
    if isinstance(module, GroupNorm) and norm in ("pixels", "fused"):
        module.__class__ = PixelGroupNorm
    elif isinstance(module, ResBlock) and norm == "fused":
        module.__class__ = FusedResBlock


VARIANTS = {
    "baseline": Variant(network="baseline"),
    "bf16-compiled": Variant(bf16=True, compiled="network"),
    "bf16": Variant(bf16=True),
    "float32": Variant(),
    "float32-compiled": Variant(compiled="network"),
    "tf32": Variant(tf32=True),
    "bf16-baseline": Variant(network="baseline", bf16=True),
    "bf16-compiled-loss": Variant(bf16=True, compiled="loss"),
    "bf16-compiled-pixel-norm": Variant(bf16=True, compiled="network", norm="pixels"),
    "bf16-fused-norm": Variant(bf16=True, norm="fused"),
    "bf16-compiled-foreach": Variant(bf16=True, compiled="network", foreach=True),
    "bf16-cuda-graphs": Variant(bf16=True, compiled="network", options={"mode": "reduce-overhead"}),
    "bf16-products-1x1": Variant(
        bf16=True, compiled="network", options={"options": {"conv_1x1_as_mm": True, "max_autotune_gemm": True}}
    ),
    "bf16-autotuned": Variant(bf16=True, compiled="network", options={"mode": "max-autotune-no-cudagraphs"}),
}
