import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from patch_based_ddpm import Config, checkpoint
from patch_based_ddpm.config import DiffusionConfig
from patch_based_ddpm.data.sources import open_source
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.patches import inherited_positions
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.step import StepResult
from patch_based_ddpm.training.tracking import TrainingMetrics
from patch_based_ddpm.training.trainer import Trainer
from support.commands import metrics, write_config
from support.runs import assert_same, contents, make_trainer, timeless


@pytest.mark.parametrize("resumed_at", [[2], [3], [2, 5], [1, 2, 3, 4, 5, 6]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"patch_batch_size": 3, "lr_warmup_steps": 5},
        {"gradient_accumulate_every": 2, "max_grad_norm": 0.1, "update_ema_every": 2},
        {"cache_images": True, "mixed_precision": "bf16"},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, resumed_at, options):
    """Within an epoch of five images, across epochs, within a log interval, and again and again."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        Image.effect_noise((20, 20), 50 + i).save(images / f"{i}.png")
    every_step = {"train_dataset_dir": str(images), "train_num_steps": 7, "save_and_sample_every": 1, "log_every": 3}
    runs = []
    for step in [0, *resumed_at]:
        folder = tmp_path / f"from {step}"
        folder.mkdir()
        trainer = make_trainer(folder, preview_count=1, **every_step, **options)
        if runs:
            trainer.resume(runs[-1].folder.checkpoint(step))
        trainer.train()
        runs.append(trainer)
    whole, last = runs[0], runs[-1]
    for step in range(resumed_at[-1] + 1, 8):
        got, wanted = contents(last, step), contents(whole, step)
        assert got.pop("config") != wanted.pop("config")  # the folders differ
        assert_same(got, wanted)
        assert last.folder.preview(step).read_bytes() == whole.folder.preview(step).read_bytes()
    lines = timeless(metrics(folder))
    assert [line["step"] for line in lines] == [step for step in (3, 6, 7) if step > resumed_at[-1]]
    wanted = timeless(metrics(tmp_path / "from 0"))[-len(lines) :]
    cut = resumed_at[-1] % 3 != 0 and resumed_at[-1] < 6  # the first line averages the steps since the resume alone
    assert lines[cut:] == wanted[cut:]


def test_a_log_interval_begins_anew_when_a_run_is_resumed(tmp_path):
    for place in ("each", "three", "resumed"):
        (tmp_path / place).mkdir()
    options = {"train_num_steps": 6, "save_and_sample_every": 1, "preview_count": 0}
    make_trainer(tmp_path / "each", **options).train()
    whole = make_trainer(tmp_path / "three", log_every=3, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", log_every=3, **options)
    resumed.resume(whole.folder.checkpoint(1))
    resumed.train()
    steps = metrics(tmp_path / "each")
    for name, wanted in (("three", [steps[0:3], steps[3:6]]), ("resumed", [steps[1:3], steps[3:6]])):
        for line, interval in zip(metrics(tmp_path / name), wanted, strict=True):
            for key in ("loss", "grad_norm", "patch_loss"):
                assert np.allclose(line[key], np.mean([step[key] for step in interval], axis=0), rtol=1e-12)


def test_an_old_checkpoint_with_a_log_interval_in_it_is_continued(tmp_path):
    trainer = make_trainer(tmp_path, preview_count=0)
    trainer.train()
    held = torch.load(trainer.folder.checkpoint(3), weights_only=True)
    checkpoint.save(tmp_path / "old.pt", {**held, "window": torch.ones(1, 2, 7)})
    (tmp_path / "b").mkdir()
    resumed = make_trainer(tmp_path / "b", preview_count=0)
    resumed.resume(tmp_path / "old.pt")
    resumed.train()
    assert_same(contents(resumed, 6)["model"], contents(trainer, 6)["model"])
    assert timeless(metrics(tmp_path / "b")) == timeless(metrics(tmp_path))[3:]


def test_moments_of_another_memory_layout_are_those_of_the_same_weights(tmp_path):
    """Older checkpoints, and published ones, hold them row by row; fused Adam would take one for another."""
    for place in ("whole", "resumed"):
        (tmp_path / place).mkdir()
    options = {"train_num_steps": 6, "save_and_sample_every": 3, "preview_count": 0}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    held = torch.load(whole.folder.checkpoint(3), weights_only=True)
    relaid = 0
    for state in held["optimizer"]["state"].values():
        for name, values in state.items():
            relaid += not values.is_contiguous()
            state[name] = values.contiguous()
    assert relaid
    checkpoint.save(tmp_path / "rows.pt", held)
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.resume(tmp_path / "rows.pt")
    resumed.train()
    assert_same(contents(resumed, 6)["model"], contents(whole, 6)["model"])


def test_resuming_verifies_checksums(tmp_path):
    """A flipped bit of a weight, which unpickling does not notice."""
    trainer = make_trainer(tmp_path, train_num_steps=1)
    trainer.train()
    path = trainer.folder.checkpoint(1)
    data = bytearray(path.read_bytes())
    data[data.index(trainer.unet.state_dict()["condition.time.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model-1\.pt: is damaged; the checksum of"):
        trainer.resume(path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    trainer = make_trainer(tmp_path, train_num_steps=3, save_and_sample_every=1, preview_count=0)
    trainer.train()
    newest = trainer.folder.checkpoint(3)
    newest.write_bytes(newest.read_bytes()[:-1000])  # model-last.pt is the same file
    resumed = make_trainer(tmp_path)
    resumed.resume(*resumed.folder.candidates("latest"))
    assert resumed.step == 2
    assert "model-last.pt: is damaged or not a checkpoint" in capsys.readouterr().out
    for step in (1, 2):
        trainer.folder.checkpoint(step).write_bytes(b"")
    with pytest.raises(InputError, match=r"model-1\.pt: is damaged"):
        make_trainer(tmp_path).resume(*resumed.folder.candidates("latest"))


def mixed_accelerator(precision, scale=2.0):
    """With fp16, accelerate refuses the CPU although PyTorch can."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if precision != "fp16":
        return Accelerator(cpu=True, mixed_precision=precision)
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_fp16_survives_overflow_and_resumes(tmp_path):
    """The first losses are scaled beyond what fp16 holds; those steps touch neither weights nor average."""
    options = {"train_num_steps": 12, "save_and_sample_every": 4, "step_start_ema": 0, "preview_count": 2}
    for place in ("whole", "resumed"):
        (tmp_path / place).mkdir()
    trainer, averages, applied = make_trainer(tmp_path / "whole", mixed_accelerator("fp16", 2.0**20), **options), [], []
    add = trainer.metrics.add

    def watch(result):
        applied.append(bool(result.applied))
        averages.append(trainer.ema.ema_model.conv_out.weight.clone())  # of the step before
        add(result)

    trainer.metrics.add = watch
    trainer.train()
    skipped = applied.index(True)
    assert 0 < skipped < 12
    assert all(torch.equal(average, averages[0]) for average in averages[: skipped + 1])
    assert not torch.equal(averages[-1], averages[0])
    held = contents(trainer, 12)
    assert held["scaler"]["scale"] == 2.0 ** (20 - applied.count(False))
    assert held["skipped_steps"] == metrics(tmp_path / "whole")[-1]["skipped_steps"] == applied.count(False)
    assert all(values.isfinite().all() for key in ("model", "ema") for values in held[key].values())
    assert np.asarray(Image.open(trainer.folder.preview(12))).std() > 1

    resumed = make_trainer(tmp_path / "resumed", mixed_accelerator("fp16"), **options)
    resumed.resume(trainer.folder.checkpoint(4))
    resumed.train()
    got, wanted = contents(resumed, 12), contents(trainer, 12)
    assert got.pop("config") != wanted.pop("config")
    assert_same(got, wanted)


def test_previews_under_mixed_precision_are_those_of_float32(tmp_path):
    pictures = []
    for precision in ("no", "bf16", "fp16"):
        (tmp_path / precision).mkdir()
        trainer = make_trainer(tmp_path / precision, mixed_accelerator(precision), preview_steps=20)
        trainer.preview()
        pictures.append(np.asarray(Image.open(trainer.folder.preview(0))).astype(int))
    assert pictures[0].std() > 10
    for other in pictures[1:]:
        assert 0 < np.abs(other - pictures[0]).mean() < 4  # of 255


def test_ema_follows_the_published_rule(tmp_path):
    """Copied every 2nd step before step 4, from then on averaged with the plain decay; untouched in between."""
    trainer = make_trainer(tmp_path, ema_decay=0.75, step_start_ema=4, update_ema_every=2)
    history = []
    take = trainer.training_step.__class__.__call__

    def watched(self, step, batches):
        result = take(self, step, batches)
        history.append(trainer.unet.conv_in.weight.detach().clone())
        return result

    averages = []
    update = trainer._update_ema

    def after(result):
        update(result)
        averages.append(trainer.ema.ema_model.conv_in.weight.clone())

    initial = trainer.unet.conv_in.weight.detach().clone()
    trainer._update_ema = after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.training_step.__class__, "__call__", watched)
        trainer.train()

    model = [initial, *history]  # model[i]: after i steps
    fourth = 0.75 * model[2] + 0.25 * model[4]
    wanted = [initial, model[2], model[2], fourth, fourth, 0.75 * fourth + 0.25 * model[6]]
    for got, want in zip(averages, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)


def test_metrics_hold_what_was_trained(tmp_path):
    trainer = make_trainer(tmp_path, log_every=3, lr_warmup_steps=12, train_lr=1.2e-3)
    trainer.train()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 6]
    assert [line["learning_rate"] for line in lines] == pytest.approx([3e-4, 6e-4])
    assert [line["ema_decay"] for line in lines] == [0.995, 0.995]
    for line in lines:
        assert np.mean(line["patch_loss"]) == pytest.approx(line["loss"], rel=1e-5)
        assert np.shape(line["patch_loss"]) == (2, 2)
        assert line["grad_norm"] > 0
        assert line["images_per_second"] > 0
        assert line["peak_memory_mib"] > 10


def test_previews_come_from_the_averaged_weights_and_fixed_noise(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.preview()
    first = trainer.folder.preview(0).read_bytes()
    with torch.no_grad():
        for values in trainer.unet.parameters():
            values.add_(1.0)
    trainer.preview()
    assert trainer.folder.preview(0).read_bytes() == first
    with Image.open(trainer.folder.preview(0)) as picture:
        assert picture.size == (2 * 18 + 2, 2 * 18 + 2)
    with torch.no_grad():
        for values in trainer.ema.ema_model.parameters():
            values.mul_(2.0)
    trainer.preview()
    assert trainer.folder.preview(0).read_bytes() != first


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_and_is_compiled_once(tmp_path):
    """With passes of 3 of 8 patches, the last of which is filled up."""
    for name in ("usual", "compiled"):
        (tmp_path / name).mkdir()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = {"patch_batch_size": 3, "preview_count": 0, "train_num_steps": 3, "save_and_sample_every": 3}
        make_trainer(tmp_path / name, compile=name == "compiled", **options).train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for usual, compiled in zip(metrics(tmp_path / "usual"), metrics(tmp_path / "compiled"), strict=True):
        assert compiled["loss"] == pytest.approx(usual["loss"], rel=1e-3)


def test_recomputed_activations_give_the_same_run(tmp_path):
    for name in ("usual", "recomputed"):
        (tmp_path / name).mkdir()
        make_trainer(tmp_path / name, preview_count=0, recompute_activations=name == "recomputed").train()
    for usual, other in zip(metrics(tmp_path / "usual"), metrics(tmp_path / "recomputed"), strict=True):
        assert other["loss"] == pytest.approx(usual["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(usual["grad_norm"], rel=1e-4)


def test_previews_are_drawn_as_the_config_says(tmp_path):
    pictures = set()
    for name, options in (
        ("second", {}),
        ("third", {"preview_order": 3}),
        ("noisy", {"preview_eta": 1.0}),
        ("ddim", {"preview_sampler": "ddim"}),
        ("noisy ddim", {"preview_sampler": "ddim", "preview_eta": 0.5}),
    ):
        options = {"preview_sampler": "dpm-solver++", "preview_steps": 6, **options}
        (tmp_path / name).mkdir()
        trainer = make_trainer(tmp_path / name, **options)
        trainer.preview()
        pictures.add(trainer.folder.preview(0).read_bytes())
    assert len(pictures) == 5


def test_no_previews(tmp_path):
    trainer = make_trainer(tmp_path, preview_count=0)
    trainer.preview()
    assert not trainer.folder.preview(0).exists()


def poison(trainer, value):
    with torch.no_grad():
        trainer.unet.conv_out.bias.fill_(value)


def test_steps_that_are_not_finite_are_counted_and_leave_the_average_alone(tmp_path):
    trainer = make_trainer(tmp_path, max_skipped_steps=100)
    poison(trainer, torch.nan)
    before = {name: values.clone() for name, values in trainer.ema.ema_model.state_dict().items()}
    trainer.train()
    assert_same(trainer.ema.ema_model.state_dict(), before)
    last = metrics(tmp_path)[-1]
    assert (last["skipped_steps"], last["loss"], last["grad_norm"]) == (6, None, None)
    assert last["patch_loss"] == [[None, None], [None, None]]
    assert contents(trainer, 6)["skipped_steps"] == 6


def test_metrics_average_the_applied_steps(tmp_path):
    """One step that is not finite leaves the other steps' means as they are, that of each patch too."""
    trainer = make_trainer(tmp_path, log_every=3, preview_count=0)
    add, results = trainer.metrics.add, []

    def watch(result):
        if trainer.step == 2:
            bad = {key: torch.full_like(getattr(result, key), torch.nan) for key in ("loss", "grad_norm", "patch_loss")}
            result = StepResult(**bad, applied=torch.tensor(False))
        results.append(result)
        add(result)

    trainer.metrics.add = watch
    trainer.train()
    line = metrics(tmp_path)[0]
    assert line["skipped_steps"] == 1
    for key in ("loss", "grad_norm", "patch_loss"):
        wanted = torch.stack([getattr(results[i], key).double() for i in (0, 2)]).mean(dim=0)
        assert np.ravel(line[key]) == pytest.approx(wanted.ravel().tolist(), rel=1e-12)


@pytest.mark.parametrize(("applied", "total", "in_a_row"), [([1, 0, 0, 1, 0], 3, 2), ([0, 0, 0], 3, 3), ([1], 0, 0)])
@pytest.mark.parametrize("log_every", [1, 2, 5])
def test_skipped_steps_are_counted_across_intervals(applied, total, in_a_row, log_every):
    collected, longest, zero = TrainingMetrics(skipped_steps=10), [], torch.zeros(())
    for i, was_applied in enumerate(applied):
        collected.add(StepResult(zero, zero, torch.zeros(4), torch.tensor(bool(was_applied))))
        if (i + 1) % log_every == 0 or i == len(applied) - 1:
            longest.append(collected.end_interval().skipped_in_a_row)
    assert collected.skipped_steps() == 10 + total
    assert max(longest) == in_a_row


def test_too_many_of_them_in_a_row_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_skipped_steps=4)
    poison(trainer, torch.inf)
    with pytest.raises(InputError, match=r"stopped at step 4: 4 steps in a row had a non-finite loss \(inf\)"):
        trainer.train()


def test_bad_images_are_counted_once_each(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (i * 50, 0, 0)).save(images / f"{i}.png")
    (images / "broken.png").write_bytes(b"not a picture")
    trainer = make_trainer(tmp_path, train_dataset_dir=str(images), on_bad_image="skip")
    trainer.train()
    assert metrics(tmp_path)[-1]["bad_images"] == 1
    again = make_trainer(tmp_path, train_dataset_dir=str(images), on_bad_image="skip")
    again.resume(again.folder.checkpoint(3))
    assert again.bad_images == trainer.bad_images
    assert capsys.readouterr().out.count("broken.png") == 1


def test_a_published_checkpoint_can_be_continued(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.train()
    ours = contents(trainer, 6)
    names = list(ours["model"])
    optimizer = ours.pop("optimizer")
    theirs = {"state": {}, "param_groups": []}
    published_read = {**ours, "config": None, "published_model": {}, "optimizer": theirs, "step": 5}
    monkeypatch.setattr(checkpoint, "read", lambda path, verify: published_read)
    seen = []

    def translate(given, model, order):
        seen.append((given, order))
        return optimizer

    monkeypatch.setattr("patch_based_ddpm.checkpoint.published.translate_optimizer", translate)
    (tmp_path / "b").mkdir()
    resumed = make_trainer(tmp_path / "b")
    resumed.resume("published.pt")
    assert resumed.step == 5
    assert seen == [(theirs, names)]
    assert_same(resumed.training_step.optimizer.state_dict()["state"], optimizer["state"])


def test_a_published_checkpoint_goes_on_learning(tmp_path, published_state):
    """Its Adam is not fused, ours is."""
    state = published_state(5, 8, (1, 2), 2)
    learnt = [values for name, values in state.items() if name.startswith("denoise_fn.")]
    parameters = [torch.nn.Parameter(values.clone()) for values in learnt]
    adam = torch.optim.Adam(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    torch.save({"step": 4, "model": state, "ema": state, "opt": adam.state_dict()}, tmp_path / "published.pt")
    resumed = make_trainer(tmp_path)
    resumed.resume(tmp_path / "published.pt")
    before = {name: values.clone() for name, values in resumed.unet.state_dict().items()}
    resumed.train()
    assert resumed.step == 6
    assert resumed.metrics.skipped_steps() == 0
    assert not torch.equal(resumed.unet.state_dict()["conv_in.weight"], before["conv_in.weight"])
    assert resumed.training_step.optimizer.optimizer.state[resumed.unet.conv_in.weight]["step"] == 3


def test_a_network_that_the_launcher_compiles_is_saved_under_its_own_names(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = make_trainer(tmp_path, accelerator=Accelerator(cpu=True, dynamo_backend="eager"), train_num_steps=1)
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "b").mkdir()
    resumed = make_trainer(tmp_path / "b")
    resumed.resume(trainer.folder.checkpoint(1))
    assert_same(resumed.unet.state_dict(), dict(trainer.unet.state_dict()))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    (tmp_path / "b").mkdir()
    other = write_config(tmp_path / "b", model={"dim": 16})
    config = Config.load(other)
    source = open_source("builtin:faces", 16, 16, 0, None)
    trainer = Trainer(config, Accelerator(cpu=True), source, RunFolder(tmp_path / "b"))
    with pytest.raises(InputError, match=r"was trained with model\.dim 8, but the configuration says 16"):
        trainer.resume(tmp_path / "run" / "checkpoints" / "model-0.pt")


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    other = dataclasses.replace(trainer.config, diffusion=DiffusionConfig(objective="pred_v"))
    trainer.config = other
    with pytest.raises(
        InputError, match=r"was trained with diffusion\.objective pred_noise, but the configuration says"
    ):
        trainer.resume(trainer.folder.checkpoint(0))


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    "change",
    [
        lambda adam: {"state": adam["state"], "param_groups": []},
        lambda adam: {"state": adam["state"], "param_groups": adam["param_groups"] * 2},
        lambda adam: adam | {"param_groups": [adam["param_groups"][0] | {"params": [0, 1]}]},
        lambda adam: adam | {"state": adam["state"] | {0: adam["state"][1]}},
        lambda adam: adam | {"state": adam["state"] | {0: without(adam["state"][0], "exp_avg_sq")}},
        lambda adam: adam | {"state": adam["state"] | {len(adam["state"]): adam["state"][0]}},
        lambda adam: adam | {"state": None},
    ],
    ids=["no group", "two groups", "fewer", "shape", "no second moment", "more", "no state"],
)
def test_an_optimizer_of_another_network_is_refused(tmp_path, change):
    trainer = make_trainer(tmp_path, train_num_steps=1)
    trainer.train()
    held = contents(trainer, 1)
    path = tmp_path / "other.pt"
    checkpoint.save(path, held | {"config": held["config"].to_dict(), "optimizer": change(held["optimizer"])})
    with pytest.raises(InputError, match=r"other\.pt: the optimizer state does not fit the configuration's model; "):
        trainer.resume(path)


def test_a_model_goes_on_with_a_halo(tmp_path, capsys):
    """Its weights are the same in number and meaning; what it sees around a patch is soon learnt."""
    trainer = make_trainer(tmp_path, train_num_steps=2)
    trainer.train()
    (tmp_path / "b").mkdir()
    wider = make_trainer(tmp_path / "b", train_num_steps=4, model={"halo": 2})
    wider.resume(trainer.folder.last_checkpoint)
    assert (
        "model-last.pt: was trained with a halo of 0 pixels; training continues with one of 2."
        in capsys.readouterr().out
    )
    assert wider.step == 2
    assert_same(wider.unet.state_dict(), trainer.unet.state_dict())
    wider.train()
    assert contents(wider, 4)["config"].model.halo == 2


def test_a_model_goes_on_with_more_grids(tmp_path, capsys):
    """A position of a new grid starts as the mean of those that it overlaps, and so do Adam's moments of it."""
    trainer = make_trainer(tmp_path, train_num_steps=2)
    trainer.train()
    (tmp_path / "b").mkdir()
    wider = make_trainer(tmp_path / "b", train_num_steps=4, model={"grids": 2})
    wider.resume(trainer.folder.last_checkpoint)
    assert "model-last.pt: was trained with 1 grid(s) of patches; training continues with 2." in capsys.readouterr().out
    before, after = contents(trainer, 2), wider.state_dict()
    name, inherited = "condition.position.weight", inherited_positions(2, 1, 2)
    for key in ("model", "ema"):
        assert torch.equal(after[key].pop(name), before[key].pop(name) @ inherited)
        assert_same(after[key], before[key])
    number = [parameter for parameter, _ in wider.unet.named_parameters()].index(name)
    for key in ("exp_avg", "exp_avg_sq"):
        old, new = (one["optimizer"]["state"][number][key] for one in (before, after))
        assert torch.equal(new, old @ inherited)
        assert old.any()
    # On grid 0, the model predicts what it predicted before.
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 1])
    assert_same(wider.ema_diffusion.predict(x_t, t), trainer.ema_diffusion.predict(x_t, t))
    wider.train()
    assert contents(wider, 4)["config"].model.grids == 2


def test_a_run_with_grids_continues_to_the_bit_and_patch_by_patch(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    model = {"grids": 4}
    whole = make_trainer(tmp_path / "a", train_num_steps=4, model=model)
    whole.train()
    half = make_trainer(tmp_path / "b", train_num_steps=2, model=model)
    half.train()
    rest = make_trainer(tmp_path / "b", train_num_steps=4, model=model)
    rest.resume(half.folder.last_checkpoint)
    rest.train()
    assert_same(rest.unet.state_dict(), whole.unet.state_dict())
    parts = make_trainer(tmp_path / "c", train_num_steps=4, model=model, patch_batch_size=3)
    parts.train()
    losses = [
        [json.loads(line)["loss"] for line in one.folder.metrics.read_text().splitlines()] for one in (whole, parts)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = whole.unet.state_dict()["condition.position.weight"]
    first = make_trainer(tmp_path / "c", train_num_steps=4, model=model).unet.state_dict()["condition.position.weight"]
    assert (weights != first).any(0).sum() > 4  # positions of several grids are trained


def test_weights_alone_cannot_be_continued(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    held = contents(trainer, 0)
    for missing in ("optimizer", "step"):
        path = tmp_path / "weights.pt"
        checkpoint.save(path, {**held, "config": held["config"].to_dict(), missing: None})
        with pytest.raises(InputError, match="it can be sampled from, but not continued"):
            trainer.resume(path)


def test_the_checkpoint_carries_the_resolved_config(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    assert contents(trainer, 0)["config"] == trainer.config
