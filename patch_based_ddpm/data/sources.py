"""Image sources give numbered PIL images: a folder, an LMDB database such as LSUN's, or drawn faces.

To add a source, write a class with the four members of `Source`, and let `open_source` return it.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import warnings
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patch_based_ddpm.data import faces
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import atomic_write

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BUILTIN_FACES = "builtin:faces"


class UnreadableImage(InputError):  # noqa: N818
    """An image that cannot be used; the message names the image and the reason."""


class Source(Protocol):
    """Numbered images. Worker processes receive a pickled copy, so it holds no open file."""

    @property
    def size(self) -> int | None:
        """Number of images, None for an endless source."""

    def read(self, index: int) -> Image.Image:
        """Image `index`, upright, of any mode and size; raises `UnreadableImage`."""

    def name(self, index: int) -> str:
        """The name of image `index` in messages, on one line."""

    def stamp(self) -> str:
        """A text that changes whenever an image may have changed; identifies the images of a cache."""


def open_source(location: str, height: int, width: int, seed: int, index_cache_dir: Path | None) -> Source:
    """Open the data set of `trainer.train_dataset_dir`: `builtin:faces`, an LMDB folder, or a folder of images.

    Drawn images depend on `height`, `width` and `seed`. `index_cache_dir`, unless it is None, keeps the index of an
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


@dataclass(frozen=True)
class FolderSource:
    """The images at `paths`, relative to the folder `root`, with forward slashes."""

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


def list_folder(directory: Path) -> FolderSource:
    """List the images below a folder, sorted by path. Links are followed, but no folder is listed twice.

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


@dataclass(frozen=True, eq=False)
class LMDBSource:
    """Encoded images in the LMDB database of a folder.

    Attributes:
        keys: (total length,) uint8, the concatenated keys, because a list of millions of objects takes more memory.
        ends: (size,) int64, the end of each key in `keys`.
    """

    directory: Path
    keys: np.ndarray
    ends: np.ndarray

    @property
    def size(self) -> int:
        return len(self.ends)

    def read(self, index: int) -> Image.Image:
        with _environment(self.directory).begin() as transaction:
            data = transaction.get(self._key(index))
        if data is None:
            raise UnreadableImage(f"{self.name(index)} cannot be read: the database no longer holds it.")
        return decode(io.BytesIO(data), self.name(index))

    def name(self, index: int) -> str:
        return f"{str(self.directory)!r} key {self._key(index)!r}"

    def stamp(self) -> str:
        return _stamp(self.directory, self.size)

    def _key(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.keys[start : self.ends[index]].tobytes()


def open_lmdb(directory: Path, index_cache: Path | None) -> LMDBSource:
    """Open the LMDB database of a folder.

    To list millions of keys takes minutes on a slow disk, so the .npz file `index_cache`, unless it is None, keeps them
    until the database changes.

    Raises:
        InputError: lmdb is not installed, or the database cannot be opened or is empty.
    """
    directory = directory.resolve()
    environment = _environment(directory)
    entries = environment.stat()["entries"]
    if not entries:
        raise InputError(f"the LMDB folder {str(directory)!r} holds no image: it has no entries.")
    stamp = _stamp(directory, entries)
    if index_cache is not None:
        with (
            contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),  # missing or damaged
            index_cache.open("rb") as file,  # NumPy leaves a damaged file open
            np.load(file) as index,
        ):
            if str(index["stamp"]) == stamp:
                return LMDBSource(directory, index["keys"], index["ends"])
    keys, ends = _list_keys(environment)
    if index_cache is not None:
        with contextlib.suppress(OSError):  # the next run lists them again
            index_cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(index_cache, shared=True) as file:
                np.savez(file, stamp=np.array(stamp), keys=keys, ends=ends)
    return LMDBSource(directory, keys, ends)


def _stamp(directory: Path, entries: int) -> str:
    status = (directory / "data.mdb").stat()
    return json.dumps([str(directory), entries, status.st_size, status.st_mtime_ns])


@functools.cache
def _environment(directory: Path) -> Any:
    """The open database: LMDB allows one per process. Read-only and without locks, it survives a fork."""
    try:
        import lmdb  # only LSUN needs it
    except ImportError as error:
        raise InputError(
            f"the folder {str(directory)!r} is an LMDB database, and the package lmdb that reads it is not installed; "
            'run `pipenv install --categories "packages lsun"`.'
        ) from error
    try:
        return lmdb.open(str(directory), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise InputError(f"the LMDB folder {str(directory)!r} cannot be opened: {error}.") from error


def _list_keys(environment: Any) -> tuple[np.ndarray, np.ndarray]:
    keys, ends = bytearray(), array("q")
    with environment.begin() as transaction:
        for key in transaction.cursor().iternext(keys=True, values=False):
            keys += key
            ends.append(len(keys))
    return np.frombuffer(keys, np.uint8), np.frombuffer(ends, np.int64)


@dataclass(frozen=True)
class FacesSource:
    """The endless built-in data set, see `faces`."""

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


def decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """Read a whole image and turn it upright by its EXIF orientation, or raise `UnreadableImage`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata leaves the picture intact
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except UnidentifiedImageError as error:
            raise UnreadableImage(f"{name} cannot be read: Pillow finds no image in it.") from error
        except Exception as error:  # on damaged bytes, Pillow's decoders raise any kind of exception
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"{name} cannot be read: {reason.rstrip('.')}.") from error
