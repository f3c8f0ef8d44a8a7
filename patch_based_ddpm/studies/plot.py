"""A study as a picture: distance from real faces over N and over sampling steps, and memory over N."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_based_ddpm.planning.live_memory import MIB
from patch_based_ddpm.studies.config import PAPER
from patch_based_ddpm.studies.report import distances, floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (5.0, 5.0)  # of each panel
MARKERS = ("x", "s", "^", "D", "v", "P", "*")  # of models that differ from the paper's


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the content of study.json into a PNG file; the panel of samplers is left out where none are compared."""
    from matplotlib.figure import Figure

    models, samplers = report["models"], report["samplers"]
    dividers = (sorted({row["patch_divider"] for row in models}), "N, patches a side")
    steps = (sorted({row["steps"] for row in samplers["rows"]}), f"sampling steps of {samplers['model']}")
    panels = [(_draw_models, *dividers), (_draw_memory, *dividers), *([(_draw_samplers, *steps)] if steps[0] else [])]
    figure = Figure(figsize=(INCHES[0] * len(panels), INCHES[1]), layout="constrained")
    for axes, (draw, places, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw(axes, report)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def _draw_models(axes: Axes, report: dict[str, Any]) -> None:
    rows = _as_in_the_paper(report)
    others = (row for row in report["models"] if row not in rows)
    curves = [(row["name"], marker, [row]) for marker, row in zip(itertools.cycle(MARKERS), others)]
    _draw_distances(axes, report, [("as in the paper", "ko-", rows), *curves], "patch_divider")


def _draw_memory(axes: Axes, report: dict[str, Any]) -> None:
    rows = _as_in_the_paper(report)
    dividers = [row["patch_divider"] for row in rows]
    for kind, colour in (("sampling", "tab:blue"), ("training", "tab:red")):
        for part, style in (("activations", "o-"), ("total", "s--")):
            heights = [row["runs"][0]["memory"][kind][part] / MIB for row in rows]
            label = f"{kind}, {'activations' if part == 'activations' else 'in all'}"
            axes.plot(dividers, heights, style, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("MiB at their peak, one image, one patch a pass")


def _draw_samplers(axes: Axes, report: dict[str, Any]) -> None:
    rows = sorted(report["samplers"]["rows"], key=lambda row: row["steps"])
    samplers = dict.fromkeys(row["sampler"] for row in report["samplers"]["rows"])
    curves = [(sampler, "o-", [row for row in rows if row["sampler"] == sampler]) for sampler in samplers]
    _draw_distances(axes, report, curves, "steps")


def _draw_distances(axes: Axes, report: dict[str, Any], curves: list[tuple[str, str, list]], place: str) -> None:
    """Draw curves, (label, style, rows) each, over the rows' key `place`: mean and range of each row's runs."""
    for label, style, rows in curves:
        places, values = [row[place] for row in rows], [distances(row) for row in rows]
        axes.plot(places, [*map(statistics.mean, values)], style, label=label)
        axes.vlines(places, [*map(min, values)], [*map(max, values)], color="black", alpha=0.4)
    axes.axhline(floor(report), color="black", linestyle="--", label="real against real")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("SWD x 10^3")


def _as_in_the_paper(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that differ in N alone, by N."""
    steps = report["config"]["trainer"]["train_num_steps"]
    rows = (row for row in report["models"] if row["steps"] == steps)
    rows = (row for row in rows if all(row[key] == value for key, value in PAPER.items()))
    return sorted(rows, key=lambda row: row["patch_divider"])
