"""The training images, resized once and kept in a memory-mapped file: read instead of the originals, see `data.Pixels`.

A cache is two files. PATH.npy holds (size, H, W, c) uint8 and grows image by image. Beside it PATH.json, the ledger,
says what data set it belongs to, how many images are safely on the disk, and which of them are unreadable. The ledger
is written after the images it counts, and whole or not at all, so a build that was killed, or cut off by a power
failure, goes on where the ledger says, and is never taken for a finished one.

Shapes: `H W` image, `c` channels.
"""

import dataclasses
import functools
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from patch_based_ddpm.data.dataset import FittedImages, worker_context
from patch_based_ddpm.data.decoding import UnreadableImage
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import atomic_write

FORMAT = 1  # raise it whenever the same file would be cached as other pixels
SECONDS_BETWEEN_SAVES = 10
IMAGES_AT_A_TIME = 8  # that a worker hands over


@dataclass(frozen=True)
class CachedImages:
    """The images of a cache, see `open_cache`. Other processes are sent its path, not its images.

    A flip is the exact mirror of the image, whereas `fit` crops the mirrored image: where it crops an odd number of
    pixels, a flipped image out of the cache lies one pixel beside the one that `FittedImages` reads.

    Attributes:
        path: the .npy file.
        size: number of images.
        unreadable: the indexes of unreadable images, each with the sentence that says why.
    """

    path: Path
    size: int
    unreadable: dict[int, str]

    def read(self, index: int, flip: bool) -> np.ndarray:
        if index in self.unreadable:
            raise UnreadableImage(self.unreadable[index])
        pixels = self._all[index]  # (H, W, c)
        return np.array(pixels[:, ::-1] if flip else pixels)

    @functools.cached_property
    def _all(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass
class _Ledger:
    """What a cache holds.

    Attributes:
        stamp: of the data set, and of how its images are stored.
        done: images [0, done) are on the disk, the unreadable ones in black.
        unreadable: the indexes of these, each with the sentence that says why.
    """

    stamp: str
    done: int
    unreadable: dict[int, str]

    @classmethod
    def load(cls, cache: Path) -> "_Ledger | None":
        """The ledger of a cache, or None where it is missing or damaged."""
        try:
            content = json.loads(_ledger_path(cache).read_text(encoding="utf-8"))
            unreadable = {int(index): sentence for index, sentence in content["unreadable"].items()}
            return cls(content["stamp"], content["done"], unreadable)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def enter(self, index: int, fault: str | None) -> None:
        """Count an image; `fault` is the reason why it is unreadable."""
        self.done = max(self.done, index + 1)
        self.unreadable.pop(index, None)
        if fault is not None:
            self.unreadable[index] = fault

    def save(self, cache: Path, images: BinaryIO) -> None:
        """Write the ledger once the images written so far are on the disk."""
        images.flush()
        os.fsync(images.fileno())
        with atomic_write(_ledger_path(cache)) as file:
            file.write(json.dumps(dataclasses.asdict(self)).encode())


def _ledger_path(cache: Path) -> Path:
    return cache.with_suffix(".json")


def open_cache(path: Path, stamp: str) -> CachedImages:
    """Open the cache that `build`, in this process or another one, has just finished.

    Args:
        path: the .npy file.
        stamp: what `build` returned.

    Raises:
        InputError: that cache is not there.
    """
    ledger = _Ledger.load(path)
    if ledger is None or ledger.stamp != stamp:
        raise InputError(
            f"the image cache {str(path)!r} is not the one that the main process built; trainer.log_dir must be one "
            "folder for all processes."
        )
    return CachedImages(path, ledger.done, ledger.unreadable)


def build(path: Path, images: FittedImages, *, on_bad_image: Literal["stop", "skip"], num_workers: int) -> str:
    """Make sure that the cache holds these images, as they are now.

    What an earlier build of the same images has left is kept and continued; its unreadable images are tried again.

    Args:
        path: the .npy file; its folder exists.
        images: what to hold, of a finite source.
        on_bad_image: what an unreadable image does: `stop` raises, `skip` lets the cache remember it.
        num_workers: processes that read images; 0 reads them in this one.

    Returns:
        The stamp of the cache, for `open_cache`.

    Raises:
        UnreadableImage: an image cannot be used (`stop`).
        InputError: the disk is too full, or does not let itself be written to.
    """
    stamp = json.dumps([FORMAT, images.source.stamp(), images.channels, images.height, images.width])
    image_bytes = images.height * images.width * images.channels
    header = _header((images.size, images.height, images.width, images.channels))
    try:
        ledger = _Ledger.load(path)
        if ledger is None or ledger.stamp != stamp or _length(path) < len(header) + ledger.done * image_bytes:
            ledger = _Ledger(stamp, done=0, unreadable={})
            _ledger_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # and not overwritten: another process may have it mapped
        left = [*ledger.unreadable, *range(ledger.done, images.size)]
        if left:
            _check_space(path, len(header) + images.size * image_bytes - _length(path))
            read = _read(images, left, on_bad_image, num_workers)
            held = images.size - len(left)
            bar = tqdm(read, desc="image cache", total=images.size, initial=held, dynamic_ncols=True)
            path.touch()
            with path.open("r+b") as file:
                file.write(header)
                _fill(path, file, ledger, bar)
    except OSError as error:
        raise InputError(f"the image cache {str(path)!r} cannot be built: {error.strerror or error}.") from error
    return stamp


def _header(shape: tuple[int, ...]) -> bytes:
    """The beginning of a .npy file of uint8."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(path: Path, missing: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if missing > free:
        raise InputError(
            f"the image cache {str(path)!r} needs {missing:,} more bytes, but only {free:,} are free there; make room, "
            "or set trainer.cache_images to false."
        )


def _fill(path: Path, file: BinaryIO, ledger: _Ledger, read: Iterable[tuple[int, np.ndarray, str | None]]) -> None:
    """Write what `_read` yields behind the header, each image in its place."""
    first = file.tell()
    saved = time.monotonic()
    try:
        for index, pixels, fault in read:
            file.seek(first + index * pixels.nbytes)
            file.write(pixels)
            ledger.enter(index, fault)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                ledger.save(path, file)
                saved = time.monotonic()
    finally:
        ledger.save(path, file)


def _read(
    images: FittedImages, indexes: list[int], on_bad_image: Literal["stop", "skip"], num_workers: int
) -> Iterator[tuple[int, np.ndarray, str | None]]:
    """Each index with its image (H, W, c) uint8, unflipped; black where it is unreadable, with the reason."""
    batches = DataLoader(
        _Carried(images),
        batch_size=IMAGES_AT_A_TIME,
        sampler=indexes,
        num_workers=num_workers,
        collate_fn=list,
        multiprocessing_context=worker_context() if num_workers else None,
        generator=torch.Generator(),  # as in `data.loader`
    )
    black = np.zeros((images.height, images.width, images.channels), np.uint8)
    for index, pixels in zip(indexes, chain.from_iterable(batches), strict=True):
        if not isinstance(pixels, UnreadableImage):
            yield index, pixels, None
        elif on_bad_image == "skip":
            yield index, black, str(pixels)
        else:
            raise pixels


class _Carried(Dataset):
    """Images by their index; an `UnreadableImage` is returned, as in `data.loader`."""

    def __init__(self, images: FittedImages):
        self.images = images

    def __getitem__(self, index: int) -> np.ndarray | UnreadableImage:
        try:
            return self.images.read(index, flip=False)
        except UnreadableImage as error:
            return error
