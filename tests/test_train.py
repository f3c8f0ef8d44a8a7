import json

import pytest
import torch

from patch_based_ddpm import Config, GaussianDiffusion, checkpoint, sample
from patch_based_ddpm import train as command
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.planning import planner
from support.commands import launch_line, metrics, running, train, wait_until, write_config
from support.runs import assert_same, mixed_images, timeless


@pytest.mark.slow
def test_mixed_images_train_are_killed_resume_and_sample(tmp_path):
    """The first run is killed behind its launcher; two processes do the same in test_survival."""
    steps = 60
    images = str(mixed_images(tmp_path / "images"))
    trainer = {
        "train_dataset_dir": images,
        "on_bad_image": "skip",
        "train_num_steps": steps,
        "train_lr": 1e-3,
        "save_and_sample_every": 20,
        "log_every": 10,
        "preview_count": 2,
        "patch_batch_size": 3,
    }
    config = write_config(tmp_path, **trainer)
    run = tmp_path / "run"
    with running(launch_line("-m", "patch_based_ddpm.train", "--config", config), tmp_path) as process:
        wait_until(lambda: (run / "checkpoints" / "model-last.pt").exists(), process)
    assert not (run / "checkpoints" / f"model-{steps}.pt").exists()

    done = train("--config", config, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    assert "on 1 process(es)" in done.stdout
    assert f"steps   0 to {steps}" not in done.stdout
    lines = metrics(tmp_path)
    assert [entry["step"] for entry in lines] == list(range(10, steps + 1, 10))
    assert lines[-1]["bad_images"] == 1
    assert lines[-1]["loss"] < lines[0]["loss"]
    held = checkpoint.read(run / "checkpoints" / f"model-{steps}.pt")

    (tmp_path / "whole").mkdir()
    command.main(["--config", str(write_config(tmp_path / "whole", **trainer))])
    whole = checkpoint.read(tmp_path / "whole" / "run" / "checkpoints" / f"model-{steps}.pt")
    assert held.pop("config") != whole.pop("config")  # the folders differ
    assert_same(held, whole)
    assert timeless(lines) == timeless(metrics(tmp_path / "whole"))

    out = tmp_path / "drawn"
    flags = ["--sampler", "ddim", "--steps", "3", "--batch-size", "2", "--n-samples", "5"]
    sample.main(["--ckpt", str(run / "checkpoints" / "model-last.pt"), "--out_dir", str(out), *flags])
    assert sorted(path.name for path in out.glob("*.png")) == [f"{i:06d}.png" for i in range(5)]
    assert len({path.read_bytes() for path in out.glob("*.png")}) == 5


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    images = mixed_images(tmp_path / "images")
    config = write_config(tmp_path, train_dataset_dir=str(images), gradient_accumulate_every=4)
    command.main(["--config", str(config), "--dry-run"])
    plan = capsys.readouterr().out
    for wanted in (
        str(images),
        "8 images",
        "16 x 16 px in 2^2 patches of 8 x 8 px",
        "0 to 6, 8 images each",
        "6.0 epochs",
    ):
        assert wanted in plan
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_max_memory_picks_the_patch_batch(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, preview_count=0)
    peaks = [planner.training_peak(Config.load(config), batch_size=2, patch_batch_size=k).total for k in (1, 3)]
    with pytest.raises(
        InputError, match=r"--max-memory .* is too little: one patch at a time needs .*, of which weights"
    ):
        command.main(["--config", str(config), "--max-memory", str(peaks[0] - 1)])
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))
    passes = set()
    denoise = GaussianDiffusion._denoise

    def watched(diffusion, batch):
        if type(batch.t) is torch.Tensor:  # and no fake one of the planner's
            passes.add(len(batch.t))
        return denoise(diffusion, batch)

    monkeypatch.setattr(GaussianDiffusion, "_denoise", watched)
    command.main(["--config", str(config), "--max-memory", str(peaks[1])])
    assert "3 of 8 patches share a pass" in capsys.readouterr().out
    assert passes == {3, 2}


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    config = str(write_config(tmp_path, train_num_steps=2, preview_count=0))
    command.main(["--config", config])
    with pytest.raises(InputError, match=r"already holds checkpoints up to step 2; continue with --resume latest"):
        command.main(["--config", config])


@pytest.mark.parametrize("data", [".", "run", ".."])
def test_previews_must_not_become_training_images(tmp_path, data):
    config = str(write_config(tmp_path, train_dataset_dir=str(tmp_path / data)))
    with pytest.raises(InputError, match="lies in train_dataset_dir; its previews would become training images"):
        command.main(["--config", config])
    assert not (tmp_path / "run").exists()


def test_the_published_restart_flag_resumes(tmp_path, capsys):
    config = write_config(tmp_path, preview_count=0)
    command.main(["--config", str(config)])
    for spelling in ("--restart-step", "--restart_step"):
        command.main(["--config", str(config), spelling, "3"])
        assert "3 to 6" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", ["0", "1"])
def test_the_published_restart_flag_starts_anew(tmp_path, capsys, step):
    """As the published launch script has it; a run that is there stays."""
    config = str(write_config(tmp_path, preview_count=0))
    command.main(["--config", config, "--restart-step", step])
    assert "0 to 6" in capsys.readouterr().out
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="holds checkpoints up to step 6; continue with --resume latest, or choose"):
        command.main(["--config", config, "--restart-step", step])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_the_published_restart_flag_resumes_at_step_1(tmp_path, capsys):
    config = str(write_config(tmp_path, preview_count=0, save_and_sample_every=1))
    command.main(["--config", config])
    command.main(["--config", config, "--restart-step", "1"])
    assert "1 to 6" in capsys.readouterr().out


def test_latest_starts_anew_where_there_is_nothing(tmp_path, capsys):
    config = write_config(tmp_path, preview_count=0)
    command.main(["--config", str(config), "--resume", "latest"])
    assert "0 to 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trainer"]["update_ema_every"] == 1


@pytest.mark.slow
def test_what_the_user_can_mend_is_one_sentence(tmp_path):
    config = write_config(tmp_path, train_dataset_dir=str(tmp_path / "nowhere"))
    done = train("--config", config)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "nowhere" in sentence


def test_an_unreadable_image_stops_the_run_with_its_path(tmp_path):
    images = mixed_images(tmp_path / "images")
    config = write_config(tmp_path, train_dataset_dir=str(images), preview_count=0)
    with pytest.raises(InputError, match=r"corrupt\.jpeg"):
        command.main(["--config", str(config)])


@pytest.mark.parametrize("trainer", [{"mixed_precision": "fp16"}, {"use_amp": True}])
def test_fp16_on_a_cpu_is_refused(tmp_path, trainer):
    with pytest.raises(InputError, match="mixed precision fp16 does not work on a CPU"):
        command.main(["--config", str(write_config(tmp_path, **trainer))])


@pytest.mark.parametrize(
    ("trainer", "launcher", "precision"),
    [
        ({"mixed_precision": "bf16"}, "no", "bf16"),
        ({}, "bf16", "bf16"),  # a silent config leaves it to accelerate
        ({"mixed_precision": "no"}, "bf16", "no"),
    ],
)
def test_mixed_precision(tmp_path, monkeypatch, capsys, trainer, launcher, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    seen = set()
    denoise = GaussianDiffusion._denoise

    def watch(diffusion, batch):
        hook = lambda module, inputs, output: seen.add(output.dtype)  # noqa: E731
        handle = diffusion.unet.conv_in.register_forward_hook(hook)
        try:
            return denoise(diffusion, batch)
        finally:
            handle.remove()

    monkeypatch.setattr(GaussianDiffusion, "_denoise", watch)
    config = write_config(tmp_path, preview_count=1, **trainer)
    command.main(["--config", str(config)])
    assert f"{precision} mixed precision" in capsys.readouterr().out
    assert seen == {{"no": torch.float32, "bf16": torch.bfloat16}[precision]}
    held = checkpoint.read(tmp_path / "run" / "checkpoints" / "model-6.pt")
    assert all(values.dtype == torch.float32 for values in held["model"].values())
    assert all(line["loss"] > 0 for line in metrics(tmp_path))
