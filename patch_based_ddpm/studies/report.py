"""The results of a study as JSON data, the content of study.json, and as Markdown tables made from these data alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from patch_based_ddpm.evaluation.metrics import DEFINITIONS
from patch_based_ddpm.planning.live_memory import MIB
from patch_based_ddpm.studies.config import Model, StudyConfig

SWD, SEAM, SHIFTED = "SWD x 10^3, mean", "seam ratio, {0} x {0}", "seam ratio, {0} x {0}, shifted grid"
QUALITY = {  # column: name of the figure, decimals
    "SWD x 10^3": (SWD, 1),
    "seam ratio": (SEAM, 3),
    "shifted grid": (SHIFTED, 3),
    "disagreement": ("disagreement", 4),
    "MS-SSIM": ("MS-SSIM", 3),
}
TOLERANCE = 1.05  # an SWD of so many times the baseline's is as good as it
MEMORY = [(kind, part) for kind in ("training", "sampling") for part in ("activations", "total")]
MEMORY_DEFINITION = (
    "bytes of live tensors at their peak, one image and one patch a pass, planned as by patch_based_ddpm.memory"
)
DIFFERENCES = ("patch_divider", "halo", "position_conditioning", "global_content_conditioning")  # between models
NAMES = (
    "NK: K x K patches as in the paper; haloP: with a halo of P pixels; no-position, no-content, neither: without "
    "position conditioning, without global content conditioning, without both."
)


def build(config: StudyConfig, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the results of all tasks, by name, into the content of study.json."""

    def runs(model: Model, *sampled_by: Any) -> list[dict[str, Any]]:
        named = [(run, run.sampled_by(*sampled_by) if sampled_by else run.name) for run in config.runs(model)]
        return [{"seed": run.config.trainer.seed, **results[name]} for run, name in named]

    models = [
        {"name": model.name, **{key: getattr(model.config.model, key) for key in DIFFERENCES}, "runs": runs(model)}
        for model in config.models()
    ]
    reference = config.reference()
    samplers = [
        {"sampler": sampler, "steps": steps, "runs": runs(reference, sampler, steps)}
        for sampler, steps in config.study.sampler_steps
    ]
    return {
        "config": config.to_dict(),
        "real": results["real"],
        "models": models,
        "samplers": {"model": reference.name, "rows": samplers},
        "definitions": {**DEFINITIONS, "memory": MEMORY_DEFINITION},
    }


def markdown(report: dict[str, Any]) -> str:
    """The text of tables.md from the content of study.json."""
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


def fastest(report: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the sampler with the fewest steps that is nearly as close to real faces as the baseline.

    The baseline is ddpm with the most steps compared; None if there is none. Each run's SWD is divided by the same
    run's with the baseline, and the mean over runs must be at most `TOLERANCE`.
    """
    if _baseline(report) is None:
        return None
    ratios = [(row, statistics.mean(_ratios(report, row))) for row in report["samplers"]["rows"]]
    close = [(row["steps"], ratio, row) for row, ratio in ratios if ratio <= TOLERANCE]
    return min(close, key=lambda one: one[:2])[2]


def _baseline(report: dict[str, Any]) -> dict[str, Any] | None:
    rows = [row for row in report["samplers"]["rows"] if row["sampler"] == "ddpm"]
    return max(rows, key=lambda row: row["steps"], default=None)


def distances(row: dict[str, Any]) -> list[float]:
    """The SWD of each run of a model or of a sampler."""
    return [run["figures"][SWD]["samples"] for run in row["runs"]]


def _ratios(report: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """A row's SWD over the baseline's, run by run."""
    return [own / other for own, other in zip(distances(row), distances(_baseline(report)), strict=True)]


def floor(report: dict[str, Any]) -> float:
    """The SWD of real faces from as many others, x 10^3; it has no grid, so it is the same for every N."""
    return next(iter(report["real"]["figures"].values()))[SWD]["samples"]


def _recommendation(report: dict[str, Any]) -> list[str]:
    row, baseline = fastest(report), _baseline(report)
    if row is None:
        return []
    return [
        "",
        f"The fewest steps with an SWD of at most {TOLERANCE} times that of ddpm in {baseline['steps']:,} (both "
        f"include the floor of {floor(report):.1f}): {row['sampler']} in {row['steps']:,}.",
    ]


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
    N, baseline = report["config"]["model"]["patch_divider"], _baseline(report)
    relative = [f"SWD over that of ddpm in {baseline['steps']:,}"] if baseline else []
    yield from _head("sampler", "steps", *relative, *QUALITY)
    for row in report["samplers"]["rows"]:
        ratios = [_cell(_ratios(report, row), 2)] if baseline else []
        yield _line(row["sampler"], str(row["steps"]), *ratios, *_quality([(N, run["figures"]) for run in row["runs"]]))
    blanks = [""] * (1 + len(relative))
    yield _line("real against real", *blanks, *_quality([(N, report["real"]["figures"][str(N)])]))


def _quality(measured: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """A cell for each figure, from pairs of N and the figures on its grid."""
    for name, decimals in QUALITY.values():
        values = [figures[name.format(N)]["samples"] for N, figures in measured if name.format(N) in figures]
        finite = [value for value in values if value is not None]
        yield _cell(finite, decimals) + (f" [{len(finite)} of {len(values)}]" if len(finite) < len(values) else "")


def _cell(values: Sequence[float], decimals: int) -> str:
    """The mean, and the range of values that differ; empty without values."""
    if not values:
        return ""
    middle, least, most = (f"{value:,.{decimals}f}" for value in (statistics.mean(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"


def _head(*columns: str) -> Iterable[str]:
    return _line(*columns), "|" + "---|" * len(columns)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
