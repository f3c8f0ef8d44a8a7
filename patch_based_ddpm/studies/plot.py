"""A study's figures as a picture: distance from real faces over sampling steps and over N, and memory over N."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_based_ddpm.planning.live_memory import MIB
from patch_based_ddpm.studies.report import SWD, floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (5.0, 5.0)  # of each panel
MARKERS = ("x", "s", "^", "D", "v", "P", "*")  # of models with a halo and of ablations, again and again


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the panels side by side; that of the samplers is left out where none are compared.

    Args:
        report: the content of study.json.
        path: the PNG file to write.
    """
    from matplotlib.figure import Figure

    panels = [_draw_distance, _draw_memory, *([_draw_samplers] if report["samplers"]["rows"] else [])]
    figure = Figure(figsize=(INCHES[0] * len(panels), INCHES[1]), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw(axes, report)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def _draw_distance(axes: Axes, report: dict[str, Any]) -> None:
    plain = [row for row in _by_divider(report) if _is_plain(row)]
    axes.plot([row["patch_divider"] for row in plain], [*map(_mean_distance, plain)], "ko-", label="as in the paper")
    others = [row for row in report["models"] if not _is_plain(row)]
    for marker, row in zip(itertools.cycle(MARKERS), others):
        axes.plot([row["patch_divider"]], [_mean_distance(row)], marker, label=row["name"])
    for row in report["models"]:
        _draw_range(axes, row["patch_divider"], row)
    _draw_floor(axes, report)
    _label_dividers(axes, report)
    axes.set_ylabel("SWD x 10^3")


def _draw_memory(axes: Axes, report: dict[str, Any]) -> None:
    rows = [row for row in _by_divider(report) if _is_plain(row)]
    for kind, colour in (("sampling", "tab:blue"), ("training", "tab:red")):
        for part, marker, style in (("activations", "o", "-"), ("total", "s", "--")):
            heights = [row["runs"][0]["memory"][kind][part] / MIB for row in rows]
            label = f"{kind}, {'activations' if part == 'activations' else 'in all'}"
            axes.plot([row["patch_divider"] for row in rows], heights, style, marker=marker, color=colour, label=label)
    axes.set_yscale("log")
    _label_dividers(axes, report)
    axes.set_ylabel("MiB at their peak, one image, one patch a pass")


def _draw_samplers(axes: Axes, report: dict[str, Any]) -> None:
    rows = report["samplers"]["rows"]
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        own = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["steps"])
        axes.plot([row["steps"] for row in own], [*map(_mean_distance, own)], marker="o", label=sampler)
    for row in rows:
        _draw_range(axes, row["steps"], row)
    _draw_floor(axes, report)
    visited = sorted({row["steps"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(visited, [str(steps) for steps in visited])
    axes.minorticks_off()
    axes.set_xlabel(f"sampling steps of {report['samplers']['model']}")
    axes.set_ylabel("SWD x 10^3")


def _draw_range(axes: Axes, place: float, row: dict[str, Any]) -> None:
    """What the runs of a row lie between."""
    distances = _distances(row)
    axes.vlines(place, min(distances), max(distances), color="black", alpha=0.4)


def _draw_floor(axes: Axes, report: dict[str, Any]) -> None:
    axes.axhline(floor(report), color="black", linestyle="--", label="real against real")
    axes.set_ylim(bottom=0)


def _label_dividers(axes: Axes, report: dict[str, Any]) -> None:
    dividers = sorted({row["patch_divider"] for row in report["models"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(dividers, [str(divider) for divider in dividers])
    axes.minorticks_off()
    axes.set_xlabel("N, patches a side")


def _distances(row: dict[str, Any]) -> list[float]:
    """Of the runs of a model or of a sampler."""
    return [run["figures"][SWD]["samples"] for run in row["runs"]]


def _mean_distance(row: dict[str, Any]) -> float:
    return statistics.mean(_distances(row))


def _by_divider(report: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(report["models"], key=lambda row: row["patch_divider"])


def _is_plain(row: dict[str, Any]) -> bool:
    return row["halo"] == 0 and row["position_conditioning"] and row["global_content_conditioning"]
