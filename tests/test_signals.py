import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator

from patch_based_ddpm.signals import LAUNCHER_VARIABLE, SignalWatch, Stopped, Wish, ignored_by_children


@pytest.fixture
def watch():
    with SignalWatch(Accelerator(cpu=True)) as watch:
        yield watch


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_wish_to_stop_stays(watch, number):
    watch.check()
    send(number)
    assert watch.agreed() is Wish.STOP
    send(signal.SIGUSR1)
    assert watch.agreed() is Wish.STOP
    with pytest.raises(Stopped, match=f"^{number.name}$"):
        watch.check()


def test_a_wish_to_save_is_granted_once(watch):
    assert watch.agreed() is Wish.NOTHING
    send(signal.SIGUSR1, signal.SIGUSR1)
    watch.check()
    assert [watch.agreed() for _ in range(2)] == [Wish.SAVE, Wish.NOTHING]


def test_a_second_interrupt_stops_at_once(watch, capfd):
    send(signal.SIGINT)
    assert "interrupt again to stop at once" in capfd.readouterr().err
    send(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_signals_mean_what_they_did_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with SignalWatch(Accelerator(cpu=True)):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.mark.parametrize(("launched", "wish"), [(True, Wish.STOP), (False, Wish.NOTHING)])
def test_the_end_of_the_launcher_is_a_wish_to_stop(monkeypatch, launched, wish):
    """A process started by hand may well outlive the shell that started it."""
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    if launched:
        monkeypatch.setenv(LAUNCHER_VARIABLE, "no")
    with SignalWatch(Accelerator(cpu=True)) as watch:
        assert watch.agreed() is Wish.NOTHING
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert watch.agreed() is wish


def test_what_children_ignore_is_heeded_here():
    with SignalWatch(Accelerator(cpu=True)) as watch:
        with ignored_by_children():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        send(signal.SIGTERM)
        assert watch.agreed() is Wish.STOP


WORKERS = """
import os, signal, sys, time
import torch
from patch_based_ddpm.data import FittedImages, ShuffledStream, TrainingImages, loader
from patch_based_ddpm.sources import open_source

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


def test_processes_agree_on_the_greatest_wish(monkeypatch):
    """With one process there is nobody to ask; two are tested as whole commands."""

    def refuse(*_):
        raise AssertionError("a single process waits for nobody")

    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    with SignalWatch(Accelerator(cpu=True)) as watch:
        assert watch.agreed() is Wish.NOTHING
