"""Signals to a run: SIGTERM and SIGINT end it after the step it is in, SIGUSR1 saves and lets it go on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING

import torch

from patch_based_ddpm.command_line import PATIENCE

if TYPE_CHECKING:
    from accelerate import Accelerator

HEEDED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
LAUNCHER_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # `accelerate launch` sets it for every process it starts


class Wish(IntEnum):
    """What a run is asked to do after a step; of two wishes the greater one counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Stopped(Exception):  # noqa: N818 - no error, and no ValueError
    """The run was asked to end before its last step; the message says by what."""


def outlive_signals(_: int) -> None:
    """For processes that load images: signals to all processes reach them, too, but the step needs its images.

    They outlive one SIGTERM only, because a training process that ends sends more, and waits for them.
    """
    for number in HEEDED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextlib.contextmanager
def ignored_by_children() -> Iterator[None]:
    """A process started in this block ignores the signals that a run heeds."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in HEEDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SignalWatch:
    """While open, keeps what signals ask for until the run has time for it; a second SIGINT stops at once.

    A launcher that has ended asks to stop, too: it would leave a run behind that nobody waits for.

    Args:
        accelerator: this process among those that have to agree.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._wish = Wish.NOTHING
        self._reason = ""
        self._interrupted = False
        self._launcher = os.getppid() if LAUNCHER_VARIABLE in os.environ else None

    def __enter__(self) -> SignalWatch:
        self._before = {number: signal.signal(number, self._receive) for number in HEEDED}
        # Wishes travel between the processes' CPUs, so that no GPU is waited for.
        several = self._accelerator.num_processes > 1
        self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if several else None
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            self._wish = max(self._wish, Wish.SAVE)
            return
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._ask_to_stop(signal.Signals(number).name)
        if number == signal.SIGINT:
            self._interrupted = True
            if self._accelerator.is_main_process:  # print could be what the signal interrupted
                os.write(2, b"\nFinishing the step and saving; interrupt again to stop at once.\n")

    def _ask_to_stop(self, reason: str) -> None:
        self._wish = Wish.STOP
        self._reason = self._reason or reason

    def _own_wish(self) -> Wish:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._ask_to_stop("the end of its launcher")
        return self._wish

    def agreed(self) -> Wish:
        """The greatest wish of all processes, which ask for it together; a wish to save is thereby granted."""
        wish = self._own_wish()
        if wish is Wish.SAVE:
            self._wish = Wish.NOTHING
        if self._group is None:
            return wish
        greatest = torch.tensor(int(wish))
        torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX, self._group)
        return Wish(int(greatest))

    def stop(self) -> None:
        """End the run.

        Raises:
            Stopped: always.
        """
        raise Stopped(self._reason or "another of its processes")

    def check(self) -> None:
        """End the run where this process alone was asked to; for times when nothing is unsaved.

        Raises:
            Stopped: it was.
        """
        if self._own_wish() is Wish.STOP:
            self.stop()
