"""The kind of error that is the user's to mend: commands print its sentence and leave the traceback to bugs."""


class InputError(ValueError):
    """What was given cannot work; the message is one sentence that names the file or field, the value and the rule."""


class OnePatchTooMany(InputError):  # noqa: N818 - it is caught for what it is
    """The device has no room for a single patch."""


class DamagedCheckpoint(InputError):  # noqa: N818 - it is caught for what it is
    """A checkpoint file that cannot be read, or whose bytes are not those that were written."""
