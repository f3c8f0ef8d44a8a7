"""Signals to a training run: SIGTERM and SIGINT stop it after the current step, SIGUSR1 saves a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import FrameType

from patch_based_ddpm import processes

HANDLED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
LAUNCHER_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # `accelerate launch` sets it for every process it starts


class SignalRequest(IntEnum):
    """The action that a signal requests after the current step; the strongest is the last."""

    NONE = 0
    SAVE = 1
    STOP = 2


class Stopped(Exception):  # noqa: N818 - no error, and no ValueError
    """The run was asked to end before its last step; the message names the cause."""


def outlive_signals(_: int) -> None:
    """Worker initialisation of a data loader: ignore signals to the whole process group, as the step needs its images.

    Only the first SIGTERM is ignored, because a training process ends its workers with SIGTERM and waits for them.
    """
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Let one handler receive the signals to a run; child processes inherit `signal.SIG_IGN`."""
    before = {number: signal.signal(number, handler) for number in HANDLED}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class SignalHandler:
    """Records the signals that `receive` gets until the run asks for them; a second SIGINT raises `KeyboardInterrupt`.

    The end of `accelerate launch` counts as a request to stop, because nothing waits for the run any more.

    Args:
        is_main_process: whether this process answers SIGINT on the terminal.
    """

    def __init__(self, is_main_process: bool) -> None:
        self.cause = "a signal to another process"  # why the run stops
        self._is_main_process = is_main_process
        self._save = self._stop = False
        self._launcher = os.getppid() if LAUNCHER_VARIABLE in os.environ else None

    def receive(self, number: int, _: FrameType | None) -> None:
        """The handler of the signals, see `handled_by`."""
        if number not in (signal.SIGTERM, signal.SIGINT):
            self._save = True
            return
        if not self._stop:
            self._stop, self.cause = True, signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            if self._is_main_process:  # print is not safe here: the signal may have interrupted it
                os.write(2, b"\nFinishing the step and saving; interrupt again to stop at once.\n")

    def _stop_requested(self) -> bool:
        if not self._stop and self._launcher not in (None, os.getppid()):
            self._stop, self.cause = True, "the end of its launcher"
        return self._stop

    def requested(self) -> SignalRequest:
        """Collective: the strongest request of any process. A request to save is returned once, one to stop always."""
        request = SignalRequest.SAVE if self._save else SignalRequest.NONE
        self._save = False
        return SignalRequest(processes.maximum(SignalRequest.STOP if self._stop_requested() else request))

    def stop_if_requested(self) -> None:
        """Collective: raise `Stopped` if a process was asked to stop; a request to save stays pending."""
        if processes.maximum(self._stop_requested()):
            raise Stopped(self.cause)
