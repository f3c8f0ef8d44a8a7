"""Image sources: they give numbered PIL images, out of a folder, an LMDB database (`lsun.py`) or drawn (`faces.py`).

To add a source, write a class with the four members of `Source` in this folder and let `open_source` return it for
the `trainer.train_dataset_dir` that stands for it. Everything else (resizing, flips, order, cache, workers) follows.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from patch_based_ddpm.data import faces
from patch_based_ddpm.data.decoding import decode
from patch_based_ddpm.data.lsun import open_lmdb
from patch_based_ddpm.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BUILTIN_FACES = "builtin:faces"


class Source(Protocol):
    """The interface of a source. Worker processes receive a pickled copy, so it holds no open file."""

    @property
    def size(self) -> int | None:
        """Number of images, None for an endless source."""

    def read(self, index: int) -> Image.Image:
        """Image `index`, upright, of any mode and size; raises `UnreadableImage`."""

    def name(self, index: int) -> str:
        """What messages call image `index`, on one line."""

    def stamp(self) -> str:
        """A text that changes whenever an image may have changed: caches of the images are valid for one stamp."""


@dataclass(frozen=True)
class FolderSource:
    """Image files below the folder `root`; `paths` are relative to it, with forward slashes. See `list_folder`."""

    root: Path
    paths: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        return decode(self.root / self.paths[index], self.name(index))

    def name(self, index: int) -> str:
        return repr(str(self.root / self.paths[index]))  # quoted, with line breaks and undecodable bytes escaped

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                status = (self.root / path).stat()
                size_and_time = [status.st_size, status.st_mtime_ns]
            except OSError:  # the file is gone: `read` will say so
                size_and_time = []
            digest.update(json.dumps([path, *size_and_time]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class FacesSource:
    """The built-in data set: the endless sequence of faces number `seed`, see `faces`."""

    height: int
    width: int
    seed: int

    @property
    def size(self) -> None:
        return None

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(faces.draw(faces.attributes(index, self.seed), self.height, self.width))

    def name(self, index: int) -> str:
        return f"{BUILTIN_FACES} number {index}"

    def stamp(self) -> str:
        return BUILTIN_FACES


def open_source(location: str, height: int, width: int, seed: int, index_cache_dir: Path | None) -> Source:
    """Open the data set of `trainer.train_dataset_dir`: `builtin:faces`, an LMDB folder, or a folder of images.

    `height`, `width` and `seed` are those of drawn images. `index_cache_dir`, unless it is None, keeps the index of an
    LMDB folder from one run to the next.

    Raises:
        InputError: an unknown built-in name; a folder that is missing, unreadable or without images; no lmdb package.
    """
    if location == BUILTIN_FACES:
        if min(height, width) < faces.SMALLEST_DRAWING:
            raise InputError(
                f"model.image_size is {height} x {width}; {BUILTIN_FACES} needs at least {faces.SMALLEST_DRAWING} "
                "pixels a side."
            )
        return FacesSource(height, width, seed)
    if location.startswith("builtin:"):
        raise InputError(f'the data set is "{location}"; the only built-in one is "{BUILTIN_FACES}".')
    directory = Path(location)
    if (directory / "data.mdb").is_file():
        cache = None if index_cache_dir is None else index_cache_dir / f"lmdb_keys-{directory.resolve().name}.npz"
        return open_lmdb(directory, cache)
    return list_folder(directory)


def list_folder(directory: Path) -> FolderSource:
    """List the images below a folder, sorted by their path relative to it.

    Links are followed. A folder that is reached in several ways, a loop of links among them, is listed once.

    Raises:
        InputError: the folder or one below it cannot be listed, or there is no image.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename!r} cannot be listed: {error.strerror}.") from error

    if not directory.is_dir():
        raise InputError(
            f"there is no folder {str(directory)!r}; it should hold images, files that end in {', '.join(SUFFIXES)}."
        )
    paths: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(directory, onerror=refuse, followlinks=True):
        subfolders.sort()
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        relative = Path(folder).relative_to(directory)
        paths += [(relative / file).as_posix() for file in files if file.lower().endswith(SUFFIXES)]
    if not paths:
        raise InputError(f"the folder {str(directory)!r} holds no image: no file ends in {', '.join(SUFFIXES)}.")
    return FolderSource(directory, tuple(sorted(paths)))
