import gc
import io
import pickle
import re
from pathlib import Path
from random import Random

import pytest
import torch

from patch_based_ddpm import GaussianDiffusion, UNet
from patch_based_ddpm.checkpoint import DamagedCheckpoint, load_diffusion, load_weights, read, safetensors, save
from patch_based_ddpm.errors import InputError
from support.checkpoints import Trap, equal, refusal
from support.runs import assert_same

GEOMETRY = (8, (1, 2), 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model-last.pt"


@pytest.fixture
def contents(make_config):
    """What our training would save, with other weights in `ema` than in `model`."""
    config = make_config()
    networks = [UNet.from_config(config.model) for _ in range(2)]
    return {
        "config": config.to_dict(),
        "step": 5,
        "model": networks[0].state_dict(),
        "ema": networks[1].state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "scaler": None,
    }


@pytest.fixture
def published_contents(published_state):
    return {
        "step": 7,
        "model": published_state(1, *GEOMETRY),
        "opt": {"state": {}, "param_groups": []},
        "ema": published_state(2, *GEOMETRY),
        "scaler": None,
    }


def test_what_is_saved_is_read(path, contents):
    save(path, contents)
    got = read(path)
    assert equal(got["model"], contents["model"])
    assert equal(got["ema"], contents["ema"])
    for key in ("step", "optimizer", "scaler"):
        assert got[key] == contents[key]
    assert got["config"].to_dict() == contents["config"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_our_checkpoint_needs_no_config(path, contents, make_config, weights):
    save(path, contents)
    diffusion = load_diffusion(str(path), weights=weights)
    assert isinstance(diffusion, GaussianDiffusion)
    assert diffusion.config == make_config()
    assert equal(diffusion.unet.state_dict(), contents[weights])
    assert not equal(contents["ema"], contents["model"])
    assert not diffusion.training
    assert not any(parameter.requires_grad for parameter in diffusion.parameters())


def test_ema_is_the_default(path, contents):
    save(path, contents)
    assert equal(load_diffusion(path).unet.state_dict(), contents["ema"])


def test_a_loaded_model_predicts_what_the_saved_one_does(path, contents, make_config):
    diffusion = GaussianDiffusion.from_config(make_config())
    save(path, contents | {"ema": diffusion.unet.state_dict()})
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([2, 9])
    assert torch.equal(load_diffusion(path).predict(x_t, t), diffusion.predict(x_t, t))


def test_a_given_config_may_differ_in_the_trainer_section_alone(path, contents, make_config, tmp_path):
    save(path, contents)
    config = make_config(trainer={"log_dir": "elsewhere", "train_batch_size": 7, "seed": 9})
    config.save(tmp_path / "config.json")
    for given in (config, tmp_path / "config.json", str(tmp_path / "config.json")):
        assert load_diffusion(path, given).config == config


@pytest.mark.parametrize("form", ["checkpoint", "safetensors"])
@pytest.mark.parametrize(
    ("section", "key", "saved", "wanted"),
    [
        ("diffusion", "timesteps", 10, 25),
        ("diffusion", "objective", "pred_noise", "pred_v"),
        ("diffusion", "loss_type", "l1", "l2"),
        ("model", "halo", 0, 2),
        ("model", "dim", 8, 16),
        ("model", "patch_divider", 2, 4),
        ("model", "resnet_block_groups", 4, 2),
        ("model", "position_conditioning", True, False),
    ],
)
def test_a_given_config_that_contradicts_the_one_inside_is_refused(
    path, contents, make_config, form, section, key, saved, wanted
):
    if form == "checkpoint":
        save(path, contents)
    else:
        safetensors.write(path, make_config(), "ema", contents["ema"])
    config = make_config(**{section: {key: wanted}})
    sentence = f": was trained with {section}.{key} {saved}, but the configuration says {wanted}."
    assert refusal(lambda: load_diffusion(path, config), path) == sentence


def test_dtype_is_the_networks_alone(path, contents):
    save(path, contents)
    exact, rough = load_diffusion(path), load_diffusion(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in exact.unet.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in rough.unet.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in rough.buffers()} == {torch.float32}
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([2, 9])
    got, wanted = rough.predict(x_t, t), exact.predict(x_t, t)
    assert got.dtype == torch.float32
    assert 0 < (got - wanted).abs().mean() < 0.05 * wanted.abs().mean()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(path, contents, published_contents, make_config, prefix):
    def wrapped(state):
        return {prefix + name: values for name, values in state.items()}

    for given, config in ((contents, None), (published_contents, make_config(model={"resnet_block_groups": 8}))):
        form = save if given is contents else lambda path, data: torch.save(data, path)
        form(path, given)
        plain = load_diffusion(path, config)
        form(path, given | {"ema": wrapped(given["ema"]), "model": wrapped(given["model"])})
        assert equal(load_diffusion(path, config).unet.state_dict(), plain.unet.state_dict())


def test_a_wrapper_inside_the_published_names(path, published_contents, make_config):
    """Only the network may have been wrapped: `denoise_fn.module.`."""
    config = make_config(model={"resnet_block_groups": 8})
    torch.save(published_contents, path)
    plain = load_diffusion(path, config)
    ema = {
        name.replace("denoise_fn.", "denoise_fn.module."): values for name, values in published_contents["ema"].items()
    }
    torch.save(published_contents | {"ema": ema}, path)
    assert equal(load_diffusion(path, config).unet.state_dict(), plain.unet.state_dict())


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_published_checkpoint_loads_with_its_config(path, published_contents, make_config, tmp_path, weights):
    torch.save(published_contents, path)
    config = make_config(model={"resnet_block_groups": 8})
    config.save(tmp_path / "config.json")
    diffusion = load_diffusion(path, tmp_path / "config.json", weights=weights)
    state = published_contents[weights]
    # one value each from the outside, the inside and the end of the network
    for ours, name in [
        ("conv_in.weight", "_patched_encoder._init_conv.weight"),
        ("decoder.0.attention.to_out.bias", "_patched_decoder.ups.0.2.fn.fn.to_out.0.bias"),
        ("conv_out.bias", "_patched_decoder.final_conv.1.bias"),
    ]:
        assert torch.equal(diffusion.unet.state_dict()[ours], state[f"denoise_fn.{name}"])
    got = read(path)
    assert got["config"] is None
    assert got["step"] == 7
    assert got["optimizer"] == published_contents["opt"]
    assert equal(got["published_model"], published_contents["model"])


def test_a_published_checkpoint_needs_its_config(path, published_contents):
    torch.save(published_contents, path)
    assert "carries no configuration; give its config file" in refusal(lambda: load_diffusion(path), path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("conv_out.bias"), "conv_out.bias is missing."),
        (lambda state: state.update(extra=torch.ones(1)), "extra is unknown."),
        (
            lambda state: state.update({"conv_out.bias": torch.ones(4)}),
            "conv_out.bias has the shape (4,) instead of (3,).",
        ),
        (
            lambda state: state.update(extra=state.pop("conv_out.bias")),
            "conv_out.bias is missing, and 1 more such differences.",
        ),
    ],
)
def test_weights_that_do_not_fit(path, contents, change, complaint):
    change(contents["ema"])
    save(path, contents)
    message = refusal(lambda: load_diffusion(path), path)
    assert message == f" (ema): the weights do not fit the configuration's model: {complaint}"
    load_diffusion(path, weights="model")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("denoise_fn._patched_decoder.final_conv.1.bias"), "conv_out.bias is missing."),
        (lambda state: state.update({"denoise_fn.other.weight": torch.ones(1)}), "other.weight is unknown."),
        (
            lambda state: state.update({"denoise_fn._embedding._mapping.0.bias": torch.ones(4)}),
            "condition.join.bias has the shape (4,) instead of (32,).",
        ),
    ],
)
def test_published_weights_that_do_not_fit(path, published_contents, make_config, change, complaint):
    change(published_contents["ema"])
    torch.save(published_contents, path)
    config = make_config(model={"resnet_block_groups": 8})
    message = refusal(lambda: load_diffusion(path, config), path)
    assert message.endswith(f"the weights do not fit the configuration's model: {complaint}")


@pytest.mark.parametrize(
    "model",
    [
        {"dim": 16},
        {"dim_mults": [1, 2, 4]},
        {"dim_mults": [1, 4]},
        {"patch_divider": 4},
        {"channels": 1},
        {"position_conditioning": False},
        {"global_content_conditioning": False},
        {"init_dim": 9},
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused(path, contents, published_contents, make_config, model):
    config = make_config(model=model)
    save(path, contents)
    assert ": was trained with model." in refusal(lambda: load_diffusion(path, config), path)
    torch.save(published_contents, path)
    assert "do not fit the configuration's model" in refusal(lambda: load_diffusion(path, config), path)


def test_weights_that_do_not_fit_change_nothing(make_config):
    network = UNet.from_config(make_config().model)
    before = {name: values.clone() for name, values in network.state_dict().items()}
    state = {name: values + 1 for name, values in before.items()}
    state.popitem()
    with pytest.raises(InputError, match=r"^somewhere: "):
        load_weights(network, state, "somewhere")
    assert equal(network.state_dict(), before)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_code_is_refused_and_not_run(path, contents, tmp_path, form):
    sprung = tmp_path / "sprung"
    trapped = contents | {"config": Trap(sprung)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(trapped, protocol=2))
    else:
        torch.save(trapped, path, _use_new_zipfile_serialization=form == "torch")
    assert refusal(lambda: read(path), path) == ": refused, because it holds code (posix.mkdir) and not only weights."
    refusal(lambda: load_diffusion(path), path)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))  # whereas without the refusal:
    assert sprung.is_dir()


def checkpoint_bytes(contents):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_damaged(path, contents, part):
    whole = checkpoint_bytes(contents)
    path.write_bytes(whole[: int(part * len(whole))])
    assert re.match(": is damaged or not a checkpoint", refusal(lambda: read(path), path))


@pytest.mark.parametrize(("verify", "flips"), [(True, 300), (False, 100)])
def test_every_flipped_bit_is_noticed_or_harmless(path, contents, verify, flips):
    """torch itself reads flipped weights without a word; some bits are padding, or the archive's dates."""
    save(path, contents)
    whole, random = path.read_bytes(), Random(0)
    wanted, damaged = read(path, verify=verify), 0
    for _ in range(flips):
        flipped = bytearray(whole)
        flipped[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        path.unlink()  # `wanted` may be mapped
        path.write_bytes(flipped)
        try:
            got = read(path, verify=verify)
        except InputError as error:
            damaged += isinstance(error, DamagedCheckpoint)
        else:
            if verify:
                assert_same(got, wanted)
    assert not verify or damaged > 100


def test_a_flipped_weight_is_seen_by_verification_alone(path, contents):
    save(path, contents)
    weight = contents["ema"]["condition.time.weight"].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(weight)] ^= 1
    path.write_bytes(data)
    read(path)
    wanted = ": is damaged; the checksum of .* in it is wrong"
    assert re.match(wanted, refusal(lambda: read(path, verify=True), path))


def mapped(path):
    """Sizes in KiB of a file's mappings in this process: all, and the part that has been read."""
    text = Path("/proc/self/smaps").read_text()
    sizes = re.findall(
        rf"^\S+ \S+ \S+ \S+ \S+ +{re.escape(str(path))}\nSize: +(\d+) kB\n(?:.*\n){{2}}Rss: +(\d+)", text, re.M
    )
    return tuple(sum(int(size[i]) for size in sizes) for i in (0, 1))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of mappings")
def test_only_what_is_used_is_read_into_memory(path, contents):
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(2**23)}  # 32 MiB
    save(path, contents | {"optimizer": {"state": {0: moments}, "param_groups": []}})
    held = read(path)
    assert equal(held["ema"], contents["ema"])
    size, read_in = mapped(path)
    assert size > 32 * 1024
    assert read_in < 4 * 1024
    assert not held["optimizer"]["state"][0]["exp_avg"].any()
    assert mapped(path)[1] > 32 * 1024
    del held
    gc.collect()
    assert mapped(path) == (0, 0)


def test_a_loaded_model_does_not_depend_on_the_file(path, contents):
    save(path, contents)
    diffusion = load_diffusion(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place
    assert equal(diffusion.unet.state_dict(), contents["ema"])


def test_a_published_checkpoint_of_an_old_torch_loads(path, published_contents, make_config):
    """Not a zip archive, so it cannot be mapped."""
    torch.save(published_contents, path, _use_new_zipfile_serialization=False)
    old = load_diffusion(path, make_config(model={"resnet_block_groups": 8}))
    torch.save(published_contents, path)
    new = load_diffusion(path, make_config(model={"resnet_block_groups": 8}))
    assert equal(old.unet.state_dict(), new.unet.state_dict())


NO_ARCHIVES = [b"", b"hello world\n", b"The quick brown fox", b"\0" * 1000, b"PK\x03\x04 and no more", b"\x80\x02}"]
NO_ARCHIVES += [b'{"trainer": 1}', b"\x89PNG\r\n\x1a\n\0\0", b"<html>"]


@pytest.mark.parametrize("content", NO_ARCHIVES)
def test_what_is_no_archive_is_no_checkpoint(path, content):
    path.write_bytes(content)
    assert re.match(": is damaged or not a checkpoint", refusal(lambda: read(path), path))


@pytest.mark.parametrize("data", [[1], torch.ones(3), {}, {"model": {}}, {"model": {}, "ema": torch.ones(1)}, 5])
def test_other_data_is_no_checkpoint(path, data):
    torch.save(data, path)
    wanted = ": is not a checkpoint; it must hold the weights `model` and `ema`."
    assert refusal(lambda: read(path), path) == wanted


def test_a_stranger_is_named_one(path):
    torch.save({"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, path)
    assert "of neither this nor the published implementation" in refusal(lambda: read(path), path)


def test_malformed_contents_are_one_sentence(path, contents):
    weights = contents["model"]
    for change, complaint in (
        ({"model": {1: torch.ones(1)}}, ": is not a checkpoint; its weights must be named tensors."),
        ({"ema": {**weights, "conv_in.bias": 1}}, ": is not a checkpoint; its weights must be named tensors."),
        ({"config": None}, ": the configuration in it is not valid: the configuration is null; it must be an object."),
        (
            {"config": {"model": {}}},
            ': the configuration in it is not valid: the configuration lacks the required key "trainer".',
        ),
    ):
        save(path, {**contents, **change})
        assert refusal(lambda: load_diffusion(path), path) == complaint


def test_an_empty_folder_of_an_earlier_version_is_the_working_folder(path, contents):
    contents["config"]["trainer"] |= {"log_dir": "", "train_dataset_dir": ""}
    save(path, contents)
    trainer = load_diffusion(path).config.trainer
    assert (trainer.log_dir, trainer.train_dataset_dir) == (".", ".")


def test_unknown_weights_are_refused(path, contents):
    save(path, contents)
    with pytest.raises(InputError, match=r'^weights is "emma"; it must be "ema" or "model"\.$'):
        load_diffusion(path, weights="emma")


def test_no_file(tmp_path):
    assert refusal(lambda: read(tmp_path / "no.pt"), tmp_path / "no.pt") == ": there is no such file."
    assert refusal(lambda: read(tmp_path), tmp_path) == ": is a folder, not a checkpoint file."


def test_saving_replaces(path, contents):
    save(path, contents)
    save(path, contents | {"step": 6})
    assert read(path)["step"] == 6


def test_a_save_that_fails_leaves_the_old_file(path, contents, monkeypatch):
    save(path, contents)
    before = path.read_bytes()

    def full_disk(data, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save(path, contents | {"step": 6})
    assert path.read_bytes() == before
    save(path, contents | {"step": 6})  # what the failure left behind does not hinder the next
    assert read(path)["step"] == 6
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_reader_never_sees_half_a_file(path, contents, monkeypatch):
    """At the moment of writing the old file is still in its place; the new one comes by renaming."""
    save(path, contents)
    write, seen = torch.save, []

    def spied(data, file):
        write(data, file)
        seen.append(read(path)["step"])

    monkeypatch.setattr(torch, "save", spied)
    save(path, contents | {"step": 6})
    assert seen == [5]
    assert read(path)["step"] == 6
