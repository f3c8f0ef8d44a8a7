"""Shared by all commands: the argument parser, types of flags, errors as one sentence, the accelerator."""

import argparse
import functools
import re
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from patch_based_ddpm import processes
from patch_based_ddpm.errors import InputError

USAGE_ERROR = 2
COUNT_LIMIT, BYTES_LIMIT = 2**32, 2**63  # upper bounds of flags
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Parser(argparse.ArgumentParser):
    """An argument parser that takes `--out_dir` for `--out-dir`, and whose errors are one sentence."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else args
        if "" in words:  # of an unset variable, for example
            self.error("an argument is empty")
        return super().parse_args([re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), w) for w in words])

    def error(self, message: str) -> None:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; --help lists all flags.\n")


def whole_number(text: str, least: int) -> int:
    """A whole number, for `type=`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    if int(text) >= COUNT_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} must be less than {COUNT_LIMIT}")
    return int(text)


non_negative_int = functools.partial(whole_number, least=0)
positive_int = functools.partial(whole_number, least=1)


def byte_count(text: str) -> int:
    """An amount of memory such as 6GiB, 500MB or 1000000, in bytes, for `type=`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text)
    if match is None or match[2].upper() not in BYTE_UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} must be an amount of memory, for example 6GiB or 500MB")
    size = float(match[1]) * BYTE_UNITS[match[2].upper()]
    if size >= BYTES_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} must be less than {BYTES_LIMIT} bytes")
    return int(size)


def add_max_memory(parser: argparse.ArgumentParser) -> None:
    """The flag `--max-memory`, in bytes."""
    parser.add_argument(
        "--max-memory",
        type=byte_count,
        metavar="SIZE",
        help="choose the most patches per pass that fit into this memory (of each process)",
    )


def allow_tf32() -> None:
    """Use TensorFloat-32 for float32 matrix products on a GPU, as PyTorch's convolutions do by default."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def start_accelerator(timeout: timedelta = processes.LONG_WAIT, **options: Any) -> Accelerator:
    """Join the processes of this command.

    Args:
        timeout: of the accelerator's collectives; long by default, as some processes have more images than others.
        options: of `Accelerator`.
    """
    allow_tf32()
    handlers = [InitProcessGroupKwargs(timeout=timeout), DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    return Accelerator(kwargs_handlers=handlers, **options)


def compile_options(device: torch.device, *, sampling: bool) -> dict[str, Any]:
    """Arguments of torch.compile for passes of one shape: CUDA graphs to sample on a GPU.

    Each of several networks in a process has its own limit of recompilations, where this PyTorch can do so.
    """
    mode = "reduce-overhead" if sampling and device.type == "cuda" else None
    isolated = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    return {"dynamic": False, "mode": mode, **isolated}


def can_plot(picture: Path) -> bool:
    """Whether matplotlib is installed; prints how to install it if not."""
    if find_spec("matplotlib") is None:
        print(f'{picture} needs matplotlib, which `pipenv install --categories "packages benchmark"` installs.')
        return False
    return True


def run(main: Callable[[], None]) -> None:
    """Run a command. An `InputError` ends it with its sentence and status 2; a bug keeps its traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
