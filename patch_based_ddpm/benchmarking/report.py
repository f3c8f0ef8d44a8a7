"""The benchmark's figures as text: tables in Markdown, made of what benchmark.json holds and of nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from patch_based_ddpm.planning.live_memory import KINDS, MIB

STEP_NAMES = {"sampling": "denoising pass", "training": "training step"}
BASELINES = ("whole image", "all patches")
OUT_OF_MEMORY = "out of memory"

DEFINITIONS = {
    "memory": "the most bytes of live tensors in one step, each kind for itself and all together; see live_memory.py",
    "device": "on a GPU the peak of PyTorch's allocator in that step, on a CPU the peak of the whole process so far, "
    "which never falls",
    "sampling": "one denoising pass over all patches of the images (p_mean_variance), in inference mode; bf16: weights "
    "and features",
    "training": "one optimizer step: the gradient of all patches of the images, then fused Adam; bf16: autocast over "
    "float32 weights",
    "seconds": "of one step; the settings in turn, round after round, after rounds that are not counted",
    "images/s": "images over the median of the seconds; of denoising passes it is images by one step each",
    "time / whole image": "seconds over those of the plain network on whole images (N = 1, float32) in the same round: "
    "median (least-most) of the rounds",
    "time / all patches": "the same over the plain network on all patches of the same N at once, in float32",
    "plain": "the network as published, see plain.py",
    "lean": "ours, see unet.py and layers.py",
    "loading": "images per second of the input pipeline alone, nothing else running",
}


def markdown(report: dict[str, Any]) -> str:
    """All tables of a report; those of what was not measured are left out.

    Args:
        report: the content of benchmark.json.
    """
    machine, model = report["machine"], report["config"]["model"]
    where = f"{machine['gpu']}, " if report["device"] == "cuda" else ""
    lines = [
        f"{where}{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}; dim {model['dim']}, dim_mults {model['dim_mults']}, image_size "
        f"{model['image_size']}, {report['batch_size']} image(s){', compiled' if report['compiled'] else ''}."
    ]
    for kind in STEP_NAMES:
        lines += ["", *_memory_table(report, kind)]
    for kind in STEP_NAMES if report["repeats"] else ():
        lines += ["", *_speed_table(report, kind)]
    if report["loading"]:
        loading = report["loading"]
        middle, least, most = _spread(loading["images_per_second"])
        number = loading["num_workers"]
        workers = "a worker for each core" if number is None else f"{number} worker(s)"
        lines += [
            "",
            f"Input pipeline alone, {loading['data']}{', cached' if loading['cached'] else ''}, {workers}: "
            f"{middle:,.1f} images/s ({least:,.1f}-{most:,.1f}).",
        ]
    return "\n".join(lines)


def _memory_table(report: dict[str, Any], kind: str) -> Iterable[str]:
    device = "allocator" if report["device"] == "cuda" else "process, never falls"
    columns = ("activations", *(name for name in KINDS if name != "activations"), "total")
    yield f"Memory of a {STEP_NAMES[kind]}, MiB:"
    yield ""
    yield from _head(*columns, device)
    for row in report["settings"]:
        held = row["memory"][kind]
        if held is None:
            cells = [OUT_OF_MEMORY, *[""] * len(columns)]
        else:
            cells = [f"{held[name] / MIB:,.1f}" for name in (*columns, "device")]
        yield _line(*_names(report, row), *cells)


def _speed_table(report: dict[str, Any], kind: str) -> Iterable[str]:
    yield f"Time of a {STEP_NAMES[kind]}:"
    yield ""
    yield from _head("seconds", "images/s", *(f"time / {name}" for name in BASELINES))
    for row in report["settings"]:
        if row["seconds"][kind] is None:
            yield _line(*_names(report, row), OUT_OF_MEMORY, "", *[""] * len(BASELINES))
            continue
        seconds = statistics.median(row["seconds"][kind])
        relative = [relative_time(report, row, kind, name) for name in BASELINES]
        figures = ["{:.3f} ({:.3f}-{:.3f})".format(*times) if times else "" for times in relative]
        yield _line(*_names(report, row), f"{seconds:.4g}", f"{report['batch_size'] / seconds:.4g}", *figures)


def _head(*columns: str) -> Iterable[str]:
    names = ("network", "N", "patches a pass", "dtype", *columns)
    yield _line(*names)
    yield "|" + "---|" * len(names)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _names(report: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    everything = row["patch_divider"] ** 2 * report["batch_size"]
    patches = f"all {everything}" if row["patches"] == everything else str(row["patches"])
    return row["network"], str(row["patch_divider"]), patches, row["dtype"]


def baseline(report: dict[str, Any], row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row that a row is compared with, by one of `BASELINES`."""
    divider = 1 if name == "whole image" else row["patch_divider"]
    (found,) = (r for r in report["settings"] if r["network"] == "plain" and r["patch_divider"] == divider)
    return found


def relative_time(
    report: dict[str, Any], row: dict[str, Any], kind: str, name: str
) -> tuple[float, float, float] | None:
    """Median, least and most of a row's time over its baseline's, each pair from the same round.

    None where one of the two ran out of memory.
    """
    own, theirs = row["seconds"][kind], baseline(report, row, name)["seconds"][kind]
    if own is None or theirs is None:
        return None
    return _spread([one / other for one, other in zip(own, theirs, strict=True)])


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
