"""The network written twice: `UNet` against the baseline, in float64."""

import pytest
import torch
from torch import nn

from patch_based_ddpm import GaussianDiffusion, UNet
from patch_based_ddpm.benchmarking.baseline_unet import BaselineUNet
from patch_based_ddpm.planning.live_memory import LiveMemory

GEOMETRIES = {
    "four patches": {},
    "one patch": {"patch_divider": 1},
    "one level": {"dim_mults": [1], "patch_divider": 4},
    "three levels": {"dim_mults": [1, 2, 4], "image_size": 16},
    "not square": {"dim_mults": [1, 1, 2], "image_size": [16, 24]},
    "grey, narrow start": {"channels": 1, "init_dim": 5, "dim": 12, "resnet_block_groups": 2},
    "no position": {"position_conditioning": False},
    "no content": {"global_content_conditioning": False},
    "neither": {"position_conditioning": False, "global_content_conditioning": False},
}


def both(model, randomise=True):
    """The two networks with the same weights, none of them the ones and zeros that norms and biases start with."""
    unet, baseline = UNet.from_config(model), BaselineUNet(model)
    if randomise:
        for parameter in unet.parameters():
            nn.init.normal_(parameter, std=0.2)
    baseline.load_state_dict(unet.state_dict())
    return unet.double(), baseline.double()


def inputs(model, n=5):
    """A patch per row at a position and a time of its own."""
    shape = (n, model.channels, *model.patch_shape)
    position = torch.eye(model.patch_divider**2).double()[torch.arange(n) % model.patch_divider**2]
    return torch.randn(shape).double(), torch.randn(shape).double(), position, torch.tensor([3, 0, 999, 5, 411])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_both_give_the_same_answers_and_the_same_gradients(make_config, geometry):
    model = make_config(model=GEOMETRIES[geometry]).model
    unet, baseline = both(model)
    given = inputs(model)
    wanted = torch.randn_like(given[0])
    outputs = []
    for network in (unet, baseline):
        outputs.append(network(*given))
        (outputs[-1] - wanted).abs().mean().backward()
        with torch.inference_mode():
            outputs.append(network(*given))
    assert outputs[0].std() > 0.1
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-9, rtol=1e-9)
    theirs = dict(baseline.named_parameters())
    assert list(theirs) == [name for name, _ in unet.named_parameters()]
    for name, parameter in unet.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(theirs[name].grad, parameter.grad, atol=1e-9, rtol=1e-7, msg=name)


def test_it_takes_the_network_s_place_in_a_diffusion_model(make_config):
    config = make_config()
    unet, baseline = (network.float() for network in both(config.model, randomise=False))
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([7, 2])
    wanted = GaussianDiffusion(unet, config).predict(x_t, t, patch_batch_size=3)
    torch.testing.assert_close(GaussianDiffusion(baseline, config).predict(x_t, t), wanted, atol=1e-5, rtol=1e-4)


def test_it_lies_in_memory_channel_by_channel(make_config):
    _, baseline = both(make_config().model)
    assert all(parameter.is_contiguous() for parameter in baseline.parameters())


def test_it_holds_the_skip_that_nothing_reads(make_config):
    """Which is the price of an ordinary network: full resolution, held until the end."""
    model = make_config(model={"dim_mults": [1, 2], "image_size": 32, "patch_divider": 1}).model
    unet, baseline = both(model)
    given = inputs(model, n=5)
    held = []
    for network in (unet, baseline):
        with LiveMemory(network) as memory, torch.inference_mode():
            network(*given)
        held.append(memory.peak().activations)
    skip = 5 * model.dim * 32 * 32 * 8
    assert held[1] > held[0] + skip
