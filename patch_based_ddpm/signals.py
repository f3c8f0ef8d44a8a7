"""Signals to a training run: SIGTERM and SIGINT stop it after the current step, SIGUSR1 saves a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType

from patch_based_ddpm import processes

HANDLED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
LAUNCHER_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # `accelerate launch` sets it for every process it starts


class SignalRequest(IntEnum):
    """What a run is asked to do after a step, the strongest request last."""

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
def ignored_by_children() -> Iterator[None]:
    """Processes started in this block ignore the signals that a run handles."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SignalHandler:
    """While open, records signals until the run asks for them; a second SIGINT raises `KeyboardInterrupt` at once.

    The end of `accelerate launch` counts as a request to stop, since nobody would wait for the run any more.

    Args:
        is_main_process: whether this process answers SIGINT on the terminal.
    """

    def __init__(self, is_main_process: bool) -> None:
        self._is_main_process = is_main_process
        self._save = False
        self._cause = ""
        self._interrupted = False
        self._launcher = os.getppid() if LAUNCHER_VARIABLE in os.environ else None

    def __enter__(self) -> SignalHandler:
        self._before = {number: signal.signal(number, self._receive) for number in HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            self._save = True
            return
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._cause = self._cause or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupted = True
            if self._is_main_process:  # print is not safe here: the signal may have interrupted it
                os.write(2, b"\nFinishing the step and saving; interrupt again to stop at once.\n")

    @property
    def cause(self) -> str:
        """What asked the run to stop."""
        return self._own_cause() or "a signal to another process"

    def _own_cause(self) -> str:
        if not self._cause and self._launcher is not None and os.getppid() != self._launcher:
            self._cause = "the end of its launcher"
        return self._cause

    def requested(self) -> SignalRequest:
        """Collective: the strongest request of any process. A request to save is returned once, one to stop always."""
        request = SignalRequest.SAVE if self._save else SignalRequest.NONE
        self._save = False
        return SignalRequest(processes.maximum(SignalRequest.STOP if self._own_cause() else request))

    def stop_if_requested(self) -> None:
        """Collective, for times when nothing is unsaved; a request to save stays pending.

        Raises:
            Stopped: a process was asked to stop.
        """
        if processes.maximum(bool(self._own_cause())):
            raise Stopped(self.cause)
