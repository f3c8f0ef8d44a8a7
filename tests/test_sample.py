import contextlib
import errno
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from patch_based_ddpm import Config, checkpoint, command_line, sample, samplers
from patch_based_ddpm.checkpoint import load_diffusion
from patch_based_ddpm.data import dataset, pictures
from patch_based_ddpm.data.sources import open_source
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.generation.animation import Animation
from patch_based_ddpm.generation.image_folder import ImageFolder
from patch_based_ddpm.planning import planner
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.trainer import Trainer
from support import commands
from support.commands import write_config


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("trained"))


def make_checkpoint(folder, **options):
    """A checkpoint whose averaged weights differ from its last ones, of a model with few timesteps."""
    path = write_config(folder, preview_steps=None, **options)
    content = json.loads(path.read_text())
    content["diffusion"] = {"timesteps": 20}
    path.write_text(json.dumps(content))
    config = Config.load(path)
    run = RunFolder(folder / "run")
    run.create()
    trainer = Trainer(config, Accelerator(cpu=True), open_source("builtin:faces", 16, 16, 0, None), run)
    with torch.no_grad():
        trainer.unet.conv_out.bias.add_(0.3)
    trainer.save()
    return str(run.last_checkpoint)


def drawn(folder):
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def run(ckpt, folder, *flags):
    sample.main(["--ckpt", ckpt, "--out-dir", str(folder), *flags])
    return drawn(folder)


def test_the_files_are_what_the_sampler_draws(ckpt, tmp_path):
    images = run(ckpt, tmp_path, "--n-samples", "3", "--seed", "7", "--batch-size", "2")
    assert list(images) == ["000007.png", "000008.png", "000009.png"]
    diffusion = load_diffusion(ckpt)
    for seed in (7, 8, 9):
        noise = samplers.ImageNoise([seed], (3, 16, 16), "cpu")
        (image,) = dataset.to_uint8(samplers.ddpm(diffusion, noise(), noise=noise))
        difference = np.abs(images[f"{seed:06d}.png"].astype(int) - image.permute(1, 2, 0).numpy().astype(int))
        assert difference.max() <= 1  # a library may round differently for another batch shape


def test_seeds_name_the_images(ckpt, tmp_path):
    some = run(ckpt, tmp_path / "a", "--seeds", "2-3,11")
    assert list(some) == ["000002.png", "000003.png", "000011.png"]
    assert np.array_equal(run(ckpt, tmp_path / "b", "--seeds", "11")["000011.png"], some["000011.png"])


def test_flags_change_what_they_should(ckpt, tmp_path):
    usual = run(ckpt, tmp_path / "usual", "--seeds", "0")["000000.png"].astype(int)

    def distance(name, *flags):
        return np.abs(run(ckpt, tmp_path / name, "--seeds", "0", *flags)["000000.png"] - usual)

    assert distance("patches", "--patch-batch-size", "1").max() <= 1
    assert distance("last", "--weights", "model").mean() > 1
    assert distance("ddim", "--sampler", "ddim", "--steps", "5").mean() > 1
    assert distance("eta", "--sampler", "ddim", "--eta", "1").max() <= 1  # over all steps that is ancestral sampling
    assert distance("fewer", "--steps", "5").mean() > 1
    solver = ("--sampler", "dpm-solver++")
    solved = run(ckpt, tmp_path / "solved", "--seeds", "0", *solver)["000000.png"].astype(int)
    assert np.abs(solved - usual).mean() > 1
    few = (*solver, "--steps", "8")
    flags = [(), ("--order", "1"), ("--order", "3"), ("--spacing", "trailing"), ("--eta", "1")]
    distances = [distance(f"solver{i}", *few, *more) for i, more in enumerate(flags)]
    assert len({each.tobytes() for each in distances}) == len(flags)
    half = distance("half", "--dtype", "bf16")
    assert 0 < half.mean() < 5


@pytest.mark.slow
def test_max_memory_picks_the_patch_batch_and_says_so(ckpt, tmp_path, capsys):
    usual = run(ckpt, tmp_path / "usual", "--seeds", "0-1")
    config = load_diffusion(ckpt).config
    three, four = (planner.sampling_peak(config, batch_size=2, patch_batch_size=k).total for k in (3, 4))
    for room, size in ((three, 3), (four - 1, 3), (four, 4), (10**9, 8)):
        limited = run(ckpt, tmp_path / str(room), "--seeds", "0-1", "--max-memory", str(room))
        assert f"{size} of 8 patches share a pass" in capsys.readouterr().out
        for name, pixels in usual.items():
            assert np.abs(limited[name].astype(int) - pixels).max() <= 1
    with pytest.raises(InputError, match=r"--max-memory 0\.1 MiB is too little: one patch at a time needs"):
        run(ckpt, tmp_path / "little", "--seeds", "0-1", "--max-memory", "0.1MiB")


@pytest.mark.slow
def test_compiled_pictures_are_the_same(ckpt, tmp_path):
    options = ("--seeds", "0-2", "--batch-size", "3", "--patch-batch-size", "5", "--sampler", "ddim", "--steps", "2")
    usual = run(ckpt, tmp_path / "usual", *options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name, pixels in run(ckpt, tmp_path / "compiled", *options, "--compile").items():
        assert np.abs(usual[name].astype(int) - pixels).max() <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


FAST = ("--sampler", "ddim", "--steps", "2")


def test_a_job_that_was_cut_off_is_finished_by_running_it_again(ckpt, tmp_path, monkeypatch):
    whole = run(ckpt, tmp_path / "whole", "--seeds", "0-6", "--batch-size", "3", *FAST)
    folder, saved = tmp_path / "again", []
    save = pictures.save_png

    def cut_off(path, picture):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(path, picture)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_png", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(ckpt, folder, "--seeds", "0-6", "--batch-size", "3", *FAST)
    (folder / "000002.png").write_bytes((folder / "000002.png").read_bytes()[:100])
    drawn, draw = [], samplers.draw

    def watched(diffusion, seeds, **options):
        drawn.extend(seeds)
        return draw(diffusion, seeds, **options)

    monkeypatch.setattr(samplers, "draw", watched)
    assert_near(run(ckpt, folder, "--seeds", "0-6", "--batch-size", "3", *FAST), whole)
    assert drawn == [2, 4, 5, 6]
    run(ckpt, folder, "--seeds", "0-6", *FAST)
    assert drawn == [2, 4, 5, 6]
    run(ckpt, folder, "--seeds", "0-1", "--overwrite", *FAST)
    assert drawn == [2, 4, 5, 6, 0, 1]


def assert_near(got, wanted):
    """The same pictures: where a library rounds differently for another batch, one level, under 0.1 % of the values."""
    assert got.keys() == wanted.keys()
    for name, pixels in wanted.items():
        difference = np.abs(got[name].astype(int) - pixels)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001


@pytest.mark.parametrize(
    "flags",
    [("--batch-size", "1"), ("--batch-size", "3"), ("--batch-size", "8", "--patch-batch-size", "5")],
    ids=" ".join,
)
def test_an_image_depends_on_its_seed_alone(ckpt, tmp_path, flags):
    usual = run(ckpt, tmp_path / "usual", "--seeds", "0-8", *FAST)
    assert_near(run(ckpt, tmp_path / "other", "--seeds", "0-8", *FAST, *flags), usual)


def test_a_default_that_is_spelled_out_is_no_other_setting(ckpt, tmp_path):
    solver = ("--sampler", "dpm-solver++")
    first = run(ckpt, tmp_path, "--seeds", "0-1", *solver)
    again = run(ckpt, tmp_path, "--seeds", "0-1", *solver, "--order", "2", "--steps", "20", "--spacing", "logsnr")
    assert again.keys() == first.keys()


def test_other_settings_are_refused(ckpt, tmp_path):
    run(ckpt, tmp_path, "--seeds", "0-1", *FAST)
    run(ckpt, tmp_path, "--seeds", "2-3", "--batch-size", "1", "--patch-batch-size", "3", *FAST)  # how, and not what
    for flags, words in (
        (("--sampler", "ddim", "--steps", "3"), r"another steps \(2 instead of 3\)"),
        ((*FAST, "--dtype", "bf16"), r'another dtype \("float32" instead of "bf16"\)'),
        ((*FAST, "--weights", "model"), r'another weights \("ema" instead of "model"\)'),
        ((*FAST, "--eta", "1"), r"another eta \(0\.0 instead of 1\.0\)"),
    ):
        with pytest.raises(InputError, match=words):
            run(ckpt, tmp_path, "--seeds", "4", *flags)
    assert list(drawn(tmp_path)) == [f"{seed:06d}.png" for seed in range(4)]


def test_memory_does_not_grow_with_the_number_of_images(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(samplers, "draw", lambda diffusion, seeds, **_: torch.zeros(len(seeds), 3, 16, 16))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of files, for their memory alone
    run(ckpt, tmp_path / "warm", "--n-samples", "8")
    peaks = {}
    for count in (100, 1000):
        peaks[count] = []
        for attempt in "ab":  # what happens once, an import or a collection of garbage, is in one of them
            folder = tmp_path / f"{count}{attempt}"
            tracemalloc.start()
            sample.main(["--ckpt", ckpt, "--out-dir", str(folder), "--n-samples", str(count)])
            peaks[count].append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(list(folder.glob("*.png"))) == count
    assert min(peaks[1000]) - min(peaks[100]) < 40 * 900  # bytes; a picture alone is 768


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_only_the_network_computes_in_half_precision(ckpt, dtype, sampler):
    halves = load_diffusion(ckpt, dtype=command_line.DTYPES[dtype])
    seen = set()
    options = {"steps": 6}
    images = samplers.draw(
        halves, [0], sampler=sampler, observe=lambda t, x_t, x_0: seen.update((x_t.dtype, x_0.dtype)), **options
    )
    assert seen == {torch.float32}
    assert images.dtype == torch.float32
    usual = samplers.draw(load_diffusion(ckpt), [0], sampler=sampler, **options)
    assert 0 < (images - usual).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("weight", "value"),
    [("block_out.conv_1.weight", torch.inf), ("conv_out.weight", 6e4)],
    ids=["inside, which makes it NaN", "at the end, which makes it infinite"],
)
def test_a_prediction_beyond_fp16_is_told_and_not_drawn_black(ckpt, tmp_path, monkeypatch, weight, value):
    def overflowing(*arguments, **options):
        diffusion = load_diffusion(*arguments, **options)
        with torch.no_grad():
            diffusion.unet.get_parameter(weight).fill_(value)
        return diffusion

    monkeypatch.setattr(checkpoint, "load_diffusion", overflowing)
    with pytest.raises(InputError, match="image of seed 0 is not finite, which no picture can show; --dtype float32"):
        run(ckpt, tmp_path, "--n-samples", "2", "--dtype", "fp16", *FAST)
    assert drawn(tmp_path) == {}


def test_an_image_that_is_removed_meanwhile_is_told(ckpt, tmp_path, monkeypatch):
    draw = samplers.draw

    def removing(diffusion, seeds, **options):
        if 2 in seeds:
            (tmp_path / "000000.png").unlink()
        return draw(diffusion, seeds, **options)

    options = ("--seeds", "0-3", "--batch-size", "2", *FAST)
    with monkeypatch.context() as patch:
        patch.setattr(samplers, "draw", removing)
        with pytest.raises(InputError, match=r"^1 images in .* were removed while others were drawn; the same command"):
            run(ckpt, tmp_path, *options, "--grid")
    assert list(run(ckpt, tmp_path, *options)) == [f"{seed:06d}.png" for seed in range(4)]


@pytest.mark.parametrize(
    ("last", "words"),
    [(1, r"000002\.png could not be written: No such file or directory"), (3, "4 images in .* were removed")],
)
def test_a_folder_that_is_removed_meanwhile_is_told(ckpt, tmp_path, monkeypatch, last, words):
    write = ImageFolder.write
    out = tmp_path / "out"

    def removing(folder, seed, image):
        write(folder, seed, image)
        if seed == last:
            shutil.rmtree(out)

    monkeypatch.setattr(ImageFolder, "write", removing)
    with pytest.raises(InputError, match=words):
        run(ckpt, out, "--seeds", "0-3", *FAST)


@pytest.mark.parametrize("full", ["000002.png", "grid.png", "samples.npz", "steps.gif"])
def test_a_full_disk_is_one_sentence_and_what_was_drawn_stays(ckpt, tmp_path, monkeypatch, full):
    out, flush = tmp_path / "out", os.fsync
    options = ("--seeds", "0-3", "--grid", "--npz", "--trajectory", str(out / "steps.gif"), "--batch-size", "2", *FAST)

    def fsync(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(InputError, match=rf"{full} could not be written: No space left on device; the images bef"):
            run(ckpt, out, *options)
    there = drawn(out)
    assert not list(out.glob("*.unfinished"))
    assert set(there) - {"grid.png"} == {f"{s:06d}.png" for s in range({"000002.png": 2, "steps.gif": 0}.get(full, 4))}
    whole = run(ckpt, out, *options)
    assert len(whole) == 5
    assert all(np.array_equal(whole[name], pixels) for name, pixels in there.items())


def test_what_can_be_said_before_the_weights_are_read_is(ckpt, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(load_diffusion(ckpt).config.to_dict()))
    monkeypatch.setattr(checkpoint, "read", lambda path: pytest.fail("read the weights"))
    config = ("--config", str(tmp_path / "config.json"))
    for flags, words in (
        ((*config, "--sampler", "ddim", "--steps", "21"), r"steps is 21; it must lie in \[1, 20\]"),
        (("--config", str(tmp_path / "no.json")), "no.json: cannot be read"),
        (("--config", str(tmp_path)), ": cannot be read: Is a directory"),
    ):
        with pytest.raises(InputError, match=words):
            run(ckpt, tmp_path / "out", *flags)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"--out-dir '.*out' cannot be used: '.*' cannot be written to"):
        run(ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_jobs_at_once_in_one_folder(ckpt, tmp_path):
    """They draw three of the seeds both, and begin at the same time."""
    whole = run(ckpt, tmp_path / "whole", "--seeds", "0-8", *FAST)
    with contextlib.ExitStack() as stack:
        jobs = []
        for seeds in ("0-5", "3-8"):
            (tmp_path / seeds).mkdir()
            flags = ("--ckpt", ckpt, "--out-dir", tmp_path / "shared", "--seeds", seeds, "--batch-size", 1, *FAST)
            line = commands.launch_line("-m", "patch_based_ddpm.sample", *flags)
            jobs.append(stack.enter_context(commands.running(line, tmp_path / seeds)))
        for job, seeds in zip(jobs, ("0-5", "3-8"), strict=True):
            assert job.wait(commands.TIME_LIMIT) == 0, (tmp_path / seeds / "err").read_text()
    assert_near(drawn(tmp_path / "shared"), whole)
    assert not list((tmp_path / "shared").glob("*.unfinished"))


@pytest.mark.slow
def test_two_processes_share_what_is_left(tmp_path):
    (tmp_path / "trained").mkdir()
    ckpt = make_checkpoint(tmp_path / "trained", model={"grids": 2})
    whole = run(ckpt, tmp_path / "whole", "--seeds", "0-6", *FAST)
    run(ckpt, tmp_path / "shared", "--seeds", "1-2", *FAST)
    done = commands.sample(
        "--ckpt", ckpt, "--out-dir", tmp_path / "shared", "--seeds", "0-6", "--batch-size", 2, *FAST, processes=2
    )
    assert done.returncode == 0, done.stderr
    assert_near(drawn(tmp_path / "shared"), whole)
    assert "4/4" in done.stderr  # the main process's share, what was there included
    done = commands.sample("--ckpt", ckpt, "--out-dir", tmp_path / "shared", *FAST, "--steps", 3, processes=2)
    assert done.returncode != 0
    assert "another steps (2 instead of 3)" in done.stderr
    assert "Traceback" not in done.stderr.split("error:")[0]


def test_share_of_blended_steps(tmp_path, capsys):
    (tmp_path / "trained").mkdir()
    ckpt = make_checkpoint(tmp_path / "trained", model={"grids": 2})
    images = {blend: run(ckpt, tmp_path / blend, "--seeds", "0", "--blend", blend) for blend in ("0", "0.1", "1")}
    usual = run(ckpt, tmp_path / "usual", "--seeds", "0")["000000.png"]
    assert np.array_equal(images["0.1"]["000000.png"], usual)
    for blend in ("0", "1"):
        assert not np.array_equal(images[blend]["000000.png"], usual)
    with pytest.raises(InputError, match=r"another blend \(0\.1 instead of 1\.0\)"):
        run(ckpt, tmp_path / "usual", "--seeds", "1", "--blend", "1")


def test_a_folder_of_an_earlier_version_is_continued(ckpt, tmp_path):
    """Its manifest lacks keys that the model got since; they have their defaults."""
    run(ckpt, tmp_path, "--seeds", "0", *FAST)
    manifest = json.loads((tmp_path / "samples.json").read_text())
    del manifest["model"]["grids"]
    (tmp_path / "samples.json").write_text(json.dumps(manifest))
    assert list(run(ckpt, tmp_path, "--seeds", "1", *FAST)) == ["000000.png", "000001.png"]
    manifest["model"]["grids"] = 2
    (tmp_path / "samples.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"another model\.grids \(2 instead of 1\)"):
        run(ckpt, tmp_path, "--seeds", "2", *FAST)


def test_one_grid_cannot_be_blended(ckpt, tmp_path):
    with pytest.raises(InputError, match="it goes with models of several grids, and this one has 1"):
        run(ckpt, tmp_path, "--seeds", "0", "--blend", "0.5")


def test_grid(ckpt, tmp_path):
    pictures = run(ckpt, tmp_path, "--n-samples", "3", "--grid", "--sampler", "ddim", "--steps", "2")
    assert list(pictures) == ["000000.png", "000001.png", "000002.png", "grid.png"]
    assert np.array_equal(pictures["grid.png"][2:18, 20:36], pictures["000001.png"])


def test_npz(ckpt, tmp_path):
    pictures = run(ckpt, tmp_path, "--seeds", "11,2,3", "--npz", "--sampler", "ddim", "--steps", "2")
    with np.load(tmp_path / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], [pictures[f"{seed:06d}.png"] for seed in (2, 3, 11)])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n-samples", "-1"], "'-1' must be a whole number of at least 1"),
        (["--seeds", "5-2"], "'5-2' in '5-2' must be a seed, or a range"),
        (["--seeds", "0-4000000000,7"], "names more than 1,000,000 seeds; that must be one range"),
        (["--seeds", "0-99999999999"], "must be less than 4294967296"),
        (["--seed", "4294967290"], "the last seed is 4294967305"),
        (["--batch-size", "0"], "'0' must be a whole number of at least 1"),
        (["--patch-batch-size", "x"], "'x' must be a whole number of at least 1"),
        (["--max-memory", "6 apples"], "'6 apples' must be an amount of memory, for example 6GiB"),
        (["--sampler", "dpm-solver++", "--order", "4"], "argument --order: invalid choice: 4"),
        (["--spacing", "karras"], "argument --spacing: invalid choice: 'karras'"),
        (["--trajectory", "a.png"], "'a.png' must end in .webp or .gif"),
        (["--trajectory-of", "x_0"], "--trajectory-of and --patch-borders go with --trajectory"),
        (["--patch-borders"], "--trajectory-of and --patch-borders go with --trajectory"),
        (["--trajectory", "a.gif", "--trajectory-of", "eps"], "argument --trajectory-of: invalid choice: 'eps'"),
        (["--sampler", "ddim", "--eta", "x"], "argument --eta: invalid float value: 'x'"),
        (["--sampler", "unknown"], "invalid choice: 'unknown'"),
        (["--n-samples", "2", "--seeds", "3"], "not allowed with argument"),
        (["--seed", "2", "--seeds", "3"], "does not go with --seeds"),
        (["--n-samples", "1025", "--grid"], "--grid shows at most 1024 images, not 1025"),
    ],
)
def test_bad_flags_end_with_2_and_one_sentence(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        sample.main(["--ckpt", "missing.pt", "--out-dir", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eta", "0.5"], "eta is 0.5, but ddpm always draws all its noise"),
        (["--order", "2"], "order is 2, but ddpm has only one"),
        (["--sampler", "ddim", "--order", "2"], "order is 2, but ddim has only one"),
        (["--sampler", "ddim", "--eta", "2"], r"eta is 2\.0; it must lie in \[0, 1\]"),
        (["--sampler", "dpm-solver++", "--eta", "0.5"], "eta is 0.5; for dpm-solver"),
    ],
)
def test_options_that_do_not_go_together_are_said_before_anything_is_loaded(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        run("missing.pt", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_trajectory_is_of_the_first_batch_and_changes_nothing(ckpt, tmp_path, monkeypatch):
    saved, save = [], Animation.save
    monkeypatch.setattr(Animation, "save", lambda self, *args: saved.append((self, *args)) or save(self, *args))
    options, path = ("--n-samples", "3", "--batch-size", "2", "--steps", "5"), tmp_path / "new" / "steps.webp"
    usual = run(ckpt, tmp_path / "usual", *options)
    assert not saved
    for more, kind, borders in [((), "x_t", 1), (("--trajectory-of", "x_0", "--patch-borders"), "x_0", 2)]:
        drawn = run(ckpt, tmp_path / kind, *options, "--trajectory", str(path), *more)
        assert all(np.array_equal(drawn[name], pixels) for name, pixels in usual.items())
        ((recorder, where, images),) = saved
        assert (recorder.kind, recorder.borders, len(recorder.frames), where) == (kind, borders, 5, path)
        assert [pictures.pixels(image).tolist() for image in images] == [
            drawn[f"00000{i}.png"].tolist() for i in (0, 1)
        ]
        saved.clear()
    with Image.open(path) as animation:
        assert (animation.format, animation.size) == ("WEBP", (2 * (17 + 2) + 2, 17 + 4))


def test_trajectory_that_cannot_be_written_is_said_first(ckpt, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--trajectory '.*steps.gif' cannot be used"):
        run(ckpt, tmp_path / "out", "--trajectory", str(tmp_path / "file" / "steps.gif"))
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(InputError, match=r"--trajectory '.*folder.gif' is a folder; it must be a file"):
        run(ckpt, tmp_path / "out", "--trajectory", str(tmp_path / "folder.gif"))
    assert not list((tmp_path / "out").glob("*.png"))


def test_other_errors_are_sentences_too(ckpt, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out-dir '.*file' cannot be used: '.*file' is a file\."):
        run(ckpt, tmp_path / "file")
    with pytest.raises(InputError, match=r"--out-dir '.*below' cannot be used: '.*file' is a file"):
        run(ckpt, tmp_path / "file" / "below")
    with pytest.raises(InputError, match="is a folder, not a checkpoint file"):
        run(str(tmp_path), tmp_path / "out")
    with pytest.raises(InputError, match="there is no such file"):
        run("missing.pt", tmp_path / "out")
    with pytest.raises(InputError, match=r"steps is 21; it must lie in \[1, 20\]"):
        run(ckpt, tmp_path / "out", "--sampler", "ddim", "--steps", "21")
    assert not (tmp_path / "out").exists()
