"""Image sources: where training images come from, one numbered PIL image at a time.

A source is a frozen, picklable dataclass with
    size         number of images, None for an endless source;
    read(i)      image `i` as stored, turned upright by its EXIF orientation; raises `UnreadableImage`;
    name(i)      image `i` in words, for messages;
    stamp()      where `size` is a number: a text that changes when an image may have; looks at the files.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from patch_based_ddpm.data import face_drawing, faces
from patch_based_ddpm.data.decoding import decode
from patch_based_ddpm.data.lsun import open_lmdb
from patch_based_ddpm.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BUILTIN_FACES = "builtin:faces"


class Source(Protocol):
    """What every source offers, see the module's docstring."""

    @property
    def size(self) -> int | None: ...

    def read(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str: ...


class FiniteSource(Source, Protocol):
    """A source whose images have a number."""

    @property
    def size(self) -> int: ...

    def stamp(self) -> str: ...


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
        return decode(self.root / self.paths[index], self.name(index))

    def name(self, index: int) -> str:
        return repr(str(self.root / self.paths[index]))  # quoted, with line breaks and undecodable bytes escaped

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(json.dumps([path, *_size_and_time(self.root / path)]).encode())
        return digest.hexdigest()


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
        return Image.fromarray(face_drawing.draw(faces.attributes(index, self.seed), self.height, self.width))

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
        InputError: an unknown built-in name; a folder that is missing, unreadable or without images; no lmdb package.
    """
    if location == BUILTIN_FACES:
        if min(height, width) < face_drawing.SMALLEST_DRAWING:
            raise InputError(
                f"model.image_size is {height} x {width}; {BUILTIN_FACES} needs at least "
                f"{face_drawing.SMALLEST_DRAWING} pixels a side."
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


def _size_and_time(path: Path) -> tuple[int, int] | tuple[()]:
    """Nothing for a file that is not there: what it is asked for then is its own affair."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns
