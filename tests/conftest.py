"""Fixtures that several test modules share."""

import pytest
import torch
from accelerate.state import AcceleratorState

from patch_based_ddpm import Config

# Networks this small only wait for each other's threads, above all on a machine that does other things too.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often test_survival kills a run (default: 4)")


@pytest.fixture(autouse=True)
def _seeded():
    """Freshly initialised networks and `torch.randn` are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerator_left():
    """accelerate keeps precision and devices for the whole process; each test chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_config(tmp_path):
    """Builds a tiny configuration: `make_config(model={"patch_divider": 1}, trainer={...}, diffusion={...})`."""

    def make(**sections):
        data = {
            "trainer": {
                "train_dataset_dir": "builtin:faces",
                "log_dir": str(tmp_path / "run"),
                "train_batch_size": 2,
                "train_num_steps": 2,
                "num_workers": 0,
            },
            # Two channels a group: with one, the bias before a group normalisation would have no gradient.
            "model": {"dim": 8, "dim_mults": [1, 2], "resnet_block_groups": 4, "patch_divider": 2, "image_size": 8},
            "diffusion": {"timesteps": 10},
        }
        return Config.from_dict({name: {**data[name], **sections.get(name, {})} for name in data})

    return make


SCHEDULE_BUFFERS = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


def _convolution(name, outs, ins, *kernel):
    return {f"{name}.weight": (outs, ins, *kernel), f"{name}.bias": (outs,)}


def _norm(name, width):
    return {f"{name}.g": (1, width, 1, 1), f"{name}.b": (1, width, 1, 1)}


def _block(name, ins, outs, condition):
    shapes = _convolution(f"{name}.mlp.1", 2 * outs, condition) if condition else {}
    for number, width in ((1, ins), (2, outs)):
        shapes |= _convolution(f"{name}.block{number}.proj", outs, width, 3, 3)
        shapes |= {f"{name}.block{number}.norm.weight": (outs,), f"{name}.block{number}.norm.bias": (outs,)}
    return shapes | (_convolution(f"{name}.res_conv", outs, ins, 1, 1) if ins != outs else {})


def _attention(name, width, linear):
    shapes = {f"{name}.fn.fn.to_qkv.weight": (384, width, 1, 1)}
    shapes |= _convolution(f"{name}.fn.fn.to_out" + (".0" if linear else ""), width, 128, 1, 1)
    shapes |= _norm(f"{name}.fn.fn.to_out.1", width) if linear else {}
    return shapes | _norm(f"{name}.fn.norm", width)


def _level(name, ins, outs, condition, resampled):
    shapes = _block(f"{name}.0", ins, outs, condition) | _block(f"{name}.1", outs, outs, condition)
    shapes |= _attention(f"{name}.2", outs, linear=True)
    return shapes | (_convolution(f"{name}.3", outs, outs, 4, 4) if resampled else {})


@pytest.fixture(scope="session")
def published_shapes():
    """Names and shapes of a published state dict, in its order: `published_shapes(dim, mults, N)`."""

    def shapes(dim, mults, patch_divider, channels=3, timesteps=1000):
        widths, first = [dim * mult for mult in mults], dim // 3 * 2
        encoder, decoder, embedding = "_patched_encoder", "_patched_decoder", "_embedding"
        inner = _convolution(f"{encoder}._init_conv", first, 2 * channels, 7, 7)
        for i, width in enumerate(widths):
            before = first if i == 0 else widths[i - 1]
            inner |= _level(f"{encoder}._downsLayers.{i}", before, width, 4 * dim, i < len(widths) - 1)
        inner |= _block(f"{decoder}.mid_block1", widths[-1], widths[-1], 4 * dim)
        inner |= _attention(f"{decoder}.mid_attn", widths[-1], linear=False)
        inner |= _block(f"{decoder}.mid_block2", widths[-1], widths[-1], 4 * dim)
        inner |= _convolution(f"{decoder}._embedder", 4 * dim, dim)
        for i in range(len(widths) - 1):
            inner |= _level(f"{decoder}.ups.{i}", 2 * widths[-1 - i], widths[-2 - i], 4 * dim, True)
        inner |= _block(f"{decoder}.final_conv.0", dim, dim, None)
        inner |= _convolution(f"{decoder}.final_conv.1", channels, dim, 1, 1)
        inner |= _convolution(f"{embedding}._time_embedding_layer.1", dim, dim)
        inner |= _convolution(f"{embedding}._pos_embedding_layer.0", dim, patch_divider**2)
        inner |= _convolution(f"{embedding}._mapping.0", 4 * dim, 2 * dim)
        buffers = dict.fromkeys(SCHEDULE_BUFFERS, (timesteps,))
        return buffers | {f"denoise_fn.{name}": shape for name, shape in inner.items()}

    return shapes


@pytest.fixture(scope="session")
def published_state(published_shapes):
    """A published state dict of random weights: `published_state(seed, dim, mults, N, ...)`."""

    def state(seed, *geometry, **more):
        generator = torch.Generator().manual_seed(seed)
        shapes = published_shapes(*geometry, **more)
        return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}

    return state
