"""Files that are whole or absent: written beside their place, flushed to disk, then renamed."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX = ".unfinished"


@contextlib.contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends, and leaves it alone if the block fails.

    Args:
        path: the file; its folder exists.
        shared: several processes may write the file at once; the last one to end wins.

    Yields:
        A binary file to write into.

    Raises:
        OSError: the file cannot be written.
    """
    writer = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    unfinished = path.with_name(path.name + writer + SUFFIX)
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # frees a full disk; the first error is the one to raise
            unfinished.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_json(path: Path, content: Any, *, shared: bool = False) -> None:
    """Write JSON data as `atomic_write` does. Raises OSError."""
    with atomic_write(path, shared=shared) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def flush_folder(folder: Path) -> None:
    """Flush the names of a folder's files to disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
