"""LSUN's LMDB folders: an image source that reads the database directly, see `sources.py`."""

import contextlib
import functools
import io
import json
import os
import uuid
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patch_based_ddpm.data.decoding import UnreadableImage, decode
from patch_based_ddpm.errors import InputError


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

    Listing millions of keys takes minutes on a slow disk, so the list is kept in a file and used again as long as the
    database looks the same.

    Args:
        directory: the folder with data.mdb.
        index_cache: the .npz file that keeps the keys, written when absent or out of date; None: keep them nowhere.

    Raises:
        InputError: lmdb is not installed, or the database cannot be opened or is empty.
    """
    directory = directory.resolve()
    environment = _environment(directory)
    entries = environment.stat()["entries"]
    if not entries:
        raise InputError(f"the LMDB folder {str(directory)!r} holds no image: it has no entries.")
    stamp = _stamp(directory, entries)
    keys_and_ends = None if index_cache is None else _load_index(index_cache, stamp)
    if keys_and_ends is None:
        keys_and_ends = _list_keys(environment)
        if index_cache is not None:
            _save_index(index_cache, stamp, *keys_and_ends)
    return LMDBSource(directory, *keys_and_ends)


def _stamp(directory: Path, entries: int) -> str:
    status = (directory / "data.mdb").stat()
    return json.dumps([str(directory), entries, status.st_size, status.st_mtime_ns])


@functools.cache
def _environment(directory: Path) -> Any:
    """The open LMDB environment, one a process as LMDB demands.

    A forked process may go on using its parent's: read-only and without locks, LMDB keeps nothing that is tied to one.
    """
    try:
        import lmdb  # LSUN's readers alone need it
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
