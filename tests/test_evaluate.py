import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patch_based_ddpm import Config, GaussianDiffusion, checkpoint, command_line, evaluate, sample, samplers
from patch_based_ddpm.data import dataset, pictures
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import image_sets, sliced_wasserstein
from patch_based_ddpm.randomness import Purpose, generator
from support.commands import launch, write_config
from support.face_images import crowd, images, mixed

FACES = ("--data", "builtin:faces", "--data-count", "40")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds config.json and model.pt of a fresh tiny model of 32 px."""
    folder = tmp_path_factory.mktemp("model")
    path = write_config(folder, model={"image_size": 32})
    content = json.loads(path.read_text())
    content["diffusion"] = {"timesteps": 10}
    path.write_text(json.dumps(content))
    config = Config.load(path)
    torch.manual_seed(0)
    weights = GaussianDiffusion.from_config(config).unet.state_dict()
    checkpoint.save(folder / "model.pt", {"config": config.to_dict(), "step": 1, "model": weights, "ema": weights})
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty folder: `run(*flags)` returns its JSON."""
    monkeypatch.setattr(sliced_wasserstein, "MOST_PATCHES", 2000)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        evaluate.main([*map(str, flags), "--out", "out/report.json"])
        return json.loads((tmp_path / "out" / "report.json").read_text())

    return run


def write(folder, faces):
    folder.mkdir()
    for number, face in enumerate(faces):
        pictures.save_png(folder / f"{number:06d}.png", pictures.pixels(face))
    return folder


def test_overlap_difference_of_a_model_with_two_grids(run, folder, tmp_path):
    """By hand: from the first real faces and the noise of the figure's own seed."""
    config = Config.load(folder / "config.json")
    config = replace(config, model=replace(config.model, grids=2))
    diffusion = GaussianDiffusion.from_config(config).eval()
    weights = diffusion.unet.state_dict()
    path = tmp_path / "two.pt"
    checkpoint.save(path, {"config": config.to_dict(), "step": 1, "model": weights, "ema": weights})
    report = run("--ckpt", path, "--n-samples", 4, *FACES)
    found = {name: row["samples"] for name, row in report["figures"].items() if name.startswith("overlap")}
    data = image_sets.open_data("builtin:faces", (3, 32, 32), 40, tmp_path, "stop")
    x_0 = torch.cat(list(data.batches(range(40), 8)))
    noise = torch.cat(list(torch.randn(40, 3, 32, 32, generator=generator(0, Purpose.OVERLAP)).split(8)))
    for level, t in ((0.1, 1), (0.5, 5)):
        step = torch.full((40,), t)
        with torch.no_grad():
            x_t = diffusion.q_sample(x_0, step, noise)
            first, second = (diffusion.predict_x_0(x_t, step, grids=(number,)) for number in (0, 1))
        assert found[f"overlap difference, t / T = {level:g}"] == pytest.approx(
            (first - second).abs().mean().item(), rel=1e-3
        )
    alone = run("--ckpt", folder / "model.pt", "--n-samples", 4, *FACES)
    assert not [name for name in alone["figures"] if name.startswith("overlap")]


def test_an_image_that_is_not_finite_is_told(run, folder, monkeypatch):
    def draw(diffusion, seeds, **options):
        return torch.stack([torch.full((3, 32, 32), torch.nan if seed == 3 else 0.0) for seed in seeds])

    monkeypatch.setattr(samplers, "draw", draw)
    with pytest.raises(InputError, match="the image of seed 3 is not finite"):
        run("--ckpt", folder / "model.pt", "--n-samples", 8, *FACES)


def test_a_folder_beside_real_images(run, tmp_path, capsys):
    real = images(crowd(24, seed=5), 32, 32)
    samples = write(tmp_path / "samples", mixed([real.roll(shift, 0) for shift in range(4)], 2))
    Image.new("RGB", (99, 99)).save(samples / "grid.png")
    report = run("--samples", samples, *FACES, "--patch-divider", 2)
    shown = capsys.readouterr().out
    assert report["samples"] == {"source": str(samples), "count": 24}
    assert report["data"] | {"statistics": 0} == {"source": "builtin:faces", "count": 40, "statistics": 0}
    assert report["image_shape"] == [3, 32, 32]
    figures = report["figures"]
    assert figures["seam ratio, 2 x 2"]["samples"] > 1.5
    assert figures["disagreement"]["samples"] > 0.05
    assert figures["disagreement"]["data"] < 0.01
    for name, values in figures.items():
        (line,) = (line for line in shown.splitlines() if line.startswith(name + "  "))
        assert line[len(name) :].split() == [f"{value:,.4f}" for value in values.values() if value is not None]
    assert "every figure and what it means is in out/report.json" in shown.lower()


def test_drawn_samples_are_judged_like_those_in_files(run, folder, tmp_path):
    drawing = ("--sampler", "ddim", "--steps", "3", "--batch-size", "3")
    ckpt = str(folder / "model.pt")
    sample.main(["--ckpt", ckpt, "--out-dir", str(tmp_path / "files"), "--n-samples", "5", "--grid", *drawing])
    written = run("--samples", tmp_path / "files", *FACES, "--patch-divider", 2)
    drawn = run("--ckpt", ckpt, "--n-samples", 5, *FACES, *drawing)
    assert drawn["samples"]["steps"] == 3
    assert drawn["patch_divider"] == 2
    assert list(drawn["figures"]) == list(written["figures"])
    for name, values in drawn["figures"].items():
        # a batch of another make-up may round a pixel differently
        assert values["samples"] == pytest.approx(written["figures"][name]["samples"], rel=0.02, abs=1e-3), name
    other = run("--ckpt", ckpt, "--n-samples", 5, *FACES, *drawing, "--patch-divider", 4)
    assert "seam ratio, 4 x 4" in other["figures"]


def test_real_images_are_read_once(run, folder, monkeypatch):
    first = run("--config", folder / "config.json", *FACES)
    assert first["samples"] is None
    assert all(values["samples"] is None for values in first["figures"].values())
    statistics = list(Path("logs/evaluation").iterdir())
    assert [str(path) for path in statistics] == [first["data"]["statistics"]]
    monkeypatch.setattr(dataset.FittedImages, "read", None)
    again = run("--config", folder / "config.json", *FACES)
    assert again == first
    judged = run("--ckpt", folder / "model.pt", "--n-samples", 2, *FACES, "--sampler", "ddim", "--steps", 1)
    assert judged["figures"]["MS-SSIM"]["data"] == first["figures"]["MS-SSIM"]["data"]
    with pytest.raises(TypeError):  # what else is asked for must be read
        run("--config", folder / "config.json", "--data", "builtin:faces", "--data-count", 41)


def test_damaged_statistics_are_taken_again(run, folder):
    first = run("--config", folder / "config.json", *FACES)
    with open(first["data"]["statistics"], "r+b") as file:
        file.truncate(1000)
    assert run("--config", folder / "config.json", *FACES) == first


def test_grey_images_of_any_shape(run, tmp_path):
    for name, seed in (("samples", 0), ("data", 1)):
        rng = np.random.default_rng(seed)
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = rng.integers(0, 256, (24, 36), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    figures = run("--samples", tmp_path / "samples", "--data", tmp_path / "data", "--patch-divider", 3)["figures"]
    assert figures["seam ratio, 3 x 3"]["samples"] == pytest.approx(1, abs=0.2)
    assert "SWD x 10^3, 24 x 36 px" in figures
    assert not any("disagreement" in name for name in figures)
    single = write(tmp_path / "single", images(crowd(1), 32, 32))
    assert run("--samples", single, "--data", single)["figures"]["MS-SSIM"] == {"samples": None, "data": None}


def test_fidelity(run, tmp_path, monkeypatch):
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from support.extractors import MeanColours

    registry = torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY
    monkeypatch.setitem(registry, "inception-v3-compat", MeanColours)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "inception.pth")
    pictures_ = images(crowd(24, seed=5), 32, 32)
    same, darker = write(tmp_path / "same", pictures_), write(tmp_path / "darker", pictures_ * 0.5 - 0.5)
    flags = ("--data", same, "--fidelity", "--inception-weights", tmp_path / "inception.pth")
    assert "FID" not in run("--samples", same, "--data", same)["figures"]
    figures = run("--samples", same, *flags)["figures"]  # although statistics without features are there
    assert figures["FID"]["samples"] == pytest.approx(0, abs=1e-3)
    assert (figures["precision"]["samples"], figures["recall"]["samples"]) == (1, 1)
    worse = run("--samples", darker, *flags)["figures"]
    assert worse["FID"]["samples"] > 100
    assert worse["KID x 10^3"]["samples"] > figures["KID x 10^3"]["samples"]
    assert worse["precision"]["samples"] < 1
    with pytest.raises(InputError, match="--fidelity needs at least 4 real images; there are 3"):
        run("--samples", same, *flags, "--data-count", 3)


def test_figures_go_to_wandb(run, folder, monkeypatch):
    recorded = []
    monkeypatch.setattr(evaluate.tracking, "record", lambda *args, **options: recorded.append((*args, options)))
    flags = ("--ckpt", folder / "model.pt", "--n-samples", 2, "--sampler", "ddim", "--steps", 1, *FACES)
    report = run(*flags)
    assert recorded == []
    run(*flags, "--wandb")
    run("--config", folder / "config.json", *FACES, "--wandb")
    (config, scalars, options), (_, alone, _) = recorded
    assert config == {**report, "image_shape": (3, 32, 32)}
    assert scalars["MS-SSIM"] == report["figures"]["MS-SSIM"]["samples"]
    assert alone["MS-SSIM"] == report["figures"]["MS-SSIM"]["data"]
    assert options["project"] is None


@pytest.mark.slow
def test_two_processes_find_the_same(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawing = ("--n-samples", 5, "--sampler", "ddim", "--steps", 2, "--batch-size", 1)
    words = [str(word) for word in ("--ckpt", folder / "model.pt", *FACES, *drawing)]
    evaluate.main([*words, "--out", "1.json", "--cache-dir", "cache1"])
    both = ("-m", "patch_based_ddpm.evaluate", *words, "--out", "2.json", "--cache-dir", "cache2")
    done = launch(*both, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for shown in (done.stdout, capsys.readouterr().out):
        assert shown.count("seam ratio, 2 x 2 ") == 1
    reports = [json.loads((tmp_path / f"{processes}.json").read_text())["figures"] for processes in (1, 2)]
    assert list(reports[0]) == list(reports[1])
    for name, values in reports[0].items():
        other = reports[1][name]
        for kind in (kind for kind in values if values[kind] is not None or other[kind] is not None):
            assert values[kind] == pytest.approx(other[kind], rel=1e-6, abs=1e-9), name


def test_a_mistake_is_one_sentence_and_2(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: evaluate.main(["--samples", "none", "--data", "builtin:faces"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no folder 'none'; ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samples", "a", "--ckpt", "b"], "not allowed with argument"),
        (["--samples", "a", "--config", "b"], "--config does not go with --samples"),
        ([], "--data alone needs --config"),
        (["--samples", "a", "--inception-weights", "b"], "--inception-weights goes with --fidelity"),
        (["--samples", "a", "--n-samples", "5"], "--n-samples goes with --ckpt"),
        (["--config", "a", "--sampler", "ddim"], "--sampler goes with --ckpt"),
        (["--samples", "a", "--patch-batch-size", "2"], "--patch-batch-size goes with --ckpt"),
        (["--ckpt", "a", "--data-count", "0"], "'0' must be a whole number of at least 1"),
    ],
)
def test_bad_flags_end_with_2_and_one_sentence(capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--data", "builtin:faces", *flags])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [([], "^a: there is no such file"), (["--order", "2"], "order is 2, but ddpm has only one")],
)
def test_what_cannot_be_drawn_is_refused_first(flags, words):
    with pytest.raises(InputError, match=words):
        evaluate.main(["--data", "builtin:faces", "--ckpt", "a", *flags])


def test_data_is_required(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--samples", "a"])
    assert "--data" in capsys.readouterr().err


def test_other_errors_are_sentences_too(run, folder, tmp_path):
    small = write(tmp_path / "small", images(crowd(2), 12, 32))
    with pytest.raises(InputError, match="12 x 32 pixels; each side must be 16 or more"):
        run("--samples", small, *FACES)
    samples = write(tmp_path / "samples", images(crowd(2), 32, 32))
    with pytest.raises(InputError, match="--patch-divider is 5; it must divide both sides, 32 and 32"):
        run("--samples", samples, *FACES, "--patch-divider", 5)
    with pytest.raises(InputError, match="there is no folder 'none'"):
        run("--samples", samples, "--data", "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--cache-dir 'file' cannot be used"):
        run("--samples", samples, *FACES, "--cache-dir", "file")
    with pytest.raises(InputError, match=r"file/report\.json cannot be written: "):
        evaluate.main(["--samples", str(samples), *FACES, "--out", "file/report.json"])
    with pytest.raises(InputError, match="--fidelity needs at least 4 samples; there are 2"):
        run("--samples", samples, *FACES, "--fidelity")
