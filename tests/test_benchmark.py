import contextlib
import dataclasses
import io
import json
import statistics
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from patch_based_ddpm import Config, GaussianDiffusion, UNet, benchmark, samplers
from patch_based_ddpm.benchmarking import measure
from patch_based_ddpm.benchmarking.baseline_unet import BaselineUNet
from patch_based_ddpm.benchmarking.measure import Benchmark, Setting
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.planning.live_memory import KIB, KINDS, MIB, LiveMemory
from patch_based_ddpm.training.step import TrainingStep
from support.commands import write_config

IMAGES = 2
PEAK = (*KINDS, "total")


def run(folder, *flags):
    """What the command prints, and the report it writes."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        benchmark.main(["--out-dir", str(folder), *map(str, flags)])
    return printed.getvalue(), json.loads((folder / "benchmark.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run that measures everything: what it printed, its report, and its folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    flags = ["--patch-dividers", "1,2", "--patch-batch-sizes", "3,all", "--batch-size", IMAGES, "--repeats", 2]
    return *run(folder / "out", "--config", write_config(folder), *flags, "--device", "cpu"), folder


def tables(printed):
    """The tables by the sentence above them, each row as a dict."""
    parts, found = printed.split("\n\n"), {}
    for title, part in zip(parts, parts[1:]):
        if part.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n")]
            found[title] = [dict(zip(head, row, strict=True)) for row in rows]
    return found


SETTINGS = [
    ("baseline", 1, 2, "float32"),
    ("ours", 1, 2, "float32"),
    ("ours", 1, 2, "bf16"),
    ("baseline", 2, 8, "float32"),
    ("ours", 2, 3, "float32"),
    ("ours", 2, 3, "bf16"),
    ("ours", 2, 8, "float32"),
    ("ours", 2, 8, "bf16"),
]
TITLES = {
    "Memory of a sampling step, MiB:": "sampling",
    "Memory of a training step, MiB:": "training",
    "Time of a sampling step:": "sampling",
    "Time of a training step:": "training",
}


def test_every_setting_is_in_the_report_and_in_every_table(whole):
    printed, report, _ = whole
    names = [
        tuple(row[name] for name in ("network", "patch_divider", "patches", "dtype")) for row in report["settings"]
    ]
    assert names == SETTINGS
    assert list(tables(printed)) == list(TITLES)
    for rows in tables(printed).values():
        shown = [(row["network"], int(row["N"]), row["patches per pass"], row["dtype"]) for row in rows]
        assert shown == [
            (network, N, f"all {patches}" if patches == N * N * IMAGES else str(patches), dtype)
            for network, N, patches, dtype in SETTINGS
        ]


def model_of(network, config, N):
    sections = config.to_dict()
    config = Config.from_dict({**sections, "model": {**sections["model"], "patch_divider": N}})
    return GaussianDiffusion(measure.NETWORKS[network](config.model), config)


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_memory_of_sampling_is_that_of_a_samplers_step(whole, number):
    network, N, patches, dtype = SETTINGS[number]
    diffusion = model_of(network, Config.load(whole[2] / "config.json"), N).requires_grad_(False)
    if dtype == "bf16":
        diffusion.unet.bfloat16()
    with LiveMemory(diffusion) as memory, torch.inference_mode():
        x_T = torch.randn(IMAGES, 3, 16, 16)
        options = {"noise": lambda: torch.randn_like(x_T), "steps": 2, "progress": lambda timesteps: timesteps[:1]}
        samplers.ddpm(diffusion, x_T, patch_batch_size=patches, **options)
    measured = whole[1]["settings"][number]["memory"]["sampling"]
    assert {name: measured[name] for name in PEAK} == vars(memory.peak())


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_memory_of_training_is_that_of_trainings_own_step(whole, number):
    network, N, patches, dtype = SETTINGS[number]
    diffusion = model_of(network, Config.load(whole[2] / "config.json"), N)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if dtype == "bf16" else "no")
    adam = torch.optim.Adam(diffusion.unet.parameters(), fused=True)
    diffusion.unet, adam = accelerator.prepare(diffusion.unet, adam)
    trainer = dataclasses.replace(diffusion.config.trainer, patch_batch_size=patches)
    step = TrainingStep(trainer, accelerator, diffusion, adam)
    step(0, [torch.randn(IMAGES, 3, 16, 16)])
    with LiveMemory(diffusion, adam.optimizer) as memory:
        step(1, [torch.randn(IMAGES, 3, 16, 16)])
    wanted, measured = memory.peak(), whole[1]["settings"][number]["memory"]["training"]
    for name in PEAK:
        assert measured[name] == pytest.approx(getattr(wanted, name), abs=KIB), name
    weights = sum(parameter.numel() * 4 for parameter in diffusion.parameters())
    assert measured["gradients"] >= weights
    assert measured["optimizer"] >= 2 * weights
    assert measured["device"] > measured["total"]


def test_the_printed_memory_is_that_of_the_report(whole):
    printed, report, _ = whole
    for title in list(TITLES)[:2]:
        for shown, row in zip(tables(printed)[title], report["settings"], strict=True):
            for name in PEAK:
                assert shown[name] == f"{row['memory'][TITLES[title]][name] / MIB:,.1f}"


def test_the_printed_times_follow_from_the_raw_ones(whole):
    printed, report, _ = whole
    for title in list(TITLES)[2:]:
        kind = TITLES[title]
        raw = {names: row["seconds"][kind] for names, row in zip(SETTINGS, report["settings"], strict=True)}
        for names, shown in zip(SETTINGS, tables(printed)[title], strict=True):
            assert len(raw[names]) == 2
            assert min(raw[names]) > 0
            seconds = statistics.median(raw[names])
            assert (shown["seconds"], shown["images/s"]) == (f"{seconds:.4g}", f"{IMAGES / seconds:.4g}")
            for column, other in (
                ("time / whole image", ("baseline", 1, IMAGES, "float32")),
                ("time / all patches", ("baseline", names[1], names[1] ** 2 * IMAGES, "float32")),
            ):
                pairs = [own / theirs for own, theirs in zip(raw[names], raw[other], strict=True)]
                assert shown[column] == f"{sum(pairs) / 2:.3f} ({min(pairs):.3f}-{max(pairs):.3f})"


def test_the_machine_and_the_meaning_of_figures_are_told(whole):
    printed, report, _ = whole
    assert report["machine"]["processor"] in printed
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["machine"]["gpu"] is None
    assert {"memory", "seconds", "time / whole image", "time / all patches"} < set(report["definitions"])
    assert report["config"]["model"]["dim"] == 8


def test_loading_a_checkpoint_is_measured(whole):
    printed, report, folder = whole
    size, peak = (report["checkpoint_loading"][name] for name in ("file", "peak"))
    assert f"file {size / MIB:,.1f} MiB, peak host memory {peak / MIB:,.1f} MiB." in printed
    weights = report["settings"][0]["memory"]["training"]["weights"]
    assert 4 * weights < size < 4 * weights + MIB  # with averaged weights and Adam's moments
    assert not list((folder / "out").glob("tmp*"))


@pytest.mark.slow
def test_memory_of_loading_a_checkpoint_is_that_of_a_process_of_its_own(make_config, tmp_path):
    """This process holds more than the loading one; at least one set of weights is loaded."""
    config = make_config(model={"dim": 64, "dim_mults": [1, 2, 4], "resnet_block_groups": 8})
    weights = sum(parameter.numel() * 4 for parameter in UNet.from_config(config.model).parameters())
    held = torch.ones(4 * weights + 512 * MIB, dtype=torch.uint8)
    loading = measure.checkpoint_loading(config, tmp_path)
    del held
    assert weights > 20 * MIB
    assert 0.9 * weights < loading["peak"] < 2 * loading["file"]
    assert not list(tmp_path.iterdir())


def test_the_input_pipeline_is_measured_alone(whole):
    printed, report, _ = whole
    speeds = report["data_loading"]["images_per_second"]
    assert len(speeds) == 2
    assert f"builtin:faces, 0 worker(s): {sum(speeds) / 2:,.1f} images/s" in printed


def drawn(path):
    """The picture's height and width; it is neither blank nor black."""
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("L"))
    assert 0.01 < (pixels < 200).mean() < 0.5
    return pixels.shape


def test_the_picture_has_two_panels(whole):
    height, width = drawn(whole[2] / "out" / "benchmark.png")
    assert width == 2 * height


def test_memory_only(tmp_path, monkeypatch):
    unloaded(monkeypatch)
    flags = ["--dim", 8, "--dim-mults", "1,2", "--image-size", 8, "--patch-dividers", "2", "--dtypes", "float32"]
    printed, report = run(tmp_path, *flags, "--memory-only", "--device", "cpu")
    assert list(tables(printed)) == list(TITLES)[:2]
    assert (report["data_loading"], report["repeats"]) == (None, 0)
    assert [row["seconds"] for row in report["settings"]] == [{}] * 4
    assert report["config"]["trainer"]["train_dataset_dir"] == "builtin:faces"
    height, width = drawn(tmp_path / "benchmark.png")
    assert width == height  # one panel


@pytest.fixture
def unmeasured(monkeypatch):
    """Runs take no time: every figure is the same number."""
    monkeypatch.setattr(Benchmark, "memory", lambda self, setting: dict.fromkeys([*PEAK, "device"], MIB))
    monkeypatch.setattr(Benchmark, "seconds", lambda self, chosen, repeats: {s: [1.0] * repeats for s in chosen})
    unloaded(monkeypatch)


def unloaded(monkeypatch):
    monkeypatch.setattr(measure, "checkpoint_loading", lambda config, folder: {"file": MIB, "peak": MIB})


def test_without_flags_it_is_the_papers_network(unmeasured, tmp_path):
    _, report = run(tmp_path, "--memory-only")
    model = report["config"]["model"]
    assert (model["dim"], model["dim_mults"], model["image_size"]) == (128, [1, 2, 4, 8], 128)
    assert report["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    # The baseline for each N, ours twice where one patch is all there is, and else four times.
    assert len(report["settings"]) == 4 + 2 + 3 * 4


def test_without_matplotlib_the_figures_are_kept(unmeasured, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    printed, report = run(tmp_path, "--memory-only")
    assert len(report["settings"]) > 0
    last = printed.strip().split("\n")[-1]
    assert last.endswith(
        'benchmark.png needs matplotlib, which `pipenv install --categories "packages benchmark"` installs.'
    )
    assert not (tmp_path / "benchmark.png").exists()


def test_a_cache_is_measured_where_the_config_asks_for_one(unmeasured, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "pictures" / "a.png")
    for cached, faces in ((True, False), (False, False), (True, True)):
        where = "builtin:faces" if faces else str(tmp_path / "pictures")
        path = write_config(tmp_path, train_dataset_dir=where, cache_images=cached, train_batch_size=200)
        _, report = run(tmp_path / "out", "--config", path, "--patch-dividers", 2, "--repeats", 1, "--device", "cpu")
        loading = report["data_loading"]
        assert (loading["cached"], loading["data"], loading["batch_size"]) == (cached and not faces, where, 200)
        assert (tmp_path / "out" / "image_cache.npy").exists()
    assert not (tmp_path / "run").exists()


def test_loading_speed_by_hand(monkeypatch):
    """A clock on which every batch takes as many seconds as its number, and the first two warm up."""
    now = [0.0]

    def batches():
        for number in range(6):
            now[0] += number
            yield torch.zeros(5, 1, 1, 1)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.loading_speed(batches(), repeats=2, batches_per_repeat=2) == [10 / (2 + 3), 10 / (4 + 5)]


def bench(make_config, kind, compiled=False):
    return Benchmark(kind, configs={2: make_config()}, images=2, device=torch.device("cpu"), compiled=compiled)


@pytest.mark.parametrize(
    ("kind", "home", "name"),
    [("sampling", samplers, "ddpm"), ("training", GaussianDiffusion, "accumulate_gradient")],
)
def test_a_step_runs_the_code_of_the_sampler_and_of_training(make_config, monkeypatch, kind, home, name):
    usual, calls = getattr(home, name), []

    def recorded(*args, **options):
        calls.append(name)
        return usual(*args, **options)

    monkeypatch.setattr(home, name, recorded)
    assert bench(make_config, kind).memory(Setting("ours", 2, 3, "float32")) is not None
    assert len(calls) == 2  # the first step, and the one that counts


def test_settings_take_turns(make_config, monkeypatch):
    order = []
    monkeypatch.setitem(measure.STEPS, "training", lambda *given: order.append(given[2].patches))
    chosen = [Setting("ours", 2, patches, "float32") for patches in (1, 3, 8)]
    taken = bench(make_config, "training").seconds(chosen, repeats=3)
    assert order == [1, 3, 8] * 4
    assert [len(taken[setting]) for setting in chosen] == [3, 3, 3]


def test_only_our_network_is_compiled_and_sees_full_passes(make_config, monkeypatch):
    sizes = []

    class Compiled(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, *inputs):
            sizes.append(len(inputs[0]))
            return self.network(*inputs)

    def compiled(network, **options):
        assert isinstance(network, UNet)
        assert options["fullgraph"]
        return Compiled(network)

    monkeypatch.setattr(torch, "compile", compiled)
    chosen = [Setting("baseline", 2, 8, "float32"), Setting("ours", 2, 3, "float32")]
    for kind in ("sampling", "training"):
        sizes.clear()
        taken = bench(make_config, kind, compiled=True).seconds(chosen, repeats=2)
        passes, uncounted = 3, 3
        assert sizes == [3] * passes * (uncounted + 2)
        assert [len(seconds) for seconds in taken.values()] == [2, 2]


def cramp(monkeypatch, network, room):
    """Let a network have room for `room` patches."""
    kind = {"baseline": BaselineUNet, "ours": UNet}[network]
    usual = kind.forward

    def forward(self, patches, *others):
        if len(patches) > room:
            raise torch.OutOfMemoryError
        return usual(self, patches, *others)

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("kind", ["sampling", "training"])
def test_running_out_of_memory_is_told(make_config, monkeypatch, kind):
    """And without a warning of smaller passes, with which `sample` goes on."""
    cramp(monkeypatch, "ours", room=4)
    assert bench(make_config, kind).memory(Setting("ours", 2, 8, "float32")) is None
    eight, three = Setting("ours", 2, 8, "float32"), Setting("ours", 2, 3, "float32")
    taken = bench(make_config, kind).seconds([eight, three], repeats=2)
    assert {setting: len(seconds) for setting, seconds in taken.items()} == {three: 2}


@pytest.mark.parametrize(("network", "room"), [("baseline", 0), ("baseline", 1), ("baseline", 4), ("ours", 4)])
def test_what_does_not_fit_is_left_out_of_the_times(monkeypatch, tmp_path, network, room):
    """A baseline that does not fit is why people come: the rest is measured all the same."""
    cramp(monkeypatch, network, room)
    unloaded(monkeypatch)
    images = 1 if room == 0 else 2  # a whole image is then a single patch, too many all the same
    flags = ["--patch-dividers", "2", "--patch-batch-sizes", "3,all", "--batch-size", images, "--repeats", 1]
    flags += ["--dtypes", "float32", "--device", "cpu"]
    printed, report = run(tmp_path / "out", "--config", write_config(tmp_path), *flags)
    cramped = [row["network"] == network and row["patches"] > room for row in report["settings"]]
    assert sum(cramped) == (2 if room < 2 else 1)
    for title, kind in TITLES.items():
        for shown, row, out in zip(tables(printed)[title], report["settings"], cramped, strict=True):
            assert ("out of memory" in shown.values()) == out
            assert (row["memory"][kind] is None) == (row["seconds"][kind] is None) == out
    relative = [row["time / all patches"] for row in tables(printed)["Time of a training step:"]]
    assert relative.count("") == (4 if room < 2 else 3 if network == "baseline" else 1)
    drawn(tmp_path / "out" / "benchmark.png")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dim", "0"], "'0' must be a whole number of at least 1"),
        (["--dim-mults", "1,x"], "'x' must be a whole number of at least 1"),
        (["--patch-dividers", "1,,2"], "'' must be a whole number of at least 1"),
        (["--patch-batch-sizes", "1,every"], "'every' must be a whole number of at least 1, or all"),
        (["--dtypes", "float32,fp8"], "'fp8' must be one of float32, bf16"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--repeats", "0"], "'0' must be a whole number of at least 1"),
        (["--config", "c.json", "--image-size", "8"], "they do not go with --config"),
    ],
)
def test_bad_flags_end_with_2_and_one_sentence(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--out-dir", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(["--out-dir", str(tmp_path / "out"), "--device", "cuda"])
    assert "--device is cuda, but PyTorch finds no CUDA GPU here" in capsys.readouterr().err


def test_other_errors_are_sentences_too(tmp_path):
    (tmp_path / "file").touch()
    for flags, words in (
        (["--dim", "10"], "model.dim is 10; it must be a multiple of resnet_block_groups"),
        (["--patch-dividers", "3"], "model.patch_divider is 3; it must be one of 1, 2, 4, 8, 16"),
        (["--config", str(tmp_path / "missing.json")], "missing.json"),
        (["--dim", "8"], r"--out-dir '.*file' cannot be used"),
    ):
        with pytest.raises(InputError, match=words):
            benchmark.main(["--out-dir", str(tmp_path / "file"), *flags])
