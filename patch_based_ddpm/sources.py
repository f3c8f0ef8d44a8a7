"""Image sources: where training images come from, one numbered PIL image at a time.

A source is a frozen, picklable dataclass with
    size         number of images, None for an endless source;
    read(i)      image `i` as stored, turned upright by its EXIF orientation; raises `UnreadableImage`;
    name(i)      image `i` in words, for messages.
"""

import contextlib
import functools
import io
import json
import os
import uuid
import warnings
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patch_based_ddpm import faces

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BUILTIN_FACES = "builtin:faces"


class UnreadableImage(ValueError):  # noqa: N818 - it is caught for what it is, and part of the public API
    """An image that cannot be used; its one argument is a sentence that names the image and the reason."""


class Source(Protocol):
    """What every source offers, see the module's docstring."""

    @property
    def size(self) -> int | None: ...

    def read(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class FolderSource:
    """Image files below a folder, see `list_folder`.

    Attributes:
        root: the folder.
        paths: the files, relative to `root` and with forward slashes.
    """

    root: Path
    paths: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        return _decode(self.root / self.paths[index], self.name(index))

    def name(self, index: int) -> str:
        return repr(str(self.root / self.paths[index]))  # quoted, with line breaks and undecodable bytes escaped


@dataclass(frozen=True, eq=False)
class LMDBSource:
    """Encoded images in an LMDB environment, the form in which LSUN is published, see `open_lmdb`.

    Attributes:
        directory: the folder that holds data.mdb.
        keys: (total length,) uint8, the keys end to end; as one array they cost a worker no more than their bytes.
        ends: (size,) int64, where each key ends in `keys`.
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
        return _decode(io.BytesIO(data), self.name(index))

    def name(self, index: int) -> str:
        return f"{str(self.directory)!r} key {self._key(index)!r}"

    def _key(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.keys[start : self.ends[index]].tobytes()


@dataclass(frozen=True)
class FacesSource:
    """The built-in data set: drawn faces without end, see `faces`.

    Attributes:
        height: in pixels.
        width: in pixels.
        seed: another seed draws other faces.
    """

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


def open_source(location: str, height: int, width: int, seed: int, index_cache_dir: Path | None) -> Source:
    """Open whatever a data set's location stands for.

    Args:
        location: `builtin:faces`, an LMDB folder (one that holds data.mdb), or a folder of images.
        height: of a built-in image, in pixels.
        width: of a built-in image, in pixels.
        seed: of a built-in data set.
        index_cache_dir: folder that keeps the index of an LMDB folder from one run to the next; None: keep none.

    Returns:
        A source of at least one image.

    Raises:
        ValueError: an unknown built-in name; a folder that is missing, unreadable or without images; no lmdb package.
    """
    if location == BUILTIN_FACES:
        return FacesSource(height, width, seed)
    if location.startswith("builtin:"):
        raise ValueError(f'the data set is "{location}"; the only built-in one is "{BUILTIN_FACES}".')
    directory = Path(location)
    if (directory / "data.mdb").is_file():
        cache = None if index_cache_dir is None else index_cache_dir / f"lmdb_keys-{directory.resolve().name}.npz"
        return open_lmdb(directory, cache)
    return list_folder(directory)


def list_folder(directory: Path) -> FolderSource:
    """List the images below a folder, sorted by their path relative to it.

    Links are followed. A folder that is reached in several ways, a loop of links among them, is listed once.

    Raises:
        ValueError: the folder or one below it cannot be listed, or there is no image.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"the folder {error.filename!r} cannot be listed: {error.strerror}.") from error

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
        raise ValueError(f"the folder {str(directory)!r} holds no image: no file ends in {', '.join(SUFFIXES)}.")
    return FolderSource(directory, tuple(sorted(paths)))


def open_lmdb(directory: Path, index_cache: Path | None) -> LMDBSource:
    """Open a folder that holds an LMDB environment of encoded images.

    Listing millions of keys takes minutes on a slow disk, so the list is kept in a file and used again as long as the
    database looks the same.

    Args:
        directory: the folder with data.mdb.
        index_cache: the .npz file that keeps the keys, written when absent or out of date; None: keep them nowhere.

    Raises:
        ValueError: lmdb is not installed, or the database cannot be opened or is empty.
    """
    directory = directory.resolve()
    environment = _environment(directory)
    entries = environment.stat()["entries"]
    if not entries:
        raise ValueError(f"the LMDB folder {str(directory)!r} holds no image: it has no entries.")
    status = (directory / "data.mdb").stat()
    stamp = json.dumps([str(directory), entries, status.st_size, status.st_mtime_ns])
    keys_and_ends = None if index_cache is None else _load_index(index_cache, stamp)
    if keys_and_ends is None:
        keys_and_ends = _list_keys(environment)
        if index_cache is not None:
            _save_index(index_cache, stamp, *keys_and_ends)
    return LMDBSource(directory, *keys_and_ends)


def _decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """Read a whole image or raise `UnreadableImage`; Pillow itself refuses truncated ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oddities of metadata, which leave the picture intact
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except UnidentifiedImageError as error:
            raise UnreadableImage(f"{name} cannot be read: Pillow finds no image in it.") from error
        except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"{name} cannot be read: {reason.rstrip('.')}.") from error


@functools.cache
def _environment(directory: Path) -> Any:
    """The open LMDB environment, one a process as LMDB demands.

    A forked process may go on using its parent's: read-only and without locks, LMDB keeps nothing that is tied to one.
    """
    try:
        import lmdb  # LSUN's readers alone need it
    except ImportError as error:
        raise ValueError(
            f"the folder {str(directory)!r} is an LMDB database, and the package lmdb that reads it is not installed; "
            'run `pipenv install --categories "packages lsun"`.'
        ) from error
    try:
        return lmdb.open(str(directory), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise ValueError(f"the LMDB folder {str(directory)!r} cannot be opened: {error}.") from error


def _list_keys(environment: Any) -> tuple[np.ndarray, np.ndarray]:
    keys, ends = bytearray(), array("q")
    with environment.begin() as transaction:
        for key in transaction.cursor().iternext(keys=True, values=False):
            keys += key
            ends.append(len(keys))
    return np.frombuffer(keys, np.uint8), np.frombuffer(ends, np.int64)


def _load_index(path: Path, stamp: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The keys that an earlier run kept, or None where they are missing, damaged or those of another database."""
    try:
        with path.open("rb") as file, np.load(file) as index:
            return (index["keys"], index["ends"]) if str(index["stamp"]) == stamp else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save_index(path: Path, stamp: str, keys: np.ndarray, ends: np.ndarray) -> None:
    """Keep the keys for the next run; several processes may do so at once, and a folder may refuse it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.savez(file, stamp=np.array(stamp), keys=keys, ends=ends)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
