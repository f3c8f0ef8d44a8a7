import os
import signal
import subprocess
import sys
import time

import pytest

from patch_based_ddpm import processes
from patch_based_ddpm.signals import LAUNCHER_VARIABLE, SignalHandler, SignalRequest, Stopped, handled_by


@pytest.fixture
def handler():
    handler = SignalHandler(is_main_process=True)
    with handled_by(handler.receive):
        yield handler


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_stays(handler, number):
    handler.stop_if_requested()
    send(number)
    assert handler.requested() is SignalRequest.STOP
    send(signal.SIGUSR1)
    assert handler.requested() is SignalRequest.STOP
    with pytest.raises(Stopped, match=f"^{number.name}$"):
        handler.stop_if_requested()


def test_a_request_to_save_is_returned_once(handler):
    assert handler.requested() is SignalRequest.NONE
    send(signal.SIGUSR1, signal.SIGUSR1)
    handler.stop_if_requested()
    assert [handler.requested() for _ in range(2)] == [SignalRequest.SAVE, SignalRequest.NONE]


def test_a_second_interrupt_stops_at_once(handler, capfd):
    send(signal.SIGINT)
    assert "interrupt again to stop at once" in capfd.readouterr().err
    send(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_another_process_may_be_the_one_that_was_signalled(handler, monkeypatch):
    """Two processes; the other one reports `theirs`. Real ones are tested in test_processes."""
    theirs = SignalRequest.SAVE
    monkeypatch.setattr(processes, "maximum", lambda ours: max(ours, theirs))
    assert handler.requested() is SignalRequest.SAVE
    theirs = SignalRequest.STOP
    assert handler.requested() is SignalRequest.STOP
    with pytest.raises(Stopped, match=r"^a signal to another process$"):
        handler.stop_if_requested()


def test_the_handlers_before_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    handler = SignalHandler(is_main_process=True)
    with handled_by(handler.receive):
        assert signal.getsignal(signal.SIGTERM) == handler.receive
        send(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.mark.parametrize(("launched", "wanted"), [(True, SignalRequest.STOP), (False, SignalRequest.NONE)])
def test_the_end_of_the_launcher_is_a_request_to_stop(monkeypatch, launched, wanted):
    """A process started by hand may well outlive the shell that started it."""
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    if launched:
        monkeypatch.setenv(LAUNCHER_VARIABLE, "no")
    handler = SignalHandler(is_main_process=True)
    assert handler.requested() is SignalRequest.NONE
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert handler.requested() is wanted


def test_signals_that_children_ignore_are_handled_here(handler):
    with handled_by(signal.SIG_IGN):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    send(signal.SIGTERM)
    assert handler.requested() is SignalRequest.STOP


WORKERS = """
import os, signal, sys, time
import torch
from patch_based_ddpm.data.dataset import FittedImages, ShuffledStream, TrainingImages, loader
from patch_based_ddpm.data.sources import open_source

if __name__ == "__main__":
    pixels = FittedImages(open_source("builtin:faces", 16, 16, 0, None), 3, 16, 16)
    stream = ShuffledStream(size=None, seed=0, process_index=0, num_processes=1, start=0)
    images = TrainingImages(pixels=pixels, horizontal_flip=False, seed=0, on_bad_image="stop")
    batches = iter(loader(images, stream, batch_size=1, num_workers=1, device=torch.device("cpu")))
    next(batches)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(20):
        next(batches)
    print("done", flush=True)
"""


@pytest.mark.slow
def test_processes_that_load_images_outlive_the_signals_of_their_group(tmp_path):
    """A scheduler or a terminal signals every process; a step needs images until it is finished."""
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.killpg(process.pid, number)
        time.sleep(1)  # for a process that dies of them to be gone
        out, _ = process.communicate("\n", timeout=120)
        assert out == "done\n"
        assert process.returncode == 0
    finally:
        process.kill()
