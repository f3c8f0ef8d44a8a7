"""The figures that compare two sets of images, and the statistics of each set from which they are computed.

`collect` reads a set, each process its own share; `join` puts the shares together; `figures` compares two sets.

Shapes: `b` images, `m` vectors, `d` values of a vector, `c` channels, `H W` image.
"""

import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from patch_based_ddpm.data import dataset
from patch_based_ddpm.evaluation import fid, sliced_wasserstein
from patch_based_ddpm.evaluation.face_consistency import SMALLEST_SIDE, disagreement
from patch_based_ddpm.evaluation.ms_ssim import ms_ssim
from patch_based_ddpm.evaluation.overlap import overlap_differences
from patch_based_ddpm.evaluation.seams import Profile, contrast, profiles, worst_ratio
from patch_based_ddpm.files import atomic_write
from patch_based_ddpm.model.diffusion import GaussianDiffusion

DEFINITIONS = {
    "border contrast": "mean absolute difference of neighbouring pixels across the borders between patches, over that "
    "of all other neighbours",
    "seam ratio": "border contrast of the samples over that of real images: 1 is seamless",
    "shifted grid": "the same with the grid moved by half a patch, where no border is: the control",
    "worst phase": "the largest seam ratio of all grids of that size, moved pixel by pixel: 1 means no seam anywhere",
    "SWD x 10^3": "sliced Wasserstein distance between patches of 7 x 7 at each level of a Laplacian pyramid; lower is "
    "closer",
    "MS-SSIM": "mean multi-scale structural similarity of random pairs within a set; the lower, the more diverse it is",
    "disagreement": "mean absolute difference, on the scale [-1, 1], between parts of a drawn face that must agree",
    "overlap difference": "mean absolute difference, on the scale [-1, 1], of two predictions of the same pixels in "
    "patches of different grids, from real images with the noise of this t / T",
    "FID": "Fréchet distance of Inception's features",
    "KID x 10^3": "kernel distance of Inception's features",
    "precision": "share of samples that lie among real images, by Inception's features",
    "recall": "share of real images that lie among samples, by Inception's features",
}
PAIRS, MS_SSIM = "pairs", "ms_ssim"
PROFILE_ROWS, PROFILE_COLUMNS = "profile rows", "profile columns"
DISAGREEMENT, PATCHES, FEATURES = "disagreement of ", "patches of ", "features"


@dataclass(frozen=True)
class ImageStatistics:
    """The statistics of a set of images, or of a share of it.

    Attributes:
        count: number of images.
        sums: over images or pairs of images; float64, on the CPU.
        vectors: (m, d) each, in the order of the images; on the CPU.
    """

    count: int
    sums: dict[str, Tensor]
    vectors: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write a file that appears only when it is complete; its folder exists. Raises OSError."""
        with atomic_write(path, shared=True) as file:  # two evaluations may share a cache
            torch.save(vars(self), file)

    @classmethod
    def load(cls, path: Path) -> "ImageStatistics | None":
        """Read the file of `save`; None if it is missing or damaged."""
        try:
            return cls(**torch.load(path, weights_only=True))
        except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError):
            return None


def join(shares: Sequence[ImageStatistics]) -> ImageStatistics:
    """The statistics of a set, from those of its shares in order."""
    shares = [share for share in shares if share.count]
    sums = {name: sum(share.sums[name] for share in shares) for name in shares[0].sums}
    # Patches are cut from the first images of a very large set alone, so a later share may have none.
    vectors = {
        name: torch.cat([share.vectors[name] for share in shares if name in share.vectors])
        for name in shares[0].vectors
    }
    return ImageStatistics(sum(share.count for share in shares), sums, vectors)


def share_of(count: int, process: int, processes: int) -> range:
    """The positions in [0, count) of one process: consecutive, and every pair (2i, 2i + 1) stays together."""
    pairs = (count + 1) // 2
    return range(2 * (pairs * process // processes), min(count, 2 * (pairs * (process + 1) // processes)))


def collect(
    batches: Iterable[Tensor],
    share: range,
    count: int,
    *,
    label: str,
    faces: bool,
    extractor: fid.Extractor | None = None,
    device: torch.device | str = "cpu",
    show: bool = True,
) -> ImageStatistics:
    """Collect the statistics of a share of a set of `count` images.

    `batches` holds the images at the positions `share`, the first of which is even: (b, c, H, W) in [-1, 1] each. Drawn
    `faces` are also measured for disagreement if they are RGB and large enough. `label` is that of the progress bar.
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    vectors: dict[str, list[Tensor]] = defaultdict(list)
    position, unpaired = share.start, []
    with tqdm(total=len(share), desc=label, unit="image", disable=not show, dynamic_ncols=True) as bar:
        for batch in batches:
            pixels = dataset.to_uint8(batch.to(device))  # as a file would hold them
            images = dataset.to_float(pixels)
            pairs = torch.cat([*unpaired, images])  # positions 2i and 2i + 1 may come in different batches
            even = len(pairs) // 2 * 2
            unpaired = [pairs[even:]]
            values = dict(zip((PROFILE_ROWS, PROFILE_COLUMNS), profiles(images)))
            values |= {MS_SSIM: ms_ssim(pairs[:even:2], pairs[1:even:2]), PAIRS: torch.ones(even // 2)}
            if faces and images.shape[1] == 3 and min(images.shape[2:]) >= SMALLEST_SIDE:
                values |= {DISAGREEMENT + part: value for part, value in disagreement(images).items()}
            for name, value in values.items():
                sums[name] = sums[name] + value.double().sum(0).cpu()
            cut = images[: max(0, sliced_wasserstein.MOST_PATCHES - position)]
            if len(cut):
                patches = sliced_wasserstein.descriptors(cut, range(position, position + len(cut)), count)
                for size, level in patches.items():
                    vectors[PATCHES + size].append(level)
            if extractor is not None:
                vectors[FEATURES].append(extractor(pixels))
            position += len(images)
            bar.update(len(images))
    joined = {name: torch.cat(parts) for name, parts in vectors.items()}
    return ImageStatistics(position - share.start, dict(sums), joined)


class Figure(NamedTuple):
    """One line of the table: values of the samples, alone or compared with real images, and of the real images alone.

    `name` contains a key of `DEFINITIONS`.
    """

    name: str
    samples: float | None
    data: float | None


def figures(samples: ImageStatistics | None, data: ImageStatistics, patch_divider: int) -> list[Figure]:
    """Compute every figure that the statistics allow, with seams on the grid of N x N patches, N = `patch_divider`.

    Without samples, the figures describe the data alone. N must divide the sides of the images.
    """
    real = _of_one_set(data, patch_divider)
    if samples is None:
        return [Figure(name, None, value) for name, value in real.items()]
    generated = _of_one_set(samples, patch_divider)
    compared = {
        name.replace("border contrast", "seam ratio"): value / real[name] if real[name] else math.nan
        for name, value in generated.items()
        if name.startswith("border contrast")
    }
    if patch_divider > 1:
        worst = worst_ratio(_profile(samples), _profile(data), patch_divider)
        compared[f"seam ratio, {patch_divider} x {patch_divider}, worst phase"] = worst
    compared |= _sliced_wasserstein(samples, data)
    if FEATURES in samples.vectors and FEATURES in data.vectors:
        compared |= fid.compare(samples.vectors[FEATURES], data.vectors[FEATURES])
    comparisons = [Figure(name, value, None) for name, value in compared.items()]
    return comparisons + [Figure(name, generated[name], value) for name, value in real.items()]


def overlap_figures(
    diffusion: GaussianDiffusion, batches: Iterable[Tensor], patch_batch_size: int | None
) -> list[Figure]:
    """The figures of `overlap.overlap_differences`."""
    found = overlap_differences(diffusion, batches, patch_batch_size)
    return [Figure(f"overlap difference, t / T = {level:g}", value, None) for level, value in found.items()]


def _of_one_set(statistics: ImageStatistics, patch_divider: int) -> dict[str, float]:
    """The figures of one set alone."""
    sums, values = statistics.sums, {}
    if patch_divider > 1:
        profile = _profile(statistics)
        name = f"border contrast, {patch_divider} x {patch_divider}"
        values[name] = contrast(profile, patch_divider)
        values[f"{name}, shifted grid"] = contrast(profile, patch_divider, offset=1 / 2)
    pairs = float(sums[PAIRS])
    values["MS-SSIM"] = float(sums[MS_SSIM]) / pairs if pairs else math.nan
    of_parts = {n: float(total) / statistics.count for n, total in sums.items() if n.startswith(DISAGREEMENT)}
    if of_parts:
        values["disagreement"] = sum(of_parts.values()) / len(of_parts)
    return values | of_parts


def _profile(statistics: ImageStatistics) -> Profile:
    return statistics.sums[PROFILE_ROWS] / statistics.count, statistics.sums[PROFILE_COLUMNS] / statistics.count


def _sliced_wasserstein(samples: ImageStatistics, data: ImageStatistics) -> dict[str, float]:
    distances = {}
    for name in (name for name in data.vectors if name.startswith(PATCHES)):
        clouds = (sliced_wasserstein.normalise(one.vectors[name]) for one in (samples, data))
        distances[name.replace(PATCHES, "SWD x 10^3, ")] = 1000 * sliced_wasserstein.distance(*clouds)
    return {**distances, "SWD x 10^3, mean": sum(distances.values()) / len(distances)}


def as_json(rows: Sequence[Figure]) -> dict[str, dict[str, float | None]]:
    """The figures by name, as JSON data: null for a value that is not finite."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return {row.name: {"samples": finite(row.samples), "data": finite(row.data)} for row in rows}


def table(rows: Sequence[Figure], counts: tuple[int | None, int]) -> str:
    """Align the figures in columns; `counts` are the images in either set, None where there are no samples."""
    lines = [("", "samples", "data"), ("images", *("" if count is None else f"{count:,}" for count in counts))]
    lines += [(row.name, *("" if value is None else f"{value:,.4f}" for value in row[1:])) for row in rows]
    if counts[0] is None:
        lines = [(name, data) for name, _, data in lines]
    first, *widths = (max(map(len, column)) for column in zip(*lines))
    return "\n".join(
        "  ".join([name.ljust(first), *(value.rjust(width) for value, width in zip(values, widths))]).rstrip()
        for name, *values in lines
    )
