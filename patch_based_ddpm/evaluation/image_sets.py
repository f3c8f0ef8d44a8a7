"""Opens the two sets of an evaluation: a folder of samples as they are, and a data set cropped as for training.

Shapes: `b` images, `c` channels, `H W` image.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patch_based_ddpm.data import dataset
from patch_based_ddpm.data.dataset import to_mode
from patch_based_ddpm.data.sources import FolderSource, UnreadableImage, list_folder, open_source
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.randomness import Purpose, generator

FACES_SEED = 2**63  # training seeds are smaller, so no model has been trained on these faces
SEED = 0
FORMAT = 1  # increase it whenever the same images get other statistics, so that cached ones are not used
CHANNELS_OF_MODE = {"L": 1, "RGB": 3, "RGBA": 4}


@dataclass(frozen=True)
class ImageSet:
    """Some images of a source in a fixed random order, so that neighbours are random pairs.

    Attributes:
        pixels: every image of the source.
        indexes: the chosen images, in order.
        shape: (c, H, W).
        on_bad_image: what an unreadable image does, see `data.TrainingImages`.
    """

    pixels: dataset.Pixels
    indexes: list[int]
    shape: tuple[int, int, int]
    on_bad_image: str

    def batches(self, positions: range, batch_size: int) -> Iterator[Tensor]:
        """Load the images at some positions of the set.

        Yields:
            (b, c, H, W) float32 in [-1, 1], on the CPU; b is `batch_size`, or less in the last batch.
        """
        images = dataset.TrainingImages(
            pixels=self.pixels, horizontal_flip=False, seed=SEED, on_bad_image=self.on_bad_image
        )
        for start in range(0, len(positions), batch_size):
            batch = positions[start : start + batch_size]
            yield torch.stack([images[0, self.indexes[position]][0] for position in batch])


@dataclass(frozen=True)
class SamplePixels:
    """Samples as their files hold them, all of the size and mode of the first one.

    Attributes:
        source: the folder.
        first: the first sample.
    """

    source: FolderSource
    first: Image.Image

    @property
    def size(self) -> int:
        return self.source.size

    def read(self, index: int, flip: bool) -> np.ndarray:
        image, first = self.source.read(index), self.first
        if (image.mode, image.size) != (first.mode, first.size):
            raise UnreadableImage(
                f"{self.source.name(index)} is {image.height} x {image.width} pixels of mode {image.mode}; the samples "
                f"must be alike, and another one is {first.height} x {first.width} of mode {first.mode}."
            )
        channels = CHANNELS_OF_MODE[image.mode]
        return np.array(to_mode(image, channels)).reshape(image.height, image.width, channels)


def open_samples(folder: Path, leave_out: str) -> ImageSet:
    """Open a folder of samples.

    Args:
        folder: searched recursively.
        leave_out: file name of pictures in it that are no samples; animations are left out as well.

    Raises:
        InputError: there is no image, or the first one is no 8-bit grey, RGB or RGBA image.
    """
    listed = list_folder(folder)
    samples = (path for path in listed.paths if Path(path).name != leave_out and not _is_animated(folder / path))
    source = FolderSource(listed.root, tuple(samples))
    if not source.paths:
        raise InputError(f"the folder {str(folder)!r} holds no image but {leave_out}, apart from animations.")
    first = source.read(0)
    if first.mode not in CHANNELS_OF_MODE:
        raise InputError(f"{source.name(0)} has mode {first.mode}; a sample must be L (grey), RGB or RGBA.")
    shape = (CHANNELS_OF_MODE[first.mode], first.height, first.width)
    return ImageSet(SamplePixels(source, first), shuffled(source.size, source.size), shape, "stop")


def _is_animated(path: Path) -> bool:
    """Whether a file is an animation, such as the trajectory of a sampler."""
    if path.suffix.lower() == ".webp":
        # Reading an unreadable file fails later, with a sentence that names it.
        with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(path) as image:
            return image.is_animated
    return False


def open_data(
    location: str, shape: tuple[int, int, int], count: int, index_cache_dir: Path, on_bad_image: str
) -> tuple[ImageSet, str]:
    """Open a data set, cropped exactly as for training.

    Args:
        location: as in `sources.open_source`.
        shape: (c, H, W).
        count: how many images to choose at random, always the same ones; all, if there are fewer.
        index_cache_dir: keeps the index of an LMDB folder.
        on_bad_image: what an unreadable image does.

    Returns:
        The set, and a text that changes whenever its statistics may change.
    """
    channels, height, width = shape
    source = open_source(location, height, width, FACES_SEED, index_cache_dir)
    indexes = list(range(count)) if source.size is None else shuffled(source.size, count)
    images = ImageSet(dataset.FittedImages(source, channels, height, width), indexes, shape, on_bad_image)
    return images, json.dumps([FORMAT, source.stamp(), *shape, len(indexes)])


def shuffled(size: int, count: int) -> list[int]:
    """The first `count` numbers of [0, size) in a random order that is always the same."""
    return torch.randperm(size, generator=generator(SEED, Purpose.CHOOSE))[:count].tolist()
