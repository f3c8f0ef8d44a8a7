"""The benchmark's figures as a picture; only this needs matplotlib."""

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
PANEL_INCHES = 7.0


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw activation memory and, where it was measured, time over N, from the content of benchmark.json."""
    from matplotlib.figure import Figure

    panels = [_draw_memory, _draw_time] if report["repeats"] else [_draw_memory]
    figure = Figure(figsize=(PANEL_INCHES * len(panels), PANEL_INCHES), layout="constrained")
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
        if (peak := whole["memory"][kind]) is not None:
            label = f"{kind}, baseline, whole image"
            axes.axhline(peak["activations"] / MIB, color=colour, linestyle="--", label=label)
        for marker, (label, rows) in zip(cycle(MARKERS), _curves(report)):
            fitting = [row for row in rows if row["memory"][kind] is not None]
            dividers = [row["patch_divider"] for row in fitting]
            peaks = [row["memory"][kind]["activations"] / MIB for row in fitting]
            axes.plot(dividers, peaks, marker=marker, color=colour, label=f"{kind}, {label}")
    axes.set_ylabel("peak activations, MiB")


def _draw_time(axes: Axes, report: dict[str, Any]) -> None:
    axes.axhline(1, color="black", linestyle="--", label="baseline, whole image")
    for kind, colour in COLOURS.items():
        for marker, (label, rows) in zip(cycle(MARKERS), _curves(report)):
            ratios = {row["patch_divider"]: relative_time(report, row, kind, "whole image") for row in rows}
            ratios = {divider: ratio for divider, ratio in ratios.items() if ratio is not None}
            medians = [median for median, _, _ in ratios.values()]
            axes.plot(list(ratios), medians, marker=marker, color=colour, label=f"{kind}, {label}")
            for divider, (_, least, most) in ratios.items():
                axes.vlines(divider, least, most, color=colour, alpha=0.4)
    axes.set_ylabel("time per image / baseline on whole images")


def _curves(report: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A label and the rows over N: of the baseline, then of our network for each patch batch and dtype."""
    curves = [("baseline, all patches", "baseline", None, "float32")]
    for size in report["patch_batch_sizes"]:
        patches = "all patches" if size is None else f"{size} at a time"
        curves += [(f"{patches}, {dtype}", "ours", size, dtype) for dtype in report["dtypes"]]
    for label, network, size, dtype in curves:
        totals = {divider: divider**2 * report["batch_size"] for divider in report["patch_dividers"]}
        wanted = {(network, N, min(size or total, total), dtype) for N, total in totals.items()}
        names = ("network", "patch_divider", "patches", "dtype")
        rows = [row for row in report["settings"] if tuple(row[name] for name in names) in wanted]
        yield label, sorted(rows, key=lambda row: row["patch_divider"])
