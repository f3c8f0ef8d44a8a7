"""A study as a picture: distance from real faces over N and over sampling steps, and memory over N."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_based_ddpm.planning.live_memory import MIB
from patch_based_ddpm.studies.report import distances, floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (5.0, 5.0)  # of each panel
MARKERS = ("x", "s", "^", "D", "v", "P", "*")  # of models that differ from the paper's


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the panels side by side into a PNG file; without samplers to compare, theirs is left out.

    Args:
        report: the content of study.json.
        path: the file.
    """
    from matplotlib.figure import Figure

    panels = [_draw_models, _draw_memory, *([_draw_samplers] if report["samplers"]["rows"] else [])]
    figure = Figure(figsize=(INCHES[0] * len(panels), INCHES[1]), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw(axes, report)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def _draw_models(axes: Axes, report: dict[str, Any]) -> None:
    rows = _as_in_the_paper(report)
    _draw_distances(axes, [row["patch_divider"] for row in rows], rows, "ko-", "as in the paper")
    for marker, row in zip(itertools.cycle(MARKERS), (row for row in report["models"] if row not in rows)):
        _draw_distances(axes, [row["patch_divider"]], [row], marker, row["name"])
    _draw_floor(axes, report)
    _label_places(axes, {row["patch_divider"] for row in report["models"]}, "N, patches a side")


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
    _label_places(axes, {row["patch_divider"] for row in report["models"]}, "N, patches a side")


def _draw_samplers(axes: Axes, report: dict[str, Any]) -> None:
    rows = sorted(report["samplers"]["rows"], key=lambda row: row["steps"])
    for sampler in dict.fromkeys(row["sampler"] for row in report["samplers"]["rows"]):
        own = [row for row in rows if row["sampler"] == sampler]
        _draw_distances(axes, [row["steps"] for row in own], own, "o-", sampler)
    _draw_floor(axes, report)
    _label_places(axes, {row["steps"] for row in rows}, f"sampling steps of {report['samplers']['model']}")


def _draw_distances(axes: Axes, places: list[int], rows: list[dict[str, Any]], style: str, label: str) -> None:
    """The mean over each row's runs, and their range."""
    values = [distances(row) for row in rows]
    axes.plot(places, [*map(statistics.mean, values)], style, label=label)
    axes.vlines(places, [*map(min, values)], [*map(max, values)], color="black", alpha=0.4)


def _draw_floor(axes: Axes, report: dict[str, Any]) -> None:
    axes.axhline(floor(report), color="black", linestyle="--", label="real against real")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("SWD x 10^3")


def _label_places(axes: Axes, places: set[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(places), [str(place) for place in sorted(places)])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _as_in_the_paper(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The models without a halo and with all conditioning, by N."""
    rows = (row for row in report["models"] if not row["halo"])
    rows = (row for row in rows if row["position_conditioning"] and row["global_content_conditioning"])
    return sorted(rows, key=lambda row: row["patch_divider"])
