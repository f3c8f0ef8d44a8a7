"""The progress of all processes in one bar: their files are counted, so that none of them waits for another."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

PAUSE = 0.5  # seconds between two looks
REST = 20  # and at least so many times what a look takes, in a folder of very many files


@contextlib.contextmanager
def watched(count: Callable[[], int], total: int, what: str) -> Iterator[None]:
    """Show how many there are, until the block ends.

    Args:
        count: how many there are now; it may raise an OSError where it cannot tell.
        total: how many there are going to be.
        what: the bar's name.
    """
    with tqdm(total=total, initial=count(), desc=what, unit="image", dynamic_ncols=True) as bar:
        ended = threading.Event()

        def look() -> None:
            with contextlib.suppress(OSError):  # whoever writes there will say so
                bar.update(count() - bar.n)

        def keep_looking() -> None:
            pause = PAUSE
            while not ended.wait(pause):
                start = time.monotonic()
                look()
                pause = max(PAUSE, REST * (time.monotonic() - start))

        thread = threading.Thread(target=keep_looking, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            look()
