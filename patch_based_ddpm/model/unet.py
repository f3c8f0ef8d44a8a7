"""The denoising network: one UNet for all patches, conditioned on the position and on the global content.

It sees patches only: `patches.py` prepares its inputs, `diffusion.py` calls it.

Shapes: `n` patches in the pass, `c` image channels, `h w` patch, `N` patches a side, `G` grids, `d` dim, `m` dim_mults.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from patch_based_ddpm.config import ModelConfig
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.layers import Attention, Conv2d, LinearAttention, ResBlock, SinusoidalEmbedding

WIDE = 1024  # input channels from which a convolution counts as wide, see `UNet.set_memory_format`


class Condition(nn.Module):
    """The conditioning vector of all residual blocks: timestep and one-hot position, joined."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        dim, positioned = model.dim, model.position_conditioning
        self.sinusoid = SinusoidalEmbedding(dim)
        self.time = nn.Linear(dim, dim)
        self.position = nn.Linear(model.positions, dim) if positioned else None
        self.join = nn.Linear(2 * dim if positioned else dim, 4 * dim)

    def forward(self, t: Tensor, position: Tensor) -> Tensor:
        """Map `t` (n,) int64 and `position` (n, G*N*N) to (n, 4d), after SiLU, as residual blocks expect it."""
        dtype = self.time.weight.dtype
        features = F.gelu(self.time(self.sinusoid(t).to(dtype)))  # (n, d)
        if self.position is not None:
            features = torch.cat([features, F.gelu(self.position(position.to(dtype)))], dim=-1)  # (n, 2d)
        return F.silu(self.join(features))  # (n, 4d)


class Level(nn.Module):
    """Two residual blocks and a linear attention. The UNet applies `resample` to its output."""

    def __init__(self, in_channels: int, out_channels: int, resample: nn.Module, **block: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(in_channels, out_channels, **block)
        self.block_2 = ResBlock(out_channels, out_channels, **block)
        self.attention = LinearAttention(out_channels)
        self.resample = resample

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.attention(self.block_2(self.block_1(x, condition), condition))


class UNet(nn.Module):
    """Predicts the noise (or x_0, or v) of noisy patches. Sec. 3 of the paper.

    Attributes:
        recompute: store only the input of each level for the backward pass, and recompute the rest there.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        dim, channels, groups = model.dim, model.channels, model.resnet_block_groups
        block = {"condition_dim": 4 * dim, "groups": groups}
        widths = [dim * mult for mult in model.dim_mults]
        self.global_content = model.global_content_conditioning
        self.recompute = False
        self.condition = Condition(model)
        self.conv_in = nn.Conv2d(2 * channels if self.global_content else channels, model.first_width, 7, padding=3)

        self.encoder = nn.ModuleList()
        for i, (narrow, wide) in enumerate(zip([model.first_width, *widths], widths)):
            last = i == len(widths) - 1
            downsample = nn.Identity() if last else nn.Conv2d(wide, wide, 4, stride=2, padding=1)
            self.encoder.append(Level(narrow, wide, downsample, **block))

        self.middle_1 = ResBlock(widths[-1], widths[-1], **block)
        self.middle_attention = Attention(widths[-1])
        self.middle_2 = ResBlock(widths[-1], widths[-1], **block)

        self.decoder = nn.ModuleList()
        for narrow, wide in reversed(list(zip(widths, widths[1:]))):
            upsample = nn.ConvTranspose2d(narrow, narrow, 4, stride=2, padding=1)
            self.decoder.append(Level(2 * wide, narrow, upsample, **block))

        self.block_out = ResBlock(dim, dim, condition_dim=None, groups=groups)
        self.conv_out = nn.Conv2d(dim, channels, 1)
        self.set_memory_format()

    def set_memory_format(self) -> None:
        """Choose the memory format of each kernel for its device and dtype. `to()` and `cuda()` call it.

        It is `channels_last`, as that of the feature maps (see layers.py), except for wide convolutions of residual
        blocks on a CPU in float32: with few pixels a map, PyTorch is up to twice as fast in the contiguous format.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                kernel = module.weight
                wide = isinstance(module, Conv2d) and kernel.shape[1] >= WIDE  # our Conv2d converts its input
                contiguous = wide and kernel.device.type == "cpu" and kernel.dtype == torch.float32
                memory_format = torch.contiguous_format if contiguous else torch.channels_last
                kernel.data = kernel.data.contiguous(memory_format=memory_format)

    def _apply(self, *args: Any, **kwargs: Any) -> UNet:
        """Called by `to()`, `cuda()` and the like."""
        super()._apply(*args, **kwargs)
        self.set_memory_format()
        return self

    @classmethod
    def from_config(cls, model: ModelConfig) -> UNet:
        """Build a freshly initialised network.

        Raises:
            InputError: its weights do not fit into memory.
        """
        try:
            with torch.device("meta"):
                size = sum(parameter.nbytes for parameter in cls(model).parameters())
            torch.empty(size, dtype=torch.uint8)  # at once, as the system may grant parts and then kill
        except RuntimeError:
            raise InputError(
                f"model.dim is {model.dim} and model.dim_mults {list(model.dim_mults)}; the weights of this network do "
                "not fit into the machine's memory."
            ) from None
        return cls(model)

    def forward(self, patches: Tensor, content: Tensor, position: Tensor, t: Tensor) -> Tensor:
        """Denoise the patches of a `PatchBatch`; returns noise, x_0 or v (n, c, h, w), depending on the objective."""
        condition = self.condition(t, position)  # (n, 4d)
        x = torch.cat([patches, content], dim=1) if self.global_content else patches  # (n, 2c, h, w)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # (n, init_dim, h, w)

        skips = []
        for i, level in enumerate(self.encoder):
            x = self._run(level, x, condition)  # (n, d*m, h, w)
            if i > 0:  # The published network also stores a full-resolution skip, which nothing reads.
                skips.append(x)
            x = level.resample(x)  # (n, d*m, h/2, w/2)

        x = self._run(self.middle_1, x, condition)
        x = self._run(self.middle_2, self.middle_attention(x), condition)

        for level in self.decoder:
            x = torch.cat([x, skips.pop()], dim=1)  # (n, 2*d*m, h, w)
            x = level.resample(self._run(level, x, condition))  # (n, d*m', 2h, 2w)

        return self.conv_out(self._run(self.block_out, x))  # (n, c, h, w)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)
