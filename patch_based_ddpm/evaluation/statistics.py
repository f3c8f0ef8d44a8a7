"""What one pass over a set of images takes down: all that the figures of `metrics.py` are made of.

It is collected batch by batch in every process, for the process's own stretch of the set, then joined. Sums are over
images or pairs of images; rows are one or more for each image, in the order of the set.

Shapes: `b` images, `c` channels, `H W` image.
"""

import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patch_based_ddpm.data import dataset
from patch_based_ddpm.evaluation import sliced_wasserstein
from patch_based_ddpm.evaluation.face_consistency import disagreement
from patch_based_ddpm.evaluation.fid import Extractor
from patch_based_ddpm.evaluation.ms_ssim import ms_ssim
from patch_based_ddpm.evaluation.seams import profiles
from patch_based_ddpm.files import atomic_write

PAIRS = "pairs"
MS_SSIM = "ms_ssim"
PROFILE_ROWS, PROFILE_COLUMNS = "profile rows", "profile columns"
DISAGREEMENT = "disagreement of "
PATCHES = "patches of "
FEATURES = "features"


@dataclass(frozen=True)
class ImageStatistics:
    """The statistics of a set of images, or of a stretch of it.

    Attributes:
        count: images.
        sums: each float64.
        rows: each (rows, values).
    """

    count: int
    sums: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]

    def save(self, path: Path) -> None:
        """Write them, whole or not at all; the folder exists.

        Raises:
            OSError: the file cannot be written.
        """
        sums = {f"sums.{name}": values for name, values in self.sums.items()}
        rows = {f"rows.{name}": values for name, values in self.rows.items()}
        with atomic_write(path, shared=True) as file:  # of two evaluations of one data set
            np.savez(file, count=self.count, **sums, **rows)

    @classmethod
    def load(cls, path: Path) -> "ImageStatistics | None":
        """Read what `save` wrote; None where there is no such file, or a damaged one."""
        parts: dict[str, dict[str, np.ndarray]] = {"sums": {}, "rows": {}}
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                count = int(file["count"])
                for key in file.files[1:]:
                    kind, _, name = key.partition(".")
                    parts[kind][name] = file[key]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return cls(count, **parts)


def join(stretches: Sequence[ImageStatistics]) -> ImageStatistics:
    """The statistics of a set, from those of its stretches in order."""
    stretches = [stretch for stretch in stretches if stretch.count]
    sums = {name: sum(stretch.sums[name] for stretch in stretches) for name in stretches[0].sums}
    names = stretches[0].rows  # a later one may lie behind the last image that is cut into patches
    rows = {name: np.concatenate([s.rows[name] for s in stretches if name in s.rows]) for name in names}
    return ImageStatistics(sum(stretch.count for stretch in stretches), sums, rows)


def stretch_of(count: int, process: int, processes: int) -> range:
    """A process's part of the positions [0, count): one stretch, and no pair of neighbours (2i, 2i + 1) is parted."""
    pairs = (count + 1) // 2
    return range(2 * (pairs * process // processes), min(count, 2 * (pairs * (process + 1) // processes)))


class Collector:
    """Takes the statistics of one stretch of a set.

    Args:
        count: images in the whole set.
        start: position of the first image to come, an even number.
        faces: also read how far the parts of drawn faces disagree, see `agreement.py`.
        extractor: also take its features.
    """

    def __init__(self, count: int, start: int, *, faces: bool, extractor: Extractor | None) -> None:
        self.count = count
        self.start = self.position = start
        self.faces = faces
        self.extractor = extractor
        self._sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(()))
        self._rows: dict[str, list[np.ndarray]] = defaultdict(list)
        self._single: Tensor | None = None  # an image whose partner is still to come

    def add(self, images: Tensor) -> None:
        """Take the next images: (b, c, H, W) in [-1, 1], on any device, b at least 1."""
        whole = dataset.to_uint8(images)  # as they are in a file
        images = dataset.to_float(whole)
        rows, columns = profiles(images)
        self._add_sum(PROFILE_ROWS, rows)
        self._add_sum(PROFILE_COLUMNS, columns)
        self._add_pairs(images)
        if self.faces:
            for name, values in disagreement(images).items():
                self._add_sum(DISAGREEMENT + name, values)
        cut = images[: max(0, sliced_wasserstein.MOST_PATCHES - self.position)]
        if len(cut):
            positions = range(self.position, self.position + len(cut))
            levels = sliced_wasserstein.levels(*images.shape[2:])
            for size, patches in zip(levels, sliced_wasserstein.descriptors(cut, positions, self.count), strict=True):
                self._rows[PATCHES + level_name(*size)].append(patches.numpy())
        if self.extractor is not None:
            self._rows[FEATURES].append(self.extractor(whole).numpy())
        self.position += len(images)

    def _add_sum(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values.double().sum(0).cpu().numpy()

    def _add_pairs(self, images: Tensor) -> None:
        """Compare the images at positions 2i and 2i + 1, however they are cut into batches."""
        if self._single is not None:
            images = torch.cat([self._single, images])
        even = len(images) // 2 * 2
        self._single = images[even:] if even < len(images) else None
        self._add_sum(MS_SSIM, ms_ssim(images[0:even:2], images[1:even:2]))
        self._add_sum(PAIRS, torch.tensor([even // 2]))

    def result(self) -> ImageStatistics:
        """The statistics of all images that were added."""
        rows = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        return ImageStatistics(self.position - self.start, dict(self._sums), rows)


def level_name(height: int, width: int) -> str:
    """A level of the pyramid in words: its side, or its height and width."""
    return f"{height} px" if height == width else f"{height} x {width} px"
