"""What the commands share: flags in both spellings, errors as one sentence, and how they meet their other processes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from patch_based_ddpm.errors import InputError

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """An argument parser that takes `--out_dir` for `--out-dir`, and whose errors are one sentence."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args = sys.argv[1:] if args is None else args
        return super().parse_args([_with_hyphens(word) for word in args], namespace)

    def error(self, message: str) -> None:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; --help lists what there is.\n")


def _with_hyphens(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def positive_int(text: str) -> int:
    """A whole number of at least 1, for `type=`."""
    return _whole_number(text, least=1)


def non_negative_int(text: str) -> int:
    """A whole number of at least 0, for `type=`."""
    return _whole_number(text, least=0)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return int(text)


def start_accelerator(**options: Any) -> Accelerator:
    """This process among the others, patient with those that have more to draw or a file to write."""
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(
        kwargs_handlers=[patient, DistributedDataParallelKwargs(gradient_as_bucket_view=True)], **options
    )


def run(main: Callable[[], None]) -> None:
    """Run a command: what the user can mend ends it with one sentence, anything else with its traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
