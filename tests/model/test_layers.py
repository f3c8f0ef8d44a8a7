import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from patch_based_ddpm.model.layers import (
    Attention,
    ChannelLayerNorm,
    Conv2d,
    GroupNorm,
    LinearAttention,
    ResBlock,
    SinusoidalEmbedding,
)


def randomised(module):
    """In float64, with gains and biases that are not just ones and zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def layer_norm(x, gain, bias):
    """Over the channels of each pixel, from its definition."""
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * gain[None, :, None, None] + bias[None, :, None, None]


def softmax(x, dim):
    return x.exp() / x.exp().sum(dim, keepdim=True)


def test_sinusoids_by_hand():
    steps, dim = [0, 1, 7, 999], 12
    frequencies = [math.exp(-k * math.log(10000) / 5) for k in range(6)]
    wanted = [[math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies] for t in steps]
    got = SinusoidalEmbedding(dim)(torch.tensor(steps))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(wanted), atol=1e-4, rtol=0)


def test_channel_layer_norm_by_hand():
    norm = ChannelLayerNorm(2).double()
    pixels = torch.tensor([[1.0, 3.0], [-2.0, 2.0]], dtype=torch.float64)
    norm.gain.data = torch.tensor([10.0, 20.0]).double()
    norm.bias.data = torch.tensor([0.5, -0.5]).double()
    near_1, near_2 = 1 / math.sqrt(1 + 1e-5), 2 / math.sqrt(4 + 1e-5)
    wanted = [[0.5 - 10 * near_1, -0.5 + 20 * near_1], [0.5 - 10 * near_2, -0.5 + 20 * near_2]]
    torch.testing.assert_close(norm(pixels), torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=0)


def test_channel_layer_norm_is_its_definition():
    norm, x = randomised(ChannelLayerNorm(6)), torch.randn(2, 6, 3, 5).double()
    torch.testing.assert_close(norm(x.movedim(1, -1)).movedim(-1, 1), layer_norm(x, norm.gain, norm.bias))


def test_channel_layer_norm_starts_neutral():
    x = ChannelLayerNorm(8)(torch.randn(2, 9, 8) * 5 + 2)
    torch.testing.assert_close(x.mean(-1), torch.zeros(2, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(-1, unbiased=False), torch.ones(2, 9), atol=1e-3, rtol=0)


def group_norm(x, groups, norm):
    parts = [(part - part.mean((1, 2, 3), keepdim=True)) for part in x.chunk(groups, dim=1)]
    parts = [part / ((part**2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt() for part in parts]
    return torch.cat(parts, dim=1) * norm.weight[None, :, None, None] + norm.bias[None, :, None, None]


@pytest.mark.parametrize("channels", [8, 64])  # 4 and 32 in a group
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_norm_is_its_definition_in_any_dtype_and_keeps_the_layout(channels, dtype):
    norm = GroupNorm(2, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(3, channels, 4, 6) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    got = norm(x)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.float(), group_norm(x.float(), 2, norm), atol=30 * torch.finfo(dtype).eps, rtol=0)


def silu(x):
    return x / (1 + (-x).exp())


@pytest.mark.parametrize("kernel_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_answers_in_the_layout_of_its_kernel(kernel_layout, layout):
    convolution, plain = Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
    plain.load_state_dict(convolution.state_dict())
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=kernel_layout)
    x = torch.randn(2, 6, 5, 7)
    got = convolution(x.contiguous(memory_format=layout))
    assert got.is_contiguous(memory_format=kernel_layout)
    torch.testing.assert_close(got, plain(x))


@pytest.mark.parametrize(("ins", "outs"), [(6, 8), (8, 8)])
@pytest.mark.parametrize("condition_dim", [5, None])
def test_res_block_is_its_formula(ins, outs, condition_dim):
    block = randomised(ResBlock(ins, outs, condition_dim=condition_dim, groups=4))
    x = torch.randn(2, ins, 3, 5).double()
    condition = None if condition_dim is None else torch.randn(2, condition_dim).double()

    h = group_norm(F.conv2d(x, block.conv_1.weight, block.conv_1.bias, padding=1), 4, block.norm_1)
    if condition is not None:
        modulation = condition @ block.modulation.weight.T + block.modulation.bias
        scale, shift = modulation[:, :outs], modulation[:, outs:]
        h = h * (scale[..., None, None] + 1) + shift[..., None, None]
    h = silu(group_norm(F.conv2d(silu(h), block.conv_2.weight, block.conv_2.bias, padding=1), 4, block.norm_2))
    skipped = x if ins == outs else F.conv2d(x, block.skip.weight, block.skip.bias)
    before = x.clone()
    torch.testing.assert_close(block(x, condition), h + skipped)
    with torch.no_grad():  # which writes over what it made, not over what it was given
        torch.testing.assert_close(block(x, condition), h + skipped)
    assert torch.equal(x, before)


def heads(attention, x):
    """q, k and v of each image and head as (32, pixels)."""
    normal = layer_norm(x, attention.norm.gain, attention.norm.bias)
    qkv = torch.einsum("oc,nchw->nohw", attention.to_qkv.weight[:, :, 0, 0], normal).flatten(2)
    for n in range(len(x)):
        for head in range(4):
            yield n, head, [qkv[n, 128 * part + 32 * head : 128 * part + 32 * (head + 1)] for part in range(3)]


def joined(attention, hidden, x):
    """The output projection of (n, 128, pixels)."""
    out = torch.einsum("oc,ncp->nop", attention.to_out.weight[:, :, 0, 0], hidden)
    return (out + attention.to_out.bias[:, None]).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("channels", [4, 6, 8])  # fewer than the pixels, as many, and more: two orders of products
def test_linear_attention_is_its_formula(channels):
    attention, x = randomised(LinearAttention(channels)), torch.randn(2, channels, 2, 3).double()
    hidden = torch.zeros(2, 128, 6).double()
    for n, head, (q, k, v) in heads(attention, x):
        q, k = softmax(q, 0) / math.sqrt(32), softmax(k, 1)
        context = sum(torch.outer(k[:, pixel], v[:, pixel]) for pixel in range(6))  # (key, value)
        for pixel in range(6):
            hidden[n, 32 * head : 32 * (head + 1), pixel] = context.T @ q[:, pixel]
    out = layer_norm(joined(attention, hidden, x), attention.norm_out.gain, attention.norm_out.bias)
    torch.testing.assert_close(attention(x), x + out)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), x + out)


def test_attention_is_its_formula():
    attention, x = randomised(Attention(6)), torch.randn(2, 6, 2, 3).double()
    hidden = torch.zeros(2, 128, 6).double()
    for n, head, (q, k, v) in heads(attention, x):
        for pixel in range(6):
            likeness = torch.stack([q[:, pixel] @ k[:, other] / math.sqrt(32) for other in range(6)])
            weights = softmax(likeness, 0)
            hidden[n, 32 * head : 32 * (head + 1), pixel] = sum(weights[other] * v[:, other] for other in range(6))
    torch.testing.assert_close(attention(x), x + joined(attention, hidden, x))


@pytest.mark.parametrize("kind", [Attention, LinearAttention])
def test_attention_knows_no_order_of_pixels(kind):
    attention, x = randomised(kind(6)), torch.randn(2, 6, 3, 4).double()
    order = torch.randperm(12)
    shuffled = x.flatten(2)[:, :, order].unflatten(2, (3, 4))
    torch.testing.assert_close(attention(shuffled).flatten(2), attention(x).flatten(2)[:, :, order])
