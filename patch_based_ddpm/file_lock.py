"""A lock between processes, let go when its holder ends, however that ends."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a file's lock for the length of the block.

    Args:
        path: the file; it and its folders are made where they are missing, and it stays, empty.
        wait: until another process lets go of it.

    Yields:
        Whether the lock is held: False where another process holds it and `wait` is False.

    Raises:
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True  # closing the file lets go
