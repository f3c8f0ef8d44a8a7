"""A study's figures as text: tables in Markdown, made of what study.json holds and of nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from patch_based_ddpm.planning.live_memory import MIB

SWD, SEAM, SHIFTED = "SWD x 10^3, mean", "seam ratio, {0} x {0}", "seam ratio, {0} x {0}, shifted grid"
QUALITY = {  # column: name of the figure, decimals
    "SWD x 10^3": (SWD, 1),
    "seam ratio": (SEAM, 3),
    "shifted grid": (SHIFTED, 3),
    "disagreement": ("disagreement", 4),
    "MS-SSIM": ("MS-SSIM", 3),
}
TOLERANCE = 1.05  # times the yardstick's SWD that count as equal to it
MEMORY = [(kind, part) for kind in ("training", "sampling") for part in ("activations", "total")]
NAMES = (
    "NK: K x K patches as in the paper; haloP: with a halo of P pixels; no-position, no-content, neither: without "
    "position conditioning, without global content conditioning, without both."
)


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
        f"Models, drawn by {study['sampler']} in {study['steps']} steps; planned memory in MiB, one image, one "
        "patch a pass:",
        "",
        *_models(report),
        "",
        NAMES,
        "",
        "Real against real: as many other real faces, the floor that no model gets below but by chance; their seam "
        "ratios are those on the grids of all N.",
    ]
    lines += _picture("models.png", (row["name"] for row in report["models"]), study)
    rows = report["samplers"]["rows"]
    if rows:
        lines += ["", f"Samplers, all with the models of {report['samplers']['model']}:", "", *_samplers(report)]
        lines += _recommendation(report)
        lines += _picture("samplers.png", (f"{row['sampler']}, {row['steps']} steps" for row in rows), study)
    return "\n".join([*lines, ""])


def _picture(name: str, rows: Iterable[str], study: dict[str, Any]) -> list[str]:
    named = f"Rows from the top: {'; '.join(['real faces', *rows])}; seed {study['seeds'][0]}."
    return ["", f"![Samples]({name})", "", named]


def within(report: dict[str, Any]) -> dict[str, Any] | None:
    """The sampler with the fewest steps, and so the fastest, that is nearly as close to real faces as the yardstick.

    The yardstick is ddpm with the most steps that are compared. A run's SWD is divided by what the same run has with
    the yardstick, and the mean over runs must be at most `TOLERANCE`.

    Args:
        report: the content of study.json.

    Returns:
        Its row; None where ddpm is not compared.
    """
    if _yardstick(report) is None:
        return None
    ratios = [(row, statistics.mean(_ratios(report, row))) for row in report["samplers"]["rows"]]
    close = [(row["steps"], ratio, row) for row, ratio in ratios if ratio <= TOLERANCE]
    return min(close, key=lambda one: one[:2])[2]


def _yardstick(report: dict[str, Any]) -> dict[str, Any] | None:
    slow = [row for row in report["samplers"]["rows"] if row["sampler"] == "ddpm"]
    return max(slow, key=lambda row: row["steps"], default=None)


def _ratios(report: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """A row's SWD over the yardstick's, run by run; nothing where there is no yardstick."""
    yardstick = _yardstick(report)
    if yardstick is None:
        return []
    pairs = zip(row["runs"], yardstick["runs"], strict=True)
    return [run["figures"][SWD]["samples"] / other["figures"][SWD]["samples"] for run, other in pairs]


def _recommendation(report: dict[str, Any]) -> list[str]:
    fastest, yardstick = within(report), _yardstick(report)
    if fastest is None:
        return []
    return [
        "",
        f"The fewest steps with an SWD of at most {TOLERANCE} times that of ddpm in {yardstick['steps']:,} (both "
        f"include the floor of {floor(report):.1f}): {fastest['sampler']} in {fastest['steps']:,}.",
    ]


def floor(report: dict[str, Any]) -> float:
    """The SWD of real faces from as many others, x 10^3; it has no grid, so it is the same for every N."""
    return next(iter(report["real"]["figures"].values()))[SWD]["samples"]


def _models(report: dict[str, Any]) -> Iterator[str]:
    memory = [f"{kind} {'activations' if part == 'activations' else 'in all'}" for kind, part in MEMORY]
    yield from _head("model", *memory, *QUALITY)
    for row in report["models"]:
        runs, N = row["runs"], row["patch_divider"]
        held = [_cell([run["memory"][kind][part] / MIB for run in runs], 2) for kind, part in MEMORY]
        yield _line(row["name"], *held, *_quality([(N, run["figures"]) for run in runs]))
    real = [(int(N), figures) for N, figures in report["real"]["figures"].items()]
    yield _line("real against real", *[""] * len(MEMORY), *_quality(real))


def _samplers(report: dict[str, Any]) -> Iterator[str]:
    N = report["config"]["model"]["patch_divider"]
    yardstick = _yardstick(report)
    relative = [f"SWD over that of ddpm in {yardstick['steps']:,}"] if yardstick else []
    yield from _head("sampler", "steps", *relative, *QUALITY)
    for row in report["samplers"]["rows"]:
        ratios = [_cell(_ratios(report, row), 2)] if yardstick else []
        yield _line(row["sampler"], str(row["steps"]), *ratios, *_quality([(N, run["figures"]) for run in row["runs"]]))
    blanks = [""] * (1 + len(relative))
    yield _line("real against real", *blanks, *_quality([(N, report["real"]["figures"][str(N)])]))


def _quality(measured: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """A cell for each figure, from pairs of N and what was measured on its grid."""
    for name, decimals in QUALITY.values():
        values = [figures[name.format(N)]["samples"] for N, figures in measured if name.format(N) in figures]
        told = [value for value in values if value is not None]
        yield _cell(told, decimals) + (f" [{len(told)} of {len(values)}]" if len(told) < len(values) else "")


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
