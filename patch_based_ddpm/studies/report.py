"""The results of a study: the content of study.json, and Markdown tables that are made from it alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from patch_based_ddpm.config import Config
from patch_based_ddpm.evaluation.metrics import DEFINITIONS
from patch_based_ddpm.planning import planner
from patch_based_ddpm.planning.live_memory import MIB
from patch_based_ddpm.samplers import SamplerConfig
from patch_based_ddpm.studies.config import PAPER, StudyConfig, StudySection
from patch_based_ddpm.studies.controls import DEFECTS, control_name

SWD = "SWD x 10^3, mean"
QUALITY = {  # column: name of the figure on the grid of N x N patches, decimals
    "SWD x 10^3": (SWD, 1),
    "seam ratio": ("seam ratio, {N} x {N}", 3),
    "worst phase": ("seam ratio, {N} x {N}, worst phase", 3),
    "disagreement": ("disagreement", 4),
    "MS-SSIM": ("MS-SSIM", 3),
}
TOLERANCE = 1.05  # an SWD of up to this many times the baseline's counts as equally good
MEMORY = [(kind, part) for kind in ("training", "sampling") for part in ("activations", "total")]
MEMORY_DEFINITION = (
    "bytes of live tensors at their peak, one image and one patch a pass, planned as by patch_based_ddpm.memory"
)
Measured = list[tuple[int, dict[str, Any]]]  # N and the figures on its grid, of every run
DIFFERENCES = ("patch_divider", *PAPER)  # between models
NAMES = (
    "NK: K x K patches as in the paper; NK+S: continued by S steps; haloP: with a halo of P pixels; no-position, "
    "no-content, neither: without position conditioning, without global content conditioning, without both."
)


def build(config: StudyConfig, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the results of all tasks, by name, into the content of study.json."""
    models, samplers = [], []
    work = {name: _work(trained, config.study) for name, trained in config.models().items()}
    for name, trained in config.models().items():
        differences = {key: getattr(trained.model, key) for key in DIFFERENCES}
        runs = [{"seed": run.config.trainer.seed, **results[run.name]} for run in config.runs(name)]
        relative = {"work": work[name] / work[config.plain], "steps": trained.trainer.train_num_steps}
        models.append({"name": name, **differences, **relative, "runs": runs})
    reference = config.runs(config.reference)
    for sampler, steps in config.study.sampler_steps:
        runs = [{"seed": run.config.trainer.seed, **results[run.sampled_by(sampler, steps)]} for run in reference]
        samplers.append({"sampler": sampler, "steps": steps, "runs": runs})
    controls = [{"name": defect, **results[control_name(defect)]} for defect in DEFECTS]
    return {
        "config": config.to_dict(),
        "real": results["real"],
        "models": models,
        "controls": controls,
        "samplers": {"model": config.reference, "rows": samplers},
        "definitions": {**DEFINITIONS, "memory": MEMORY_DEFINITION},
    }


def _work(trained: Config, study: StudySection) -> float:
    """Floating-point operations of drawing an image."""
    grids = trained.model.grids
    sampler = SamplerConfig(name=study.sampler, steps=study.steps).resolve(trained.diffusion.timesteps, grids)
    predictions = sum(len(sampler.grids(step, grids)) for step in range(sampler.steps))
    return predictions * planner.prediction_flops(trained.model)


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
        f"patch a pass; work: floating-point operations of drawing an image, over those of N{model['patch_divider']}:",
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
        if (best := fastest(report)) is not None:
            lines += [
                "",
                f"The fewest steps with an SWD of at most {TOLERANCE} times that of ddpm in "
                f"{_baseline(report)['steps']:,} (both include the floor of {floor(report):.1f}): {best['sampler']} in "
                f"{best['steps']:,}.",
            ]
        lines += _picture("samplers.png", (f"{row['sampler']}, {row['steps']} steps" for row in rows), study)
    lines += ["", "Which figure sees what: real faces with a defect.", "", *_controls(report)]
    lines += _picture("controls.png", (row["name"] for row in report["controls"]), study)
    return "\n".join([*lines, ""])


def _picture(name: str, rows: Iterable[str], study: dict[str, Any]) -> list[str]:
    named = f"Rows from the top: {'; '.join(['real faces', *rows])}; seed {study['seeds'][0]}."
    return ["", f"![Samples]({name})", "", named]


def fastest(report: dict[str, Any]) -> dict[str, Any] | None:
    """The row of samplers with the fewest steps that is as close to real faces as the baseline; None without one.

    As close means: each run's SWD over that of the same run with the baseline is at most `TOLERANCE` on average.
    """
    if _baseline(report) is None:
        return None
    ratios = [(row["steps"], statistics.mean(_ratios(report, row)), row) for row in report["samplers"]["rows"]]
    return min((one for one in ratios if one[1] <= TOLERANCE), key=lambda one: one[:2])[2]


def _baseline(report: dict[str, Any]) -> dict[str, Any] | None:
    """The row of ddpm with the most steps."""
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


def _models(report: dict[str, Any]) -> list[str]:
    columns = ["model", *(f"{kind} {'activations' if part == 'activations' else 'in all'}" for kind, part in MEMORY)]
    columns.append("work")
    rows = []
    for row in report["models"]:
        memory = [_cell([run["memory"][kind][part] / MIB for run in row["runs"]], 2) for kind, part in MEMORY]
        work = f"{row['work']:.2f}"
        rows.append(([row["name"], *memory, work], [(row["patch_divider"], run["figures"]) for run in row["runs"]]))
    return _table(columns, rows, [(int(N), figures) for N, figures in report["real"]["figures"].items()])


def _samplers(report: dict[str, Any]) -> list[str]:
    N, baseline = report["config"]["model"]["patch_divider"], _baseline(report)
    columns = ["sampler", "steps", *([f"SWD over that of ddpm in {baseline['steps']:,}"] if baseline else [])]
    rows = []
    for row in report["samplers"]["rows"]:
        ratios = [_cell(_ratios(report, row), 2)] if baseline else []
        rows.append(([row["sampler"], str(row["steps"]), *ratios], [(N, run["figures"]) for run in row["runs"]]))
    return _table(columns, rows, [(N, report["real"]["figures"][str(N)])])


def _controls(report: dict[str, Any]) -> list[str]:
    N = report["config"]["model"]["patch_divider"]
    rows = [([row["name"]], [(N, row["figures"])]) for row in report["controls"]]
    return _table(["real faces"], rows, [(N, report["real"]["figures"][str(N)])])


def _table(columns: list[str], rows: list[tuple[list[str], Measured]], real: Measured) -> list[str]:
    """A table of the given columns and one for each figure; its last row is that of real faces."""
    rows = [*rows, (["real against real", *[""] * (len(columns) - 1)], real)]
    cells = [[*columns, *QUALITY], *([*given, *_quality(measured)] for given, measured in rows)]
    head, *lines = (f"| {' | '.join(line)} |" for line in cells)
    return [head, "|" + "---|" * len(cells[0]), *lines]


def _quality(measured: Measured) -> Iterator[str]:
    """A cell for each figure."""
    for name, decimals in QUALITY.values():
        named = ((name.format(N=N), figures) for N, figures in measured)
        values = [figures[name]["samples"] for name, figures in named if name in figures]
        finite = [value for value in values if value is not None]
        yield _cell(finite, decimals) + (f" [{len(finite)} of {len(values)}]" if len(finite) < len(values) else "")


def _cell(values: Sequence[float], decimals: int) -> str:
    """The mean, and the range of values that differ; empty without values."""
    if not values:
        return ""
    middle, least, most = (f"{value:,.{decimals}f}" for value in (statistics.mean(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"
