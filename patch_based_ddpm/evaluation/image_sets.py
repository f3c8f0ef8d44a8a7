"""Opens the two sets of an evaluation: a folder of samples as they are, and a data set cropped as for training.

Shapes: `b` images, `c` channels, `H W` image.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from patch_based_ddpm.data import dataset
from patch_based_ddpm.data.sources import FolderSource, Source, UnreadableImage, list_folder, open_source
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.randomness import Purpose, generator

FACES_SEED = 2**63  # training seeds are smaller, so no model has been trained on these faces
SEED = 0
FORMAT = 1  # increase it whenever the statistics of the same images change, so that cached ones are not used
CHANNELS_OF_MODE = {"L": 1, "RGB": 3, "RGBA": 4}


@dataclass(frozen=True)
class ImageSet:
    """Some images of a source in a fixed random order, so that neighbours are random pairs.

    Attributes:
        source: holds the images.
        indexes: of the chosen images, in order.
        shape: (c, H, W), to which images are resized and cropped.
        on_bad_image: see `dataset.TrainingImages`.
    """

    source: Source
    indexes: list[int]
    shape: tuple[int, int, int]
    on_bad_image: str

    def batches(self, positions: range, batch_size: int) -> Iterator[Tensor]:
        """Load the images at some positions of the set: (b, c, H, W) float32 in [-1, 1] each, on the CPU."""
        pixels = dataset.FittedImages(self.source, *self.shape)
        images = dataset.TrainingImages(pixels, horizontal_flip=False, seed=SEED, on_bad_image=self.on_bad_image)
        for start in range(0, len(positions), batch_size):
            batch = positions[start : start + batch_size]
            yield torch.stack([images[0, self.indexes[position]][0] for position in batch])

    def stamp(self) -> str:
        """A text that changes whenever the statistics of the set may change."""
        return json.dumps([FORMAT, self.source.stamp(), *self.shape, len(self.indexes)])


@dataclass(frozen=True)
class SampleSource(FolderSource):
    """A folder of samples, all of the size and mode of the `first` one."""

    first: Image.Image

    def read(self, index: int) -> Image.Image:
        image, first = super().read(index), self.first
        if (image.mode, image.size) != (first.mode, first.size):
            raise UnreadableImage(
                f"{self.name(index)} is {image.height} x {image.width} pixels of mode {image.mode}; the samples "
                f"must be alike, and another one is {first.height} x {first.width} of mode {first.mode}."
            )
        return image


def open_samples(folder: Path, leave_out: str) -> ImageSet:
    """Open a folder of samples and its subfolders, without animations and pictures of the file name `leave_out`.

    Raises:
        InputError: there is no image, or the first one is no 8-bit grey, RGB or RGBA image.
    """
    paths = (path for path in list_folder(folder).paths if Path(path).name != leave_out)
    source = FolderSource(folder, tuple(path for path in paths if not _is_animated(folder / path)))
    if not source.paths:
        raise InputError(f"the folder {str(folder)!r} holds no image but {leave_out}, apart from animations.")
    first = source.read(0)
    if first.mode not in CHANNELS_OF_MODE:
        raise InputError(f"{source.name(0)} has mode {first.mode}; a sample must be L (grey), RGB or RGBA.")
    shape = (CHANNELS_OF_MODE[first.mode], first.height, first.width)
    return ImageSet(SampleSource(folder, source.paths, first), shuffled(source.size, source.size), shape, "stop")


def _is_animated(path: Path) -> bool:
    if path.suffix.lower() == ".webp":
        # An unreadable file is reported later, when it is read as a sample.
        with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(path) as image:
            return image.is_animated
    return False


def open_data(
    location: str, shape: tuple[int, int, int], count: int, index_cache_dir: Path, on_bad_image: str
) -> ImageSet:
    """Open `count` random images of a data set, always the same ones, or all; cropped exactly as for training.

    `location` and `index_cache_dir` are those of `sources.open_source`, `shape` is (c, H, W).
    """
    source = open_source(location, *shape[1:], FACES_SEED, index_cache_dir)
    indexes = list(range(count)) if source.size is None else shuffled(source.size, count)
    return ImageSet(source, indexes, shape, on_bad_image)


def shuffled(size: int, count: int) -> list[int]:
    """The first `count` numbers of [0, size) in a random order that is always the same."""
    return torch.randperm(size, generator=generator(SEED, Purpose.CHOOSE))[:count].tolist()
