import threading
from types import SimpleNamespace

import pytest

from patch_based_ddpm.generation import progress

PATIENCE = 60  # seconds until a bar that does not move has failed


@pytest.fixture
def bars(monkeypatch):
    """Every bar that was made: where it began, where it is, and an event for each place it comes to."""
    made = []

    class Bar:
        def __init__(self, **options):
            self.options, self.n = options, options["initial"]
            self.reached = {n: threading.Event() for n in range(options["total"] + 1)}
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            self.n += n
            self.reached[self.n].set()

    monkeypatch.setattr(progress, "tqdm", Bar)
    return made


def test_it_shows_what_others_do_while_the_block_is_busy(bars, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.01)
    there, before = 2, threading.active_count()
    with progress.watched(lambda: there, 9, "images"):
        (bar,) = bars
        assert (bar.options["initial"], bar.options["total"], bar.options["desc"]) == (2, 9, "images")
        there = 5
        assert bar.reached[5].wait(PATIENCE)
        there = 4  # one was removed
        assert bar.reached[4].wait(PATIENCE)
        there = 9
    assert bar.n == 9
    assert threading.active_count() == before


def test_the_last_look_is_at_the_end(bars):
    there = 0
    with progress.watched(lambda: there, 3, "images"):
        there = 3
    assert bars[0].n == 3


def test_what_cannot_be_counted_is_not_its_business(bars, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.01)
    tried = threading.Event()
    there = iter([0])

    def count():
        for n in there:
            return n
        tried.set()
        raise OSError("gone")

    with progress.watched(count, 3, "images"):
        assert tried.wait(PATIENCE)
        there = iter([1])
        assert bars[0].reached[1].wait(PATIENCE)


def test_an_error_in_the_block_ends_it(bars):
    before = threading.active_count()
    with pytest.raises(KeyError), progress.watched(lambda: 0, 3, "images"):
        raise KeyError
    assert threading.active_count() == before


def test_a_slow_look_is_followed_by_a_long_pause(bars, monkeypatch):
    pauses, clock = [], iter([0.0, 0.001, 10.0, 12.0])  # one look takes a millisecond, the next one two seconds

    class Event:
        def wait(self, pause):
            pauses.append(pause)
            return len(pauses) == 3

        def set(self):
            pass

    thread = lambda target, daemon: SimpleNamespace(start=target, join=lambda: None)  # noqa: E731 - runs at once
    monkeypatch.setattr(progress, "threading", SimpleNamespace(Event=Event, Thread=thread))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.watched(lambda: 0, 3, "images"):
        pass
    assert pauses == [progress.PAUSE, progress.PAUSE, 2.0 * progress.REST]
