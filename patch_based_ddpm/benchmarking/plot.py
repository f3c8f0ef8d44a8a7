"""The benchmark's figures as a picture, the one thing that matplotlib is needed for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_based_ddpm.benchmarking.report import baseline, relative_time
from patch_based_ddpm.planning.live_memory import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"sampling": "tab:blue", "training": "tab:red"}
MARKERS = "xosD^vP*<>phd"
INCHES = (7.0, 7.0)  # of each panel


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw activation memory and, where it was measured, time over N.

    Args:
        report: the content of benchmark.json.
        path: the PNG file to write.
    """
    from matplotlib.figure import Figure

    panels = [_draw_memory, _draw_time] if report["repeats"] else [_draw_memory]
    figure = Figure(figsize=(INCHES[0] * len(panels), INCHES[1]), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axes, report)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        dividers = report["patch_dividers"]
        axes.set_xticks(dividers, [str(divider) for divider in dividers])
        axes.minorticks_off()
        axes.set_xlabel("N, patches a side")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize="small")
    figure.savefig(path)


def _draw_memory(axes: Axes, report: dict[str, Any]) -> None:
    whole = baseline(report, report["settings"][0], "whole image")
    for kind, colour in COLOURS.items():
        if (held := whole["memory"][kind]) is not None:
            line = held["activations"] / MIB
            axes.axhline(line, color=colour, linestyle="--", label=f"{kind}, plain network, whole image")
        for marker, (label, rows) in zip(cycle(MARKERS), _curves(report)):
            fitting = [row for row in rows if row["memory"][kind] is not None]
            heights = [row["memory"][kind]["activations"] / MIB for row in fitting]
            _curve(axes, fitting, heights, f"{kind}, {label}", marker, colour)
    axes.set_ylabel("activations at their peak, MiB")


def _draw_time(axes: Axes, report: dict[str, Any]) -> None:
    axes.axhline(1, color="black", linestyle="--", label="plain network, whole image")
    for kind, colour in COLOURS.items():
        for marker, (label, rows) in zip(cycle(MARKERS), _curves(report)):
            pairs = [(row, relative_time(report, row, kind, "whole image")) for row in rows]
            fitting, times = [row for row, time in pairs if time], [time for _, time in pairs if time]
            _curve(axes, fitting, [middle for middle, _, _ in times], f"{kind}, {label}", marker, colour)
            axes.vlines(
                [row["patch_divider"] for row in fitting],
                [least for _, least, _ in times],
                [most for _, _, most in times],
                color=colour,
                alpha=0.4,
            )
    axes.set_ylabel("time per image / plain network on whole images")


def _curve(axes: Axes, rows: list[dict[str, Any]], heights: list[float], label: str, marker: str, colour: str) -> None:
    axes.plot([row["patch_divider"] for row in rows], heights, marker=marker, color=colour, label=label)


def _curves(report: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A label and the rows over N: of the plain network, then of ours for each patches a pass and dtype asked for."""
    yield "plain network, all patches", _rows(report, "plain", None, "float32")
    for size in report["patch_batch_sizes"]:
        patches = "all patches" if size is None else f"{size} at a time"
        for dtype in report["dtypes"]:
            yield f"{patches}, {dtype}", _rows(report, "lean", size, dtype)


def _rows(report: dict[str, Any], network: str, size: int | None, dtype: str) -> list[dict[str, Any]]:
    found = []
    for divider in sorted(report["patch_dividers"]):
        total = divider**2 * report["batch_size"]
        wanted = {"network": network, "patch_divider": divider, "patches": min(size or total, total), "dtype": dtype}
        found += [row for row in report["settings"] if wanted.items() <= row.items()]
    return found
