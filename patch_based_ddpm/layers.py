"""The network's building blocks: residual block, the two attentions, channel norm, embeddings of time.

Shapes: `n` patches in the pass, `c` channels, `h w` the feature map's height and width at that level.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 4
HEAD_CHANNELS = 32


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of the timestep at geometrically spaced frequencies (Vaswani et al. 2017, Sec. 3.5).

    Frequencies are exp(-k ln(10000) / (half - 1)), k = 0..half-1, half = dim / 2; all sines first, then all cosines.

    Args:
        dim: width of the embedding, even, at least 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.half = dim // 2

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps `t` (n,) int64 as (n, dim) float32."""
        k = torch.arange(self.half, device=t.device, dtype=torch.float32)
        angles = t[:, None].float() * torch.exp(-k * (math.log(10000) / (self.half - 1)))  # (n, dim/2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (n, dim)


class ChannelLayerNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, biased variance, eps 1e-5.

    Args:
        channels: c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (n, c, h, w)."""
        pixels = rearrange(x, "n c h w -> n h w c")
        pixels = F.layer_norm(pixels, self.gain.shape, self.gain, self.bias, eps=1e-5)
        return rearrange(pixels, "n h w c -> n c h w")


class ResBlock(nn.Module):
    """Two convolutions with a residual connection, the first one's output scaled and shifted by the condition.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        condition_dim: width of the condition; None for a block without one.
        groups: groups of the group normalisations; divides out_channels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, condition_dim: int | None, groups: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_1 = nn.GroupNorm(groups, out_channels)
        self.modulation = None if condition_dim is None else nn.Linear(condition_dim, 2 * out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(groups, out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map `x` (n, in_channels, h, w) under `condition` (n, condition_dim) to (n, out_channels, h, w)."""
        h = self.norm_1(self.conv_1(x))
        if self.modulation is not None:
            scale, shift = self.modulation(F.silu(condition))[:, :, None, None].chunk(2, dim=1)
            h = h * (scale + 1) + shift
        h = F.silu(self.norm_2(self.conv_2(F.silu(h))))
        return h + self.skip(x)


class LinearAttention(nn.Module):
    """Pre-norm residual attention, its cost linear in the pixels (Shen et al. 2021, "Efficient Attention").

    Args:
        channels: c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_CHANNELS, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_CHANNELS, channels, 1)
        self.norm_out = ChannelLayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention(norm(x)) for `x` (n, c, h, w)."""
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "n (qkv a c) h w -> qkv n a c (h w)", qkv=3, a=HEADS)
        q = q.softmax(dim=-2) * HEAD_CHANNELS**-0.5  # over the channels of a head
        k = k.softmax(dim=-1)  # over the pixels
        context = k @ v.transpose(-1, -2)  # (n, a, c, c)
        out = context.transpose(-1, -2) @ q  # (n, a, c, h*w)
        out = rearrange(out, "n a c (h w) -> n (a c) h w", h=x.shape[-2])
        return x + self.norm_out(self.to_out(out))


class Attention(nn.Module):
    """Pre-norm residual softmax attention over the pixels (Vaswani et al. 2017, eq. 1), without an output norm.

    Args:
        channels: c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_CHANNELS, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_CHANNELS, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention(norm(x)) for `x` (n, c, h, w)."""
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "n (qkv a c) h w -> qkv n a (h w) c", qkv=3, a=HEADS)
        out = F.scaled_dot_product_attention(q, k, v)  # (n, a, h*w, c)
        return x + self.to_out(rearrange(out, "n a (h w) c -> n (a c) h w", h=x.shape[-2]))
