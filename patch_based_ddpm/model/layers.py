"""The layers of the network: residual block, linear and softmax attention, norms, timestep embedding.

Feature maps are in PyTorch's `channels_last` memory format: convolutions are fastest in it, and the attentions reshape
it to (n, pixels, channels) without a copy. Where a layer returns the contiguous format (PyTorch's group norm on a GPU),
the next convolution converts it back. `UNet.set_memory_format` names the exceptions.

Shapes: `n` patches in the pass, `c` channels, `h w` the feature map's height and width at that level, `p` its pixels.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 4
HEAD_CHANNELS = 32
CPU_VECTOR = 16  # float32 values in one vector of PyTorch's CPU kernels


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of the timestep at geometrically spaced frequencies (Vaswani et al. 2017, Sec. 3.5).

    Frequencies are exp(-k ln(10000) / (half - 1)), k = 0..half-1, half = dim / 2; all sines first, then all cosines.
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
    """Layer normalisation over the channels of each pixel, biased variance, eps 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise `pixels` (..., c)."""
        with _in_dtype_of(pixels):
            gain, bias = self.gain.to(pixels.dtype), self.bias.to(pixels.dtype)
            return F.layer_norm(pixels, gain.shape, gain, bias, eps=1e-5)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) that returns the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (n, c, h, w)."""
        narrow = self.num_channels // self.num_groups < CPU_VECTOR
        if narrow and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
            # Here PyTorch's kernel for channels_last is not vectorised: 3 to 13 times slower than with two copies.
            return self._normalise(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        with _in_dtype_of(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Conv2d(nn.Conv2d):
    """A convolution that converts its input to the memory format of its kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_contiguous(memory_format=torch.channels_last):  # PyTorch converts by itself
            return super().forward(x)
        return super().forward(x.contiguous())


class ResBlock(nn.Module):
    """Two convolutions with a residual connection; the condition, if any, scales and shifts the output of the first."""

    def __init__(self, in_channels: int, out_channels: int, *, condition_dim: int | None, groups: int) -> None:
        super().__init__()
        self.conv_1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_1 = GroupNorm(groups, out_channels)
        self.modulation = None if condition_dim is None else nn.Linear(condition_dim, 2 * out_channels)
        self.conv_2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm_2 = GroupNorm(groups, out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map `x` (n, in_channels, h, w) to (n, out_channels, h, w); `condition` is (n, condition_dim) after SiLU."""
        h = self.norm_1(self.conv_1(x))
        if self.modulation is not None:
            scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, scale + 1, out=_in_place(h))
        h = F.silu(h, inplace=_may_overwrite())
        h = F.silu(self.norm_2(self.conv_2(h)), inplace=_may_overwrite())
        return torch.add(h, self.skip(x), out=_in_place(h))


class Attention(nn.Module):
    """Pre-norm residual softmax attention over the pixels (Vaswani et al. 2017, eq. 1), without an output norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_CHANNELS, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_CHANNELS, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention(norm(x)) for `x` (n, c, h, w)."""
        pixels = rearrange(x, "n c h w -> n (h w) c")
        qkv = F.linear(self.norm(pixels), self.to_qkv.weight.flatten(1))
        q, k, v = rearrange(qkv, "n p (qkv a c) -> qkv n a p c", qkv=3, a=HEADS)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "n a p c -> n p (a c)")
        out = pixels + F.linear(out, self.to_out.weight.flatten(1), self.to_out.bias)
        return rearrange(out, "n (h w) c -> n c h w", h=x.shape[-2])


class LinearAttention(Attention):
    """Pre-norm residual attention, its cost linear in the pixels (Shen et al. 2021, "Efficient Attention")."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm_out = ChannelLayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention(norm(x)) for `x` (n, c, h, w)."""
        pixels = rearrange(x, "n c h w -> n (h w) c")
        out = self.norm_out(self._attend(self.norm(pixels)))
        out = torch.add(out, pixels, out=_in_place(out))
        return rearrange(out, "n (h w) c -> n c h w", h=x.shape[-2])

    def _attend(self, pixels: Tensor) -> Tensor:
        """Attention of `pixels` (n, p, c) and its output projection.

        The published order of the products is (q (k^T v)) W. Where there are more pixels than channels,
        q ((k^T v) W) needs less computation and memory.
        """
        to_q, to_k, to_v = self.to_qkv.weight.flatten(1).chunk(3)  # (128, c) each
        to_out = self.to_out.weight.flatten(1)  # (c, 128)
        contexts = self._contexts(pixels, to_k, to_v)  # (n, 32, 32) each
        q = F.linear(pixels, to_q).unflatten(-1, (HEADS, HEAD_CHANNELS))
        q = _softmax(q, dim=-1).flatten(-2)  # (n, p, 128)
        if pixels.shape[1] > pixels.shape[2]:
            folded = torch.cat([context @ head.t() for context, head in zip(contexts, _heads(to_out))], dim=1)
            return torch.baddbmm(self.to_out.bias, q, folded)  # (n, p, c), from (n, 128, c)
        answers = [head @ context for context, head in zip(contexts, _heads(q))]  # (n, p, 32) each
        return F.linear(torch.cat(answers, dim=-1), to_out, self.to_out.bias)  # (n, p, c)

    @staticmethod
    def _contexts(pixels: Tensor, to_k: Tensor, to_v: Tensor) -> list[Tensor]:
        """k^T v / sqrt(32) of each head, with k after its softmax over pixels. Frees k and v before q is computed."""
        k = _softmax(F.linear(pixels, to_k), dim=1)  # (n, p, 128)
        v = F.linear(pixels, to_v)  # (n, p, 128)
        return [k.mT @ v * HEAD_CHANNELS**-0.5 for k, v in zip(_heads(k), _heads(v))]


def _softmax(x: Tensor, dim: int) -> Tensor:
    with _in_dtype_of(x):
        return x.softmax(dim=dim)


def _in_dtype_of(x: Tensor) -> torch.autocast:
    """Turn autocast off: on a GPU it returns float32 from norms and softmaxes, which doubles the memory.

    Their kernels compute in float32 for every dtype of input and output.
    """
    return torch.autocast(x.device.type, enabled=False)


def _heads(x: Tensor) -> tuple[Tensor, ...]:
    """Each head's part of (..., 128), as views."""
    return x.split(HEAD_CHANNELS, dim=-1)


def _may_overwrite() -> bool:
    """Whether a layer may overwrite its input, because no backward pass needs it."""
    return not torch.is_grad_enabled()


def _in_place(x: Tensor) -> Tensor | None:
    """The argument `out=` of an operator that may overwrite `x`."""
    return x if _may_overwrite() else None
