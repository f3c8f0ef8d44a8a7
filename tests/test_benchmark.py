import contextlib
import io
import json
import statistics
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from patch_based_ddpm import Config, GaussianDiffusion, UNet, benchmark
from patch_based_ddpm.benchmarking import measure
from patch_based_ddpm.benchmarking.baseline_unet import PlainUNet
from patch_based_ddpm.benchmarking.measure import Bench, Setting
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.planning.live_memory import KINDS, MIB, LiveMemory
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
    ("plain", 1, 2, "float32"),
    ("lean", 1, 2, "float32"),
    ("lean", 1, 2, "bf16"),
    ("plain", 2, 8, "float32"),
    ("lean", 2, 3, "float32"),
    ("lean", 2, 3, "bf16"),
    ("lean", 2, 8, "float32"),
    ("lean", 2, 8, "bf16"),
]
TITLES = {
    "Memory of a denoising pass, MiB:": "sampling",
    "Memory of a training step, MiB:": "training",
    "Time of a denoising pass:": "sampling",
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
        shown = [(row["network"], int(row["N"]), row["patches a pass"], row["dtype"]) for row in rows]
        assert shown == [
            (network, N, f"all {patches}" if patches == N * N * IMAGES else str(patches), dtype)
            for network, N, patches, dtype in SETTINGS
        ]


def model_of(network, config, N):
    sections = config.to_dict()
    config = Config.from_dict({**sections, "model": {**sections["model"], "patch_divider": N}})
    return GaussianDiffusion(PlainUNet(config.model) if network == "plain" else UNet.from_config(config.model), config)


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_memory_of_sampling_is_what_the_meter_says(whole, number):
    network, N, patches, dtype = SETTINGS[number]
    diffusion = model_of(network, Config.load(whole[2] / "config.json"), N).requires_grad_(False)
    if dtype == "bf16":
        diffusion.unet.bfloat16()
    with LiveMemory(diffusion) as memory, torch.inference_mode():
        x_t = torch.randn(IMAGES, 3, 16, 16)
        diffusion.p_mean_variance(x_t, torch.randint(1000, (IMAGES,)), patch_batch_size=patches)
    wanted = vars(memory.peak())
    assert {name: whole[1]["settings"][number]["memory"]["sampling"][name] for name in PEAK} == wanted


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_memory_of_training_is_what_the_meter_says(whole, number):
    network, N, patches, dtype = SETTINGS[number]
    diffusion = model_of(network, Config.load(whole[2] / "config.json"), N)
    adam = torch.optim.Adam(diffusion.parameters(), fused=True)

    def step():
        x_0, t = torch.randn(IMAGES, 3, 16, 16), torch.randint(1000, (IMAGES,))
        for batch in diffusion.training_batches(x_0, t, torch.randn(x_0.shape), patches):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                losses = diffusion.patch_losses(batch)
            (losses.sum() / (N * N * IMAGES)).backward()
        adam.step()

    step()
    adam.zero_grad()
    with LiveMemory(diffusion, adam) as memory:
        step()
    measured = whole[1]["settings"][number]["memory"]["training"]
    assert {name: measured[name] for name in PEAK} == vars(memory.peak())
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
                ("time / whole image", ("plain", 1, IMAGES, "float32")),
                ("time / all patches", ("plain", names[1], names[1] ** 2 * IMAGES, "float32")),
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


def test_the_input_pipeline_is_measured_alone(whole):
    printed, report, _ = whole
    speeds = report["loading"]["images_per_second"]
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


def test_memory_only(tmp_path):
    flags = ["--dim", 8, "--dim-mults", "1,2", "--image-size", 8, "--patch-dividers", "2", "--dtypes", "float32"]
    printed, report = run(tmp_path, *flags, "--memory-only", "--device", "cpu")
    assert list(tables(printed)) == list(TITLES)[:2]
    assert (report["loading"], report["repeats"]) == (None, 0)
    assert [row["seconds"] for row in report["settings"]] == [{}] * 4
    assert report["config"]["trainer"]["train_dataset_dir"] == "builtin:faces"
    height, width = drawn(tmp_path / "benchmark.png")
    assert width == height  # one panel


@pytest.fixture
def unmeasured(monkeypatch):
    """Runs take no time: every figure is the same number."""
    monkeypatch.setattr(Bench, "memory", lambda self, kind, setting: dict.fromkeys([*PEAK, "device"], MIB))
    monkeypatch.setattr(
        Bench, "seconds", lambda self, kind, chosen, repeats, progress: {s: [1.0] * repeats for s in chosen}
    )


def test_without_flags_it_is_the_papers_network(unmeasured, tmp_path):
    _, report = run(tmp_path, "--memory-only")
    model = report["config"]["model"]
    assert (model["dim"], model["dim_mults"], model["image_size"]) == (128, [1, 2, 4, 8], 128)
    assert report["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    # The plain network for each N, ours twice where one patch is all there is, and else four times.
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
        loading = report["loading"]
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
    assert measure.loading_speed(batches(), repeats=2, batches_a_repeat=2) == [10 / (2 + 3), 10 / (4 + 5)]


def bench(make_config, compiled=False):
    config = make_config()
    return Bench(configs={2: config}, images=2, device=torch.device("cpu"), compiled=compiled)


def test_settings_take_turns(make_config, monkeypatch):
    order = []
    monkeypatch.setitem(measure.STEPS, "training", lambda model, setting, images: order.append(setting.patches))
    chosen = [Setting("lean", 2, patches, "float32") for patches in (1, 3, 8)]
    taken = bench(make_config).seconds("training", chosen, repeats=3)
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
    chosen = [Setting("plain", 2, 8, "float32"), Setting("lean", 2, 3, "float32")]
    for kind in ("sampling", "training"):
        sizes.clear()
        taken = bench(make_config, compiled=True).seconds(kind, chosen, repeats=2)
        passes, uncounted = 3, 3
        assert sizes == [3] * passes * (uncounted + 2)
        assert [len(seconds) for seconds in taken.values()] == [2, 2]


def cramp(monkeypatch, network, room):
    """Let a network have room for `room` patches."""
    kind = {"plain": PlainUNet, "lean": UNet}[network]
    usual = kind.forward

    def forward(self, patches, *others):
        if len(patches) > room:
            raise torch.OutOfMemoryError
        return usual(self, patches, *others)

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("kind", ["sampling", "training"])
def test_running_out_of_memory_is_told(make_config, monkeypatch, kind):
    """Sampling would go on with smaller passes, which is not what was to be measured."""
    cramp(monkeypatch, "lean", room=4)
    warned = pytest.warns(RuntimeWarning, match="going on with 4") if kind == "sampling" else contextlib.nullcontext()
    with warned:
        assert bench(make_config).memory(kind, Setting("lean", 2, 8, "float32")) is None
    eight, three = Setting("lean", 2, 8, "float32"), Setting("lean", 2, 3, "float32")
    warned = pytest.warns(RuntimeWarning, match="going on with 4") if kind == "sampling" else contextlib.nullcontext()
    with warned:
        taken = bench(make_config).seconds(kind, [eight, three], repeats=2)
    assert {setting: len(seconds) for setting, seconds in taken.items()} == {three: 2}


@pytest.mark.filterwarnings("ignore:the device ran out of memory")
@pytest.mark.parametrize(("network", "room"), [("plain", 0), ("plain", 1), ("plain", 4), ("lean", 4)])
def test_what_does_not_fit_is_left_out_of_the_times(monkeypatch, tmp_path, network, room):
    """A baseline that does not fit is why people come: the rest is measured all the same."""
    cramp(monkeypatch, network, room)
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
    assert relative.count("") == (4 if room < 2 else 3 if network == "plain" else 1)
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
        (["--patch-dividers", "3"], "model.patch_divider is 3; it must divide image_size 128"),
        (["--config", str(tmp_path / "missing.json")], "missing.json"),
        (["--dim", "8"], r"--out-dir '.*file' cannot be used"),
    ):
        with pytest.raises(InputError, match=words):
            benchmark.main(["--out-dir", str(tmp_path / "file"), *flags])
