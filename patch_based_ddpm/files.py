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
    """Open a file for writing that appears under its name when the block has ended, and not at all if it fails.

    Args:
        path: the file; its folder exists. What was there before stays until then.
        shared: several processes may write it at once; each has an unfinished file of its own, and the last one wins.

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
        with contextlib.suppress(OSError):  # a full disk needs the space, and the failure itself is the news
            unfinished.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON data, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def flush_folder(folder: Path) -> None:
    """Flush to disk which files a folder holds, where the system can: a name may be lost though the file is safe."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
