"""LSUN's LMDB folders as a source of images, read directly: see `sources.py`.

torchvision's LSUN is not used: it opens the database in the constructor and pickles its index into the working folder.
"""

import contextlib
import functools
import io
import json
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patch_based_ddpm.data.decoding import UnreadableImage, decode
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import atomic_write


@dataclass(frozen=True, eq=False)
class LMDBSource:
    """Encoded images in an LMDB environment, see `open_lmdb`.

    Attributes:
        directory: the folder that holds data.mdb.
        keys: (total length,) uint8, the keys end to end; a worker's copy takes no more memory than their bytes.
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
        return decode(io.BytesIO(data), self.name(index))

    def name(self, index: int) -> str:
        return f"{str(self.directory)!r} key {self._key(index)!r}"

    def stamp(self) -> str:
        return _stamp(self.directory, self.size)

    def _key(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.keys[start : self.ends[index]].tobytes()


def open_lmdb(directory: Path, index_cache: Path | None) -> LMDBSource:
    """Open a folder that holds an LMDB environment of encoded images.

    Listing millions of keys takes minutes on a slow disk, so the list is kept in a file, for as long as the database
    does not change.

    Args:
        directory: the folder with data.mdb.
        index_cache: the .npz file that keeps the keys, written if missing or out of date; None: keep none.

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
    """The open LMDB environment: LMDB allows one a process.

    A forked process may use its parent's: opened read-only and without locks, it holds nothing that is tied to one.
    """
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
