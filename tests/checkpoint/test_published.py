import hashlib
import math

import pytest
import torch
from torch.nn import functional as F

from patch_based_ddpm import UNet
from patch_based_ddpm.checkpoint.published import is_published, translate_optimizer, translate_weights

GEOMETRIES = [
    (8, (1, 2), 2),
    (8, (1, 2, 4), 4),
    (16, (1, 2, 4, 8), 1),
    (24, (1, 1, 3), 3),
    (8, (1,), 2),
    (8, (1, 2, 1), 2),
]
each_geometry = pytest.mark.parametrize(("dim", "mults", "N"), GEOMETRIES)


@pytest.fixture
def make_network(make_config):
    def make(dim, mults, N, channels=3):
        size = N * 2 ** (len(mults) - 1)
        model = {"dim": dim, "dim_mults": list(mults), "patch_divider": N, "image_size": size, "channels": channels}
        return UNet.from_config(make_config(model=model | {"resnet_block_groups": 8}).model)

    return make


def test_the_published_layout_is_the_published_one(published_shapes):
    """The names and shapes of the published network for dim 128, 4 x 4 patches, by their fingerprint."""
    shapes = published_shapes(128, (1, 2, 4, 8), 4)
    lines = "\n".join(sorted(f"{name} {list(shape)}" for name, shape in shapes.items()))
    fingerprint = hashlib.sha256(lines.encode()).hexdigest()
    assert fingerprint == "58bc662f2550dd8923803781d6fbfa8009a5ee3bdcfc91d6a1544d540caaf02a"
    assert sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("denoise_fn.")) == 126_851_919


@each_geometry
@pytest.mark.parametrize("channels", [1, 3])
def test_translated_weights_fit_the_network_exactly(make_network, published_state, dim, mults, N, channels):
    network = make_network(dim, mults, N, channels)
    state = published_state(1, dim, mults, N, channels=channels)
    weights = translate_weights(state)
    ours = network.state_dict()
    assert {name: values.shape for name, values in weights.items()} == {
        name: values.shape for name, values in ours.items()
    }
    network.load_state_dict(weights)
    # every value is used once, the idle layer's apart
    used = sum(values.double().sum() for name, values in state.items() if name.startswith("denoise_fn."))
    idle = sum(values.double().sum() for name, values in state.items() if "_embedder" in name)
    assert sum(values.double().sum() for values in weights.values()).item() == pytest.approx((used - idle).item())


def published_network(state, dim, levels, patches, content, position, t):
    """The published network, written out in functions that take its weights by their published names."""

    def affine(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def channel_norm(name, x):
        variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.g"] + state[f"{name}.b"]

    def block(name, x, vector=None):
        h = conv(f"{name}.block1.proj", x, padding=1)
        h = F.group_norm(h, 8, state[f"{name}.block1.norm.weight"], state[f"{name}.block1.norm.bias"], 1e-5)
        if vector is not None:
            modulation = affine(f"{name}.mlp.1", F.silu(vector))[..., None, None]
            width = modulation.shape[1] // 2
            h = h * (modulation[:, :width] + 1) + modulation[:, width:]
        h = conv(f"{name}.block2.proj", F.silu(h), padding=1)
        h = F.group_norm(h, 8, state[f"{name}.block2.norm.weight"], state[f"{name}.block2.norm.bias"], 1e-5)
        return F.silu(h) + (conv(f"{name}.res_conv", x) if f"{name}.res_conv.weight" in state else x)

    def attention(name, x, linear):
        qkv = conv(f"{name}.fn.fn.to_qkv", channel_norm(f"{name}.fn.norm", x))
        q, k, v = qkv.reshape(len(x), 3, 4, 32, -1).unbind(1)  # (n, heads, channels, pixels)
        if linear:
            context = torch.einsum("nadp,naep->nade", k.softmax(-1), v)
            out = torch.einsum("nade,nadp->naep", context, q.softmax(-2) / math.sqrt(32))
        else:
            likeness = torch.einsum("nadp,nadr->napr", q / math.sqrt(32), k)
            out = torch.einsum("napr,nadr->nadp", likeness.softmax(-1), v)
        out = out.reshape(len(x), 128, *x.shape[2:])
        if linear:
            return x + channel_norm(f"{name}.fn.fn.to_out.1", conv(f"{name}.fn.fn.to_out.0", out))
        return x + conv(f"{name}.fn.fn.to_out", out)

    def level(name, x, vector):
        return attention(f"{name}.2", block(f"{name}.1", block(f"{name}.0", x, vector), vector), linear=True)

    state = {name.removeprefix("denoise_fn."): values.double() for name, values in state.items()}
    encoder, decoder, embedding = "_patched_encoder", "_patched_decoder", "_embedding"
    half = dim // 2
    angles = t[:, None] * torch.exp(-torch.arange(half) * math.log(10000) / (half - 1))
    time = F.gelu(affine(f"{embedding}._time_embedding_layer.1", torch.cat([angles.sin(), angles.cos()], 1).double()))
    place = F.gelu(affine(f"{embedding}._pos_embedding_layer.0", position.double()))
    vector = affine(f"{embedding}._mapping.0", torch.cat([time, place], 1))

    x = conv(f"{encoder}._init_conv", torch.cat([patches, content], 1).double(), padding=3)
    skips = []
    for i in range(levels):
        x = level(f"{encoder}._downsLayers.{i}", x, vector)
        skips.append(x)
        if i < levels - 1:
            x = conv(f"{encoder}._downsLayers.{i}.3", x, stride=2, padding=1)
    x = block(f"{decoder}.mid_block1", x, vector)
    x = block(f"{decoder}.mid_block2", attention(f"{decoder}.mid_attn", x, linear=False), vector)
    for i in range(levels - 1):
        name = f"{decoder}.ups.{i}"
        x = level(name, torch.cat([x, skips.pop()], 1), vector)
        x = F.conv_transpose2d(x, state[f"{name}.3.weight"], state[f"{name}.3.bias"], stride=2, padding=1)
    return conv(f"{decoder}.final_conv.1", block(f"{decoder}.final_conv.0", x))


@each_geometry
def test_the_network_computes_what_the_published_one_does(make_network, published_state, dim, mults, N):
    state = published_state(2, dim, mults, N)
    network = make_network(dim, mults, N).double()
    network.load_state_dict(translate_weights(state))
    side = 2 ** (len(mults) - 1)
    patches, content = torch.randn(2, 4, 3, 2 * side, 3 * side).double()
    position, t = torch.eye(N * N)[torch.arange(4) % N**2], torch.tensor([0, 3, 1, 2])
    wanted = published_network(state, dim, len(mults), patches, content, position, t)
    # The sinusoids are float32, and the last bit of their angles is not laid down: hence small t and this tolerance.
    assert (network(patches, content, position, t) - wanted).abs().max() < 1e-3 * wanted.std()


def test_is_published(make_network, published_state):
    assert is_published(published_state(0, 8, (1, 2), 2))
    assert not is_published(make_network(8, (1, 2), 2).state_dict())
    assert not is_published({})


def test_an_unknown_name_is_kept_for_loading_to_refuse():
    weights = translate_weights({"denoise_fn._other.weight": torch.ones(1), "betas": torch.ones(9)})
    assert weights == {"_other.weight": torch.ones(1)}


@each_geometry
def test_optimizer_moments_go_to_the_parameter_of_the_translated_name(make_network, published_state, dim, mults, N):
    """Each parameter's moments are told from others' by being the parameter itself and its square."""
    network = make_network(dim, mults, N)
    state = published_state(3, dim, mults, N)
    network.load_state_dict(translate_weights(state))
    learnt = [(name, values) for name, values in state.items() if name.startswith("denoise_fn.")]
    adam = {
        "state": {
            number: {"step": torch.tensor(7.0), "exp_avg": values, "exp_avg_sq": values**2}
            for number, (name, values) in enumerate(learnt)
            if "_embedder" not in name  # the idle layer never had a gradient
        },
        "param_groups": [{"lr": 3e-4, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0, "amsgrad": False}],
    }
    adam["param_groups"][0]["params"] = list(range(len(learnt)))
    optimizer = torch.optim.Adam(network.parameters())
    names = [name for name, _ in network.named_parameters()]
    optimizer.load_state_dict(translate_optimizer(adam, state, names))
    for name, parameter in network.named_parameters():
        moments = optimizer.state[parameter]
        assert torch.equal(moments["exp_avg"], parameter), name
        assert torch.equal(moments["exp_avg_sq"], parameter.detach() ** 2), name
        assert moments["step"] == 7
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.99), 1e-7)
    network.conv_in.bias.grad = torch.ones_like(network.conv_in.bias)
    optimizer.step()  # the state is one that Adam can go on from
    assert optimizer.state[network.conv_in.bias]["step"] == 8
