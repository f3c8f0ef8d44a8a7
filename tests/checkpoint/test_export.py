import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from patch_based_ddpm import Config, GaussianDiffusion, UNet, checkpoint, sample
from patch_based_ddpm import train as train_command
from patch_based_ddpm.checkpoint import __main__ as export
from patch_based_ddpm.checkpoint import load_diffusion
from patch_based_ddpm.errors import InputError
from support.checkpoints import equal
from support.commands import environment, write_config


@pytest.fixture
def trained(make_config, tmp_path):
    """A checkpoint as training writes it, and its contents."""
    config = make_config()
    contents = {
        "config": config.to_dict(),
        "step": 5,
        "model": UNet.from_config(config.model).state_dict(),
        "ema": UNet.from_config(config.model).state_dict(),
    }
    checkpoint.save(tmp_path / "model-last.pt", contents)
    return tmp_path / "model-last.pt", contents


def run(ckpt, out, *flags):
    export.main(["export", "--ckpt", str(ckpt), "--out", str(out), *flags])
    return out


def same_predictions(diffusion, other):
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([2, 9])
    return torch.equal(diffusion.predict(x_t, t), other.predict(x_t, t))


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_our_checkpoint(trained, tmp_path, weights):
    path, contents = trained
    out = run(path, tmp_path / "out.safetensors", "--weights", weights)
    assert equal(load_file(out), contents[weights])
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["config"]) == contents["config"]
        assert file.metadata()["weights"] == weights
    assert same_predictions(load_diffusion(out, weights=weights), load_diffusion(path, weights=weights))


def test_defaults_and_what_it_says(trained, tmp_path, capsys):
    path, contents = trained
    out = run(path, tmp_path / "out.safetensors")
    assert equal(load_file(out), contents["ema"])
    count = sum(values.numel() for values in contents["ema"].values())
    assert capsys.readouterr().out == f'{out}: the weights "ema" of {path}, {count:,} values in float32.\n'


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtype_of_the_stored_weights(trained, tmp_path, dtype):
    path, contents = trained
    rounded = run(path, tmp_path / "out.safetensors", "--dtype", dtype)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert equal(load_file(rounded), {name: values.to(kind) for name, values in contents["ema"].items()})
    again = run(rounded, tmp_path / "again.safetensors")  # a safetensors file is a checkpoint to export from
    assert same_predictions(load_diffusion(rounded), load_diffusion(again))
    assert {values.dtype for values in load_file(again).values()} == {torch.float32}


def test_values_beyond_fp16_are_refused_not_made_infinite(trained, tmp_path):
    path, contents = trained
    contents["ema"]["conv_out.bias"][0] = -70000.0
    checkpoint.save(path, contents)
    with pytest.raises(InputError, match=r"^--dtype fp16 cannot hold conv_out\.bias, whose largest value is 70000\.$"):
        run(path, tmp_path / "out.safetensors", "--dtype", "fp16")
    assert not (tmp_path / "out.safetensors").exists()
    run(path, tmp_path / "out.safetensors", "--dtype", "bf16")


def test_a_published_checkpoint_with_its_config(published_state, make_config, tmp_path):
    state = published_state(1, 8, (1, 2), 2)
    path, config = tmp_path / "published.pt", make_config(model={"resnet_block_groups": 8})
    torch.save({"step": 7, "model": state, "ema": state, "opt": {}, "scaler": None}, path)
    config.save(tmp_path / "config.json")
    out = run(path, tmp_path / "out.safetensors", "--config", str(tmp_path / "config.json"))
    loaded = load_diffusion(out)
    assert loaded.config == config
    assert same_predictions(loaded, load_diffusion(path, config))


def test_places_that_cannot_be_written_to(trained, tmp_path):
    path, _ = trained
    before = path.read_bytes()
    for out, complaint in (
        (tmp_path, f"--out '{tmp_path}' is a folder; it must be a file."),
        (tmp_path / "no" / "a", f"--out '{tmp_path}/no/a' cannot be written: there is no folder '{tmp_path}/no'."),
        (path / "a", f"--out '{path}/a' cannot be written: there is no folder '{path}'."),
        (path, f"--out '{path}' is the checkpoint itself; it must be another file."),
    ):
        with pytest.raises(InputError) as error:
            run(path, out)
        assert str(error.value) == complaint
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing(trained, tmp_path, monkeypatch):
    path, _ = trained

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"^--out '.*out' cannot be written: No space left on device\.$"):
        run(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
def test_the_command_by_its_name(trained, tmp_path):
    """What cannot work is one sentence and status 2, what can is done."""

    def command(*arguments):
        line = [sys.executable, "-m", "patch_based_ddpm.checkpoint", "export", *map(str, arguments)]
        return subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)

    path, contents = trained
    done = command("--ckpt", tmp_path / "no.pt", "--out", tmp_path / "out.safetensors")
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}/no.pt: there is no such file.\n")
    done = command("--ckpt", path, "--out", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert equal(load_file(tmp_path / "out.safetensors"), contents["ema"])


def test_pictures_drawn_from_it_are_those_of_the_checkpoint(trained, tmp_path):
    path, _ = trained
    out = run(path, tmp_path / "out.safetensors")
    for ckpt in (path, out):
        folder = tmp_path / ckpt.suffix[1:]
        sample.main(["--ckpt", str(ckpt), "--out-dir", str(folder), "--seeds", "3"])
    assert (tmp_path / "pt" / "000003.png").read_bytes() == (tmp_path / "safetensors" / "000003.png").read_bytes()


def test_it_cannot_be_continued(tmp_path):
    config = write_config(tmp_path)
    diffusion = GaussianDiffusion.from_config(Config.load(config))
    state = diffusion.unet.state_dict()
    ours = {"config": diffusion.config.to_dict(), "step": 3, "model": state, "ema": state}
    checkpoint.save(tmp_path / "model.pt", ours)
    for weights in ("ema", "model"):
        out = run(tmp_path / "model.pt", tmp_path / "out.safetensors", "--weights", weights)
        with pytest.raises(InputError) as error:
            train_command.main(["--config", str(config), "--resume", str(out)])
        wanted = f"{out}: holds no step and optimizer state; it can be sampled from, but not continued."
        assert str(error.value) == wanted
