"""The network without our optimisations: the baseline of the benchmark, and a reference for tests.

It has the layers of the paper and its published code, and none of the savings of `model/layers.py`: tensors are in
channels-first layout, attention keeps queries, keys and values of all heads, nothing is computed in place, and the
full-resolution skip, which no layer reads, is stored. Parameters have the names and shapes of `UNet`'s.

Shapes: `n` patches in the pass, `c` channels, `h w` the feature map's height and width at that level, `a` heads,
`d` dim, `m` dim_mults.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from patch_based_ddpm.config import ModelConfig

HEADS = 4
HEAD_CHANNELS = 32
EPS = 1e-5


class Condition(nn.Module):
    """Timestep and position as one vector, see `unet.Condition`; each block applies the activation itself."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.dim = model.dim
        self.time = nn.Linear(model.dim, model.dim)
        self.position = nn.Linear(model.positions, model.dim) if model.position_conditioning else None
        self.join = nn.Linear(2 * model.dim if model.position_conditioning else model.dim, 4 * model.dim)

    def forward(self, t: Tensor, position: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
        angles = t[:, None] * frequencies[None, :]  # (n, d/2)
        sinusoids = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # (n, d)
        parts = [F.gelu(self.time(sinusoids.to(self.time.weight.dtype)))]
        if self.position is not None:
            parts.append(F.gelu(self.position(position.to(self.position.weight.dtype))))
        return self.join(torch.cat(parts, dim=1))  # (n, 4d)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel: (x - mean) / sqrt(variance + eps) * gain + bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)  # (n, 1, h, w)
        variance = x.var(dim=1, unbiased=False, keepdim=True)  # (n, 1, h, w)
        return (x - mean) / (variance + EPS).sqrt() * self.gain[:, None, None] + self.bias[:, None, None]


class ResBlock(nn.Module):
    """Convolution, norm, modulation, SiLU; convolution, norm, SiLU; plus the input."""

    def __init__(self, in_channels: int, out_channels: int, model: ModelConfig, *, conditioned: bool = True) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_1 = nn.GroupNorm(model.resnet_block_groups, out_channels, eps=EPS)
        self.modulation = nn.Linear(4 * model.dim, 2 * out_channels) if conditioned else None
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(model.resnet_block_groups, out_channels, eps=EPS)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.norm_1(self.conv_1(x))
        if self.modulation is not None:
            scale, shift = self.modulation(F.silu(condition))[:, :, None, None].chunk(2, dim=1)
            h = h * (scale + 1) + shift
        h = F.silu(h)
        h = F.silu(self.norm_2(self.conv_2(h)))
        return h + self.skip(x)  # (n, out_channels, h, w)


class Attention(nn.Module):
    """Softmax attention over all pairs of pixels, pre-norm and residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_CHANNELS, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_CHANNELS, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        similarity = einsum("naci,nacj->naij", q * HEAD_CHANNELS**-0.5, k)  # (n, a, h*w, h*w)
        out = einsum("naij,nacj->naci", similarity.softmax(dim=-1), v)  # (n, a, 32, h*w)
        return x + self._project(out, x.shape[2])

    def _heads(self, x: Tensor) -> Tensor:
        """q, k and v, (3, n, a, 32, h*w)."""
        qkv = self.to_qkv(self.norm(x))  # (n, 3*128, h, w)
        return rearrange(qkv, "n (qkv a c) h w -> qkv n a c (h w)", qkv=3, a=HEADS)

    def _project(self, out: Tensor, height: int) -> Tensor:
        return self.to_out(rearrange(out, "n a c (h w) -> n (a c) h w", h=height))  # (n, c, h, w)


class LinearAttention(Attention):
    """Attention through a 32 x 32 summary of each head's pixels, pre-norm and residual, with an output norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm_out = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        q = q.softmax(dim=2) * HEAD_CHANNELS**-0.5
        k = k.softmax(dim=3)
        context = einsum("nacp,naep->nace", k, v)  # (n, a, 32, 32)
        out = einsum("nace,nacp->naep", context, q)  # (n, a, 32, h*w)
        return x + self.norm_out(self._project(out, x.shape[2]))


class Level(nn.Module):
    """Two residual blocks, a linear attention, and the change of resolution after them."""

    def __init__(self, in_channels: int, out_channels: int, model: ModelConfig, resample: nn.Module) -> None:
        super().__init__()
        self.block_1 = ResBlock(in_channels, out_channels, model)
        self.block_2 = ResBlock(out_channels, out_channels, model)
        self.attention = LinearAttention(out_channels)
        self.resample = resample

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.attention(self.block_2(self.block_1(x, condition), condition))


class BaselineUNet(nn.Module):
    """Predicts the noise (or x_0, or v) of noisy patches, as `UNet` does."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.global_content = model.global_content_conditioning
        widths = [model.dim * mult for mult in model.dim_mults]
        self.condition = Condition(model)
        in_channels = 2 * model.channels if self.global_content else model.channels
        self.conv_in = nn.Conv2d(in_channels, model.first_width, 7, padding=3)

        self.encoder = nn.ModuleList()
        for before, width in zip([model.first_width, *widths], widths):
            downsample = nn.Conv2d(width, width, 4, stride=2, padding=1)
            self.encoder.append(Level(before, width, model, downsample))
        self.encoder[-1].resample = nn.Identity()

        self.middle_1 = ResBlock(widths[-1], widths[-1], model)
        self.middle_attention = Attention(widths[-1])
        self.middle_2 = ResBlock(widths[-1], widths[-1], model)

        self.decoder = nn.ModuleList()
        for width, after in zip(widths[:0:-1], widths[-2::-1]):
            upsample = nn.ConvTranspose2d(after, after, 4, stride=2, padding=1)
            self.decoder.append(Level(2 * width, after, model, upsample))

        self.block_out = ResBlock(model.dim, model.dim, model, conditioned=False)
        self.conv_out = nn.Conv2d(model.dim, model.channels, 1)

    def forward(self, patches: Tensor, content: Tensor, position: Tensor, t: Tensor) -> Tensor:
        """Denoise patches, with the arguments of `UNet.forward`."""
        condition = self.condition(t, position)  # (n, 4d)
        x = self.conv_in(torch.cat([patches, content], dim=1) if self.global_content else patches)

        skips = []
        for level in self.encoder:
            x = level(x, condition)  # (n, d*m, h, w)
            skips.append(x)
            x = level.resample(x)  # (n, d*m, h/2, w/2)

        x = self.middle_1(x, condition)
        x = self.middle_attention(x)
        x = self.middle_2(x, condition)

        for level in self.decoder:
            x = level(torch.cat([x, skips.pop()], dim=1), condition)  # (n, d*m', h, w)
            x = level.resample(x)  # (n, d*m', 2h, 2w)

        return self.conv_out(self.block_out(x))  # (n, c, h, w)
