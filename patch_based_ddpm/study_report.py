"""A study's figures as text: tables in Markdown, made of what study.json holds and of nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from patch_based_ddpm.live_memory import MIB

SWD, SEAM, SHIFTED = "SWD x 10^3, mean", "seam ratio, {0} x {0}", "seam ratio, {0} x {0}, shifted grid"
QUALITY = {  # column: name of the figure, decimals
    "SWD x 10^3": (SWD, 1),
    "seam ratio": (SEAM, 3),
    "shifted grid": (SHIFTED, 3),
    "disagreement": ("disagreement", 4),
    "MS-SSIM": ("MS-SSIM", 3),
}
MEMORY = [(kind, part) for kind in ("training", "sampling") for part in ("activations", "total")]
YES = {True: "yes", False: "no"}


def markdown(report: dict[str, Any]) -> str:
    """All tables of a report.

    Args:
        report: the content of study.json.
    """
    config = report["config"]
    model, trainer, study = config["model"], config["trainer"], config["study"]
    images = trainer["train_batch_size"] * trainer["gradient_accumulate_every"] * trainer["train_num_steps"]
    lines = [
        f"Drawn faces, image_size {model['image_size']}, dim {model['dim']}, dim_mults {model['dim_mults']}; "
        f"{trainer['train_num_steps']:,} steps, {images:,} images. {study['samples']:,} samples of each model beside "
        f"{study['real_images']:,} real faces that no run has seen. Over {len(study['seeds'])} seed(s) of training"
        f"{', mean (least-most)' if len(study['seeds']) > 1 else ''}.",
        "",
        f"Models, drawn by {study['sampler']} in {study['steps']} steps; memory in MiB, one image, one patch a pass:",
        "",
        *_models(report),
        "",
        "Real against real: as many other real faces, the floor that no model gets below but by chance; their seam "
        "ratios are those on the grids of all N.",
    ]
    if report["samplers"]["rows"]:
        lines += ["", f"Samplers, all with the model of {report['samplers']['run']}:", "", *_samplers(report)]
    names = ["real faces", *(row["name"] for row in report["models"])]
    lines += ["", "![Samples](grids.png)", "", f"Rows from the top: {'; '.join(names)}, seed {study['seeds'][0]}.", ""]
    return "\n".join(lines)


def _models(report: dict[str, Any]) -> Iterator[str]:
    memory = [f"{kind} {'activations' if part == 'activations' else 'in all'}" for kind, part in MEMORY]
    yield from _head("model", "N", "position", "global content", *memory, *QUALITY)
    for row in report["models"]:
        runs, N = row["runs"], row["patch_divider"]
        conditioning = (YES[row["position_conditioning"]], YES[row["global_content_conditioning"]])
        held = [_cell([run["memory"][kind][part] / MIB for run in runs], 1) for kind, part in MEMORY]
        yield _line(row["name"], str(N), *conditioning, *held, *_quality([(N, run["figures"]) for run in runs]))
    real = [(int(N), figures) for N, figures in report["real"]["figures"].items()]
    yield _line("real against real", *[""] * 3, *[""] * len(MEMORY), *_quality(real))


def _samplers(report: dict[str, Any]) -> Iterator[str]:
    N = report["config"]["model"]["patch_divider"]
    yield from _head("sampler", "steps", *QUALITY)
    for row in report["samplers"]["rows"]:
        yield _line(row["sampler"], str(row["steps"]), *_quality([(N, row["figures"])]))
    yield _line("real against real", "", *_quality([(N, report["real"]["figures"][str(N)])]))


def _quality(measured: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """A cell for each figure, from pairs of N and what was measured on its grid."""
    for name, decimals in QUALITY.values():
        values = [figures.get(name.format(N), {}).get("samples") for N, figures in measured]
        yield _cell([value for value in values if value is not None], decimals)


def _cell(values: Sequence[float], decimals: int) -> str:
    """The mean, and the range of values that differ; nothing where there is none."""
    if not values:
        return ""
    middle, least, most = (f"{value:,.{decimals}f}" for value in (statistics.mean(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"


def _head(*columns: str) -> Iterable[str]:
    return _line(*columns), "|" + "---|" * len(columns)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
