import pytest
import torch

from patch_based_ddpm import Config, GaussianDiffusion, UNet
from patch_based_ddpm.errors import InputError

ABLATIONS = {
    "full": {},
    "no position": {"position_conditioning": False},
    "no content": {"global_content_conditioning": False},
    "neither": {"position_conditioning": False, "global_content_conditioning": False},
}


def inputs(n=3, c=3, h=4, w=4, N=2):
    position = torch.eye(N * N)[torch.arange(n) % N**2]
    return {
        "patches": torch.randn(n, c, h, w),
        "content": torch.randn(n, c, h, w),
        "position": position,
        "t": torch.tensor([3, 0, 9, 5])[torch.arange(n) % 4],
    }


def test_parameter_count_of_the_published_network():
    """Less the published layer that does nothing, Linear(d, 4d)."""
    trainer = {"train_dataset_dir": "data", "log_dir": "logs"}
    config = Config.from_dict({"trainer": trainer, "model": {"dim": 128}})
    with torch.device("meta"):
        network = UNet.from_config(config.model)
    assert sum(parameter.numel() for parameter in network.parameters()) == 126_851_919 - 66_048
    assert not list(network.buffers())


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("mults", [[1], [1, 2], [1, 2, 4], [1, 1, 2]])
def test_every_parameter_learns(make_config, ablation, mults):
    model = {"dim_mults": mults, "image_size": [16, 24], **ABLATIONS[ablation]}
    diffusion = GaussianDiffusion.from_config(make_config(model=model))
    diffusion.loss(torch.randn(2, 3, 16, 24), torch.tensor([4, 8])).backward()
    for name, parameter in diffusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_output_depends_on_each_input_and_only_where_it_should(make_config, ablation):
    network = UNet.from_config(make_config(model=ABLATIONS[ablation]).model)
    first = inputs()
    other = inputs() | {"position": first["position"].roll(1, 0), "t": first["t"] + 1}
    blind = {"position": "position_conditioning", "content": "global_content_conditioning"}
    before = network(**first)
    for name in first:
        after = network(**first | {name: other[name]})
        if blind.get(name) in ABLATIONS[ablation]:
            assert torch.equal(before, after), name
        else:
            changed = (before - after).abs().amax(dim=(1, 2, 3))
            assert changed.min() > 1e-4, name


def test_patch_and_content_are_told_apart(make_config):
    network, x = UNet.from_config(make_config().model), inputs()
    swapped = x | {"patches": x["content"], "content": x["patches"]}
    assert (network(**x) - network(**swapped)).abs().max() > 1e-3


@pytest.mark.parametrize(("h", "w"), [(4, 8), (12, 4), (8, 8)])
def test_output_is_as_large_as_the_patch(make_config, h, w):
    network = UNet.from_config(make_config(model={"dim_mults": [1, 2, 4], "image_size": [2 * h, 2 * w]}).model)
    assert network(**inputs(h=h, w=w)).shape == (3, 3, h, w)


def test_transposed_patches_are_not_confused(make_config):
    """With every kernel symmetric, transposing a non-square input transposes the output."""
    network = UNet.from_config(make_config(model={"dim_mults": [1, 2, 4], "image_size": [8, 24]}).model)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 4:
                parameter.copy_((parameter + parameter.mT) / 2)
    x = inputs(h=4, w=12)
    turned = x | {"patches": x["patches"].mT, "content": x["content"].mT}
    torch.testing.assert_close(network(**turned), network(**x).mT, atol=1e-4, rtol=1e-4)


def test_rows_of_a_batch_do_not_meet(make_config):
    network = UNet.from_config(make_config(model={"dim_mults": [1, 2, 4], "image_size": 16}).model)
    x, other = inputs(n=4, h=8, w=8), inputs(n=4, h=8, w=8)
    together = network(**x)
    for row in range(4):
        alone = network(**{name: values[row : row + 1] for name, values in x.items()})
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-5)
    mixed = {name: torch.cat([x[name][:2], other[name][2:]]) for name in x}
    assert torch.equal(network(**mixed)[:2], together[:2])


def test_inner_width_and_channels(make_config):
    model = {"channels": 4, "init_dim": 5}
    network = UNet.from_config(make_config(model=model).model)
    assert network.conv_in.weight.shape == (5, 8, 7, 7)
    assert network(**inputs(c=4)).shape == (3, 4, 4, 4)


def test_wide_kernels_lie_as_their_device_and_dtype_like_them(make_config, monkeypatch):
    usual = UNet.from_config(make_config(model={"dim": 16, "dim_mults": [1, 2]}).model)
    monkeypatch.setattr("patch_based_ddpm.model.unet.WIDE", 16)
    network = UNet.from_config(make_config(model={"dim": 16, "dim_mults": [1, 2]}).model)
    network.load_state_dict(usual.state_dict())
    wide, narrow = network.middle_1.conv_1.weight, network.encoder[0].block_1.conv_1.weight
    resampling = (network.encoder[0].resample.weight, network.decoder[0].resample.weight)  # take any input
    assert wide.is_contiguous()
    for kernel in (narrow, *resampling):
        assert kernel.is_contiguous(memory_format=torch.channels_last)
    given = inputs()
    torch.testing.assert_close(network(**given), usual(**given))
    torch.nn.Sequential(network).to(torch.bfloat16)  # as part of something else, too
    for kernel in (network.middle_1.conv_1.weight, network.encoder[0].block_1.conv_1.weight):
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert not kernel.is_contiguous()


@pytest.mark.parametrize(("dim", "mults"), [(2**20, [1, 2]), (2**20, [1, 2**20]), (2**15, [1, 64])])
def test_a_network_too_large_for_the_machine_is_one_sentence(make_config, dim, mults):
    config = make_config(model={"dim": dim, "dim_mults": mults})
    sentence = (
        rf"^model\.dim is {dim} and model\.dim_mults .+; the weights of this network do not fit into .+ memory\.$"
    )
    with pytest.raises(InputError, match=sentence):
        UNet.from_config(config.model)
