"""The training images, resized once and kept in a memory-mapped file that is read in place of the originals.

PATH.npy holds (size, H, W, c) uint8. PATH.json, the ledger, names the data set, counts the images on the disk and lists
the unreadable ones. It is always written after the images that it counts, so a build that was killed can be continued.
"""

import functools
import json
import math
import os
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from tqdm.auto import tqdm

from patch_based_ddpm import processes
from patch_based_ddpm.config import Config
from patch_based_ddpm.data.dataset import FittedImages, Pixels, load_in_workers, local_processes, workers
from patch_based_ddpm.data.sources import Source, UnreadableImage
from patch_based_ddpm.errors import InputError, explain_os_error
from patch_based_ddpm.files import write_json

FORMAT = 1  # increase it whenever the same file would be cached as other pixels
IMAGES_BETWEEN_SAVES = 1000
BATCH_SIZE = 8  # images that a worker sends at once


@dataclass
class CachedImages:
    """The images of a cache. Other processes receive its path, not its images.

    A flip is the exact mirror of the cached image, whereas `fit` mirrors before it crops: where it crops an odd number
    of pixels, the two differ by a shift of one pixel.

    Attributes:
        path: the .npy file.
        stamp: identifies the data set and the format of the stored images.
        size: number of images; during a build, of the images stored so far.
        unreadable: the index of each unreadable image and the sentence that says why.
    """

    path: Path
    stamp: str
    size: int
    unreadable: dict[int, str]

    def read(self, index: int, flip: bool) -> np.ndarray:
        if index in self.unreadable:
            raise UnreadableImage(self.unreadable[index])
        pixels = self._array[index]  # (H, W, c)
        return np.array(pixels[:, ::-1] if flip else pixels)

    @functools.cached_property
    def _array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedImages, (self.path, self.stamp, self.size, self.unreadable)

    def save(self, images: BinaryIO) -> None:
        """Write the ledger once the images written so far are on the disk."""
        images.flush()
        os.fsync(images.fileno())
        write_json(_ledger(self.path), {"stamp": self.stamp, "done": self.size, "unreadable": self.unreadable})


def _ledger(path: Path) -> Path:
    return path.with_suffix(".json")


def open_cache(path: Path, stamp: str) -> CachedImages | None:
    """The cache as far as it has been built; None if it is missing or damaged, or has another stamp."""
    try:
        ledger = json.loads(_ledger(path).read_text(encoding="utf-8"))
        unreadable = {int(index): reason for index, reason in ledger["unreadable"].items()}
        np.load(path, mmap_mode="r")  # fails if the file was cut
        return CachedImages(path, stamp, ledger["done"], unreadable) if ledger["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def prepare_pixels(config: Config, source: Source, cache_path: Path) -> Pixels:
    """Collective: the training images, from the source or the cache that the main process builds; its errors are raised
    in every process. An endless source has no cache.
    """
    trainer, model = config.trainer, config.model
    images = FittedImages(source, model.channels, *model.image_shape)
    if not trainer.cache_images or source.size is None:
        return images
    num_workers = workers(config) * local_processes()  # those of the other processes idle during the build
    built = processes.run_on_main(
        lambda: build(cache_path, images, on_bad_image=trainer.on_bad_image, num_workers=num_workers)
    )
    if open_cache(cache_path, built.stamp) != built:
        raise InputError(
            f"the image cache {str(cache_path)!r} is not the one that the main process built; trainer.log_dir must be "
            "one folder for all processes."
        )
    return built


def build(path: Path, images: FittedImages, *, on_bad_image: Literal["stop", "skip"], num_workers: int) -> CachedImages:
    """Build the cache of these images, or continue an interrupted build; its unreadable images are tried again.

    At an unreadable image, `stop` raises and `skip` records it.

    Raises:
        UnreadableImage: an image cannot be used (`stop`).
        InputError: the disk is too full or cannot be written to.
    """
    shape = (images.size, images.height, images.width, images.channels)
    stamp = json.dumps([FORMAT, images.source.stamp(), images.channels, images.height, images.width])
    with explain_os_error(f"the image cache {str(path)!r} cannot be built"):
        cached = open_cache(path, stamp)
        if cached is None:
            cached = CachedImages(path, stamp, 0, {})
            for file in (_ledger(path), path):  # not overwritten: another process may have the old file mapped
                file.unlink(missing_ok=True)
        missing = [*cached.unreadable, *range(cached.size, images.size)]
        if missing:
            needed, free = len(missing) * math.prod(shape[1:]), shutil.disk_usage(path.parent).free
            if needed > free:
                raise InputError(
                    f"the image cache {str(path)!r} needs {needed:,} more bytes, but only {free:,} are free there; "
                    "make room, or set trainer.cache_images to false."
                )
            if not path.exists():
                np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            _fill(cached, images, missing, on_bad_image, num_workers)
    return cached


def _fill(cached: CachedImages, images: FittedImages, missing: list[int], on_bad_image: str, num_workers: int) -> None:
    """Read the missing images and write each at its index; unreadable ones stay black."""
    read = functools.partial(images.read, flip=False)
    batches = load_in_workers(read, missing, num_workers, batch_size=BATCH_SIZE, collate_fn=list)
    before = images.size - len(missing)
    bar = tqdm(missing, desc="image cache", total=images.size, initial=before, dynamic_ncols=True)
    with cached.path.open("r+b") as file:  # not mapped: written to a full disk, a map kills the process
        try:
            for index, pixels in zip(bar, chain.from_iterable(batches)):
                if not isinstance(pixels, UnreadableImage):
                    cached.unreadable.pop(index, None)
                    file.seek((index - images.size) * pixels.nbytes, os.SEEK_END)
                    file.write(pixels)
                elif on_bad_image == "skip":
                    cached.unreadable[index] = str(pixels)
                else:
                    raise pixels
                cached.size = max(cached.size, index + 1)
                if index % IMAGES_BETWEEN_SAVES == 0:
                    cached.save(file)
        finally:
            cached.save(file)
