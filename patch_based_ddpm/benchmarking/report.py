"""The benchmark's figures as tables in Markdown, made from benchmark.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from patch_based_ddpm.planning.live_memory import KINDS, MIB

STEP_NAMES = {"sampling": "sampling step", "training": "training step"}
BASELINES = ("whole image", "all patches")
OUT_OF_MEMORY = "out of memory"

DEFINITIONS = {
    "memory": "peak bytes of live tensors in one step, of each kind and in total, see planning/live_memory.py",
    "device": "on a GPU the peak of PyTorch's allocator in that step, on a CPU the peak of the whole process so far, "
    "which never falls",
    "sampling": "one step of ancestral sampling (samplers.ddpm) in inference mode: all patches of the images; bf16: "
    "weights and features",
    "training": "one optimizer step: the gradient of all patches of the images, then fused Adam; bf16: autocast over "
    "float32 weights",
    "seconds": "of one step; settings are interleaved, round after round, so that machine load affects all alike; "
    "warm-up rounds do not count",
    "images/s": "images over the median of the seconds; in sampling, images that advance by one step",
    "time / whole image": "seconds over those of the baseline on whole images (N = 1, float32) in the same round: "
    "median (least-most) of the rounds",
    "time / all patches": "the same over the baseline on all patches of the same N at once, in float32",
    "baseline": "the network as published, see benchmarking/baseline_unet.py",
    "ours": "the same network with our optimisations, see model/unet.py and model/layers.py",
    "checkpoint_loading": "peak host memory of load_diffusion, in a new process, above the memory that imports take; "
    "the file holds weights, averaged weights and Adam's moments, as those of training do",
    "data_loading": "images per second of the input pipeline alone, with nothing else running",
}


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report, the content of benchmark.json, without figures that were not measured."""
    machine, model = report["machine"], report["config"]["model"]
    gpu = f"{machine['gpu']}, " if report["device"] == "cuda" else ""
    lines = [
        f"{gpu}{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}; dim {model['dim']}, dim_mults {model['dim_mults']}, image_size "
        f"{model['image_size']}, {report['batch_size']} image(s){', compiled' if report['compiled'] else ''}."
    ]
    for table in (_memory_table, *([_time_table] if report["repeats"] else [])):
        for kind in STEP_NAMES:
            lines += ["", *table(report, kind)]
    size, peak = (report["checkpoint_loading"][name] / MIB for name in ("file", "peak"))
    lines += ["", f"Loading a checkpoint to sample: file {size:,.1f} MiB, peak host memory {peak:,.1f} MiB."]
    if loading := report["data_loading"]:
        median, least, most = _spread(loading["images_per_second"])
        number = loading["num_workers"]
        workers = "a worker for each core" if number is None else f"{number} worker(s)"
        lines += [
            "",
            f"Input pipeline alone, {loading['data']}{', cached' if loading['cached'] else ''}, {workers}: "
            f"{median:,.1f} images/s ({least:,.1f}-{most:,.1f}).",
        ]
    return "\n".join(lines)


def _memory_table(report: dict[str, Any], kind: str) -> Iterable[str]:
    device = "allocator" if report["device"] == "cuda" else "process, never falls"
    columns = ("activations", *(name for name in KINDS if name != "activations"), "total")
    peaks = [row["memory"][kind] for row in report["settings"]]
    cells = [peak and [f"{peak[name] / MIB:,.1f}" for name in (*columns, "device")] for peak in peaks]
    return _table(report, f"Memory of a {STEP_NAMES[kind]}, MiB:", (*columns, device), cells)


def _time_table(report: dict[str, Any], kind: str) -> Iterable[str]:
    def cells(row: dict[str, Any]) -> list[str] | None:
        if row["seconds"][kind] is None:
            return None
        seconds = statistics.median(row["seconds"][kind])
        ratios = [relative_time(report, row, kind, name) for name in BASELINES]
        ratios = ["{:.3f} ({:.3f}-{:.3f})".format(*ratio) if ratio else "" for ratio in ratios]
        return [f"{seconds:.4g}", f"{report['batch_size'] / seconds:.4g}", *ratios]

    columns = ("seconds", "images/s", *(f"time / {name}" for name in BASELINES))
    return _table(report, f"Time of a {STEP_NAMES[kind]}:", columns, map(cells, report["settings"]))


def _table(
    report: dict[str, Any], title: str, columns: Sequence[str], cells: Iterable[list[str] | None]
) -> Iterable[str]:
    """Lines of a table of all settings; the cells of a setting that ran out of memory are None."""
    header = ("network", "N", "patches per pass", "dtype", *columns)
    yield from (title, "", _line(header), "|" + "---|" * len(header))
    for row, figures in zip(report["settings"], cells):
        total = row["patch_divider"] ** 2 * report["batch_size"]
        patches = f"all {total}" if row["patches"] == total else str(row["patches"])
        figures = figures or [OUT_OF_MEMORY, *[""] * (len(columns) - 1)]
        yield _line((row["network"], str(row["patch_divider"]), patches, row["dtype"], *figures))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def baseline(report: dict[str, Any], row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row that a row is compared with, by one of `BASELINES`."""
    divider = 1 if name == "whole image" else row["patch_divider"]
    (found,) = (r for r in report["settings"] if r["network"] == "baseline" and r["patch_divider"] == divider)
    return found


def relative_time(
    report: dict[str, Any], row: dict[str, Any], kind: str, name: str
) -> tuple[float, float, float] | None:
    """Median, least and most of a row's time over its baseline's in the same round; None if one ran out of memory."""
    ours, theirs = row["seconds"][kind], baseline(report, row, name)["seconds"][kind]
    if ours is None or theirs is None:
        return None
    return _spread([one / other for one, other in zip(ours, theirs, strict=True)])


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
