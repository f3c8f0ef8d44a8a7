"""The figures of an evaluation, computed from the statistics of two sets of images, and the table that shows them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from patch_based_ddpm.evaluation import fid, sliced_wasserstein
from patch_based_ddpm.evaluation.seams import Profile, contrast
from patch_based_ddpm.evaluation.statistics import (
    DISAGREEMENT,
    FEATURES,
    MS_SSIM,
    PAIRS,
    PATCHES,
    PROFILE_COLUMNS,
    PROFILE_ROWS,
    ImageStatistics,
)

DEFINITIONS = {
    "border contrast": "mean absolute difference of neighbouring pixels across the borders between patches, over that "
    "of all other neighbours",
    "seam ratio": "border contrast of the samples over that of real images: 1 is seamless",
    "shifted grid": "the same with the grid moved by half a patch, where no border is: the control",
    "SWD x 10^3": "sliced Wasserstein distance between patches of 7 x 7 at each level of a Laplacian pyramid; lower is "
    "closer",
    "MS-SSIM": "mean multi-scale structural similarity of random pairs within a set; lower than that of real images is "
    "more diverse, higher is less",
    "disagreement": "mean absolute difference, on the scale [-1, 1], between parts of a drawn face that must agree",
    "FID": "Fréchet distance of Inception's features",
    "KID x 10^3": "kernel distance of Inception's features",
    "precision": "share of samples that lie among real images, by Inception's features",
    "recall": "share of real images that lie among samples, by Inception's features",
}


class Figure(NamedTuple):
    """One line of the table.

    Attributes:
        name: what it is; `DEFINITIONS` explains the beginning of it.
        samples: its value for the samples, or for the samples beside the real images.
        data: its value for the real images, where they have one alone.
    """

    name: str
    samples: float | None
    data: float | None


def figures(samples: ImageStatistics | None, data: ImageStatistics, patch_divider: int) -> list[Figure]:
    """Compute every figure that the statistics hold.

    Args:
        samples: of the generated images; None: the real ones alone are described.
        data: of the real images, of the same size.
        patch_divider: N of the grid on whose borders seams are looked for; 1 has none.

    Raises:
        InputError: N does not divide the sides of the images.
    """
    sets = [None if one is None else _alone(one, patch_divider) for one in (samples, data)]
    rows = [Figure(name, None if sets[0] is None else sets[0][name], value) for name, value in sets[1].items()]
    if samples is None:
        return rows
    together = {
        row.name.replace("border contrast", "seam ratio"): row.samples / row.data if row.data else math.nan
        for row in rows
        if row.name.startswith("border contrast")
    }
    together |= _sliced_wasserstein(samples, data)
    if FEATURES in samples.rows and FEATURES in data.rows:
        together |= fid.compare(*(torch.from_numpy(one.rows[FEATURES]) for one in (samples, data)))
    return [*(Figure(name, value, None) for name, value in together.items()), *rows]


def as_json(rows: Sequence[Figure]) -> dict[str, dict[str, float | None]]:
    """The figures by their names, as JSON can hold them: what is not finite is null."""
    return {row.name: {"samples": _finite(row.samples), "data": _finite(row.data)} for row in rows}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _alone(statistics: ImageStatistics, patch_divider: int) -> dict[str, float]:
    """What a set is described by on its own."""
    sums = statistics.sums
    values = {}
    if patch_divider > 1:
        profile = Profile(
            *(torch.from_numpy(sums[name] / statistics.count) for name in (PROFILE_ROWS, PROFILE_COLUMNS))
        )
        grid = f"{patch_divider} x {patch_divider}"
        values[f"border contrast, {grid}"] = contrast(profile, patch_divider)
        values[f"border contrast, {grid}, shifted grid"] = contrast(profile, patch_divider, shifted=True)
    pairs = float(sums[PAIRS])
    values["MS-SSIM"] = float(sums[MS_SSIM]) / pairs if pairs else math.nan
    attributes = {
        name: float(total) / statistics.count for name, total in sums.items() if name.startswith(DISAGREEMENT)
    }
    if attributes:
        values["disagreement"] = sum(attributes.values()) / len(attributes)
    return values | attributes


def _sliced_wasserstein(samples: ImageStatistics, data: ImageStatistics) -> dict[str, float]:
    distances = {}
    for name in data.rows:
        if name.startswith(PATCHES):
            clouds = [torch.from_numpy(one.rows[name]) for one in (samples, data)]
            channels = clouds[0].shape[1] // sliced_wasserstein.PATCH**2
            clouds = [sliced_wasserstein.normalise(cloud, channels) for cloud in clouds]
            distances[name.replace(PATCHES, "SWD x 10^3, ")] = 1000 * sliced_wasserstein.distance(*clouds)
    return {**distances, "SWD x 10^3, mean": sum(distances.values()) / len(distances)}


def table(rows: Sequence[Figure], counts: tuple[int | None, int]) -> str:
    """Align the figures under `samples` and `data`; what a set has no value for stays empty.

    Args:
        rows: the figures.
        counts: images in either set.
    """
    lines = [("", "samples", "data"), ("images", *("" if count is None else f"{count:,}" for count in counts))]
    lines += [(row.name, *("" if value is None else f"{value:,.4f}" for value in row[1:])) for row in rows]
    columns = range(3) if counts[0] is not None else (0, 2)
    widths = {column: max(len(line[column]) for line in lines) for column in columns}
    return "\n".join(
        "  ".join(
            line[column].rjust(widths[column]) if column else line[column].ljust(widths[column]) for column in columns
        ).rstrip()
        for line in lines
    )
