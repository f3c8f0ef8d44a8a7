"""Errors that the user can correct: commands print their sentence and end with status 2; only bugs have tracebacks."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """The input cannot work; the message is one sentence that names the file or field, the value and the rule."""


class OnePatchTooMany(InputError):  # noqa: N818
    """A single patch does not fit into the device's memory."""


class DamagedCheckpoint(InputError):  # noqa: N818
    """A checkpoint file that cannot be read, or whose bytes are not those that were written."""


@contextlib.contextmanager
def explain_os_error(what: str, advice: str = "") -> Iterator[None]:
    """Turn an `OSError` of the block into an `InputError`.

    Args:
        what: the start of the sentence, for example "config.json cannot be written".
        advice: its end, for example "; choose another --out-dir".

    Raises:
        InputError: "{what}: {the system's reason}{advice}."
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {error.strerror or error}{advice}.") from None
