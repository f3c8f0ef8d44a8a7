import json
import pickle
import re
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from patch_based_ddpm import GaussianDiffusion, checkpoint
from patch_based_ddpm.checkpoint import load_diffusion, safetensors
from patch_based_ddpm.errors import DamagedCheckpoint, InputError
from support.checkpoints import Trap, equal, refusal


@pytest.fixture
def diffusion(make_config):
    return GaussianDiffusion.from_config(make_config())


@pytest.fixture
def write(diffusion, tmp_path):
    """Writes the model's weights, or others, and returns the file."""

    def write(state=None, weights="ema"):
        path = tmp_path / "model.safetensors"
        safetensors.write(path, diffusion.config, weights, state or diffusion.unet.state_dict())
        return path

    return write


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def header_size(content):
    return int.from_bytes(content[:8], "little") + 8


def data_size(path):
    content = path.read_bytes()
    return len(content) - header_size(content)


def rewrite(path, **changes):
    """Write a file anew with other metadata; None leaves a key out."""
    changed = {**metadata(path), **changes}
    save_file(load_file(path), path, {key: value for key, value in changed.items() if value is not None})


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_what_is_written_is_loaded_bit_by_bit(write, diffusion, weights):
    path = write(weights=weights)
    loaded = load_diffusion(path, weights=weights)
    assert equal(loaded.unet.state_dict(), diffusion.unet.state_dict())
    assert loaded.config == diffusion.config
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([2, 9])
    assert torch.equal(loaded.predict(x_t, t), diffusion.predict(x_t, t))
    assert not loaded.training
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_programs_find_the_tensors_and_what_they_are(write, diffusion):
    path = write()
    assert equal(load_file(path), diffusion.unet.state_dict())
    held = metadata(path)
    assert json.loads(held["config"]) == diffusion.config.to_dict()
    assert (held["format"], held["weights"]) == ("patch_based_ddpm weights 1", "ema")


def test_the_other_weights_are_not_in_it(write):
    path = write(weights="model")
    wanted = ': holds the weights "model" alone; weights is "ema", but must be "model".'
    assert refusal(lambda: load_diffusion(path), path) == wanted
    path = write(weights="ema")
    assert 'holds the weights "ema" alone' in refusal(lambda: load_diffusion(path, weights="model"), path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_half_the_size_and_float32_again_when_loaded(write, diffusion, dtype):
    values = sum(values.numel() for values in diffusion.unet.parameters())
    assert data_size(write()) == 4 * values
    rounded = {name: values.to(dtype) for name, values in diffusion.unet.state_dict().items()}
    path = write(rounded)
    assert data_size(path) == 2 * values
    loaded = load_diffusion(path).unet.state_dict()
    assert {values.dtype for values in loaded.values()} == {torch.float32}
    assert equal(loaded, {name: values.float() for name, values in rounded.items()})
    stored = load_diffusion(path, dtype=dtype).unet.state_dict()
    assert equal(stored, rounded)


def test_the_content_tells_not_the_name(write, diffusion, tmp_path):
    renamed = write().rename(tmp_path / "model.pt")
    assert equal(load_diffusion(renamed).unet.state_dict(), diffusion.unet.state_dict())
    state = diffusion.unet.state_dict()
    ours = {"config": diffusion.config.to_dict(), "step": 1, "model": state, "ema": state}
    checkpoint.save(tmp_path / "model.safetensors", ours)
    assert checkpoint.read(tmp_path / "model.safetensors")["step"] == 1


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_code_under_the_name_is_refused_and_not_run(tmp_path, form):
    path, sprung = tmp_path / "model.safetensors", tmp_path / "sprung"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    else:
        torch.save({"model": Trap(sprung)}, path, _use_new_zipfile_serialization=form == "torch")
    wanted = ": refused, because it holds code (posix.mkdir) and not only weights."
    assert refusal(lambda: load_diffusion(path), path) == wanted
    assert not sprung.exists()


def test_code_behind_a_header_is_not_run(write, tmp_path):
    """A pickle in place of the tensors, and one behind them, in a file that looks like safetensors."""
    path, sprung = write(), tmp_path / "sprung"
    whole, trap = path.read_bytes(), pickle.dumps(Trap(sprung), protocol=2)
    start = header_size(whole)
    for content in (whole + trap, b"12345678{" + trap):
        path.write_bytes(content)
        assert ": is damaged" in refusal(lambda: load_diffusion(path), path)
    path.write_bytes(whole[:start] + trap + whole[start + len(trap) :])
    load_diffusion(path)  # it is read as numbers
    assert not sprung.exists()


@pytest.mark.parametrize("part", [0, 0.001, 0.02, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_damaged(write, part):
    path = write()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert ": is damaged or not a checkpoint (" in refusal(lambda: load_diffusion(path), path)
    with pytest.raises(DamagedCheckpoint):
        checkpoint.read(path)


def test_every_flipped_bit_of_the_header_is_a_sentence_or_harmless(write):
    """Of the tensors nothing tells: the format has no checksum."""
    path = write()
    whole, random = path.read_bytes(), Random(0)
    refused = 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[random.randrange(header_size(whole))] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        try:
            load_diffusion(path)
        except InputError:
            refused += 1
    assert refused > 200


def test_a_file_with_the_checksum_of_earlier_versions_loads(write, diffusion):
    path = write()
    rewrite(path, sha256="0" * 64)
    assert equal(load_diffusion(path).unet.state_dict(), diffusion.unet.state_dict())


@pytest.mark.parametrize(
    "held",
    [
        None,
        {"format": "pt"},
        {"config": None},
        {"weights": None},
        {"format": None},
        {"format": "patch_based_ddpm weights 2"},
        {"weights": "emma"},
    ],
    ids=str,
)
def test_files_of_other_programs(write, held):
    path = write()
    if held is None:
        save_file(load_file(path), path)
    else:
        rewrite(path, **held)
    wanted = ": is a safetensors file that patch_based_ddpm.checkpoint export has not written; its metadata must hold "
    assert refusal(lambda: load_diffusion(path), path).startswith(wanted)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [("{", "is not JSON: "), ("{}", 'the configuration lacks the required key "trainer".')],
)
def test_a_config_inside_that_makes_no_sense(write, config, complaint):
    path = write()
    rewrite(path, config=config)
    message = refusal(lambda: load_diffusion(path), path)
    assert message.startswith(f": the configuration in it is not valid: {complaint}")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("conv_out.bias"), "conv_out.bias is missing."),
        (lambda state: state.update(extra=torch.ones(1)), "extra is unknown."),
        (lambda state: state.update({"conv_out.bias": torch.ones(4)}), "conv_out.bias has the shape (4,) instead of"),
    ],
)
def test_weights_that_do_not_fit(write, diffusion, change, complaint):
    state = dict(diffusion.unet.state_dict())
    change(state)
    path = write(state)
    message = refusal(lambda: load_diffusion(path), path)
    assert message.startswith(f" (ema): the weights do not fit the configuration's model: {complaint}")


def test_a_write_that_fails_leaves_the_old_file(write, diffusion, monkeypatch):
    path = write()
    before = path.read_bytes()

    def power_cut(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", power_cut)
    with pytest.raises(OSError, match="No space left"):
        write({name: values + 1 for name, values in diffusion.unet.state_dict().items()})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_cannot_be_read(write, monkeypatch):
    path = write()

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(safetensors, "safe_open", denied)
    assert refusal(lambda: load_diffusion(path), path) == ": cannot be read: Permission denied."
    assert re.search("no such file", refusal(lambda: load_diffusion("no.safetensors"), "no.safetensors"))
