"""The one kind of error that is the user's to mend: commands print its sentence and leave the traceback to bugs."""


class InputError(ValueError):
    """What was given cannot work; the message is one sentence that names the file or field, the value and the rule."""
