import os
import signal

import pytest
import torch
from PIL import Image

from patch_based_ddpm import Config, command_line, processes, train
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.signals import SignalRequest, Stopped, handled_by
from support.commands import TIME_LIMIT, launch_line, running, write_config
from support.runs import make_trainer


def test_a_single_process_waits_for_nobody(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("there is no other process")

    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    monkeypatch.setattr(torch.distributed, "all_gather_object", refuse)
    assert processes.maximum(3) == 3
    assert processes.gather("value") == ["value"]
    assert processes.from_main("value") == "value"
    assert processes.run_on_main(lambda: "value") == "value"


def test_only_training_ends_soon_when_a_process_hangs(make_config, monkeypatch):
    """Processes that draw or evaluate have no gradients to exchange, and unequal work."""
    timeouts = []

    def accelerator(kwargs_handlers, **_):
        timeouts.append(kwargs_handlers[0].timeout)
        return Accelerator(cpu=True)

    Accelerator = command_line.Accelerator
    monkeypatch.setattr(command_line, "Accelerator", accelerator)
    train.start_accelerator(make_config().trainer)
    command_line.start_accelerator()
    assert timeouts == [train.EXCHANGE_TIMEOUT, processes.LONG_WAIT]
    assert [timeout.total_seconds() for timeout in timeouts] == [30 * 60, 24 * 60 * 60]


def refuse(rank):
    raise InputError(f"refused by {rank}.")


def check_two_processes(folder):
    """Run in each of two processes."""
    accelerator = train.start_accelerator(Config.load(write_config(folder)).trainer)
    rank, world = accelerator.process_index, torch.distributed.group.WORLD
    cpus = [group._get_backend(torch.device("cpu")) for group in (world, processes.cpu_group(world))]
    assert [cpu.options._timeout for cpu in cpus] == [train.EXCHANGE_TIMEOUT, processes.LONG_WAIT]

    assert processes.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert processes.from_main("mine" if rank == 0 else "theirs") == "mine"
    assert processes.maximum(-rank) == 0
    assert processes.run_on_main(lambda: rank) == 0
    with pytest.raises(InputError, match=r"^refused by 0\.$"):
        processes.run_on_main(lambda: refuse(rank))

    # Three images in batches of one: two for this process, one for the other, which is signalled.
    trainer = make_trainer(folder, accelerator, preview_count=3, preview_steps=4, train_batch_size=1)
    trainer.preview()
    visited, stop_if_requested = [], trainer.signals.stop_if_requested

    def signalled():
        visited.append(None)
        if rank == 1 and len(visited) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        stop_if_requested()

    trainer.signals.stop_if_requested = signalled
    with handled_by(trainer.signals.receive):
        with pytest.raises(Stopped, match="SIGTERM" if rank == 1 else "a signal to another process"):
            trainer.preview()
        assert len(visited) == 6
        assert trainer.signals.requested() is SignalRequest.STOP
    (folder / f"process {rank} is done").touch()


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys, test_processes\ntest_processes.check_two_processes(pathlib.Path(sys.argv[1]))"
    )
    with running(launch_line(script, tmp_path, processes=2), tmp_path) as launcher:
        assert launcher.wait(TIME_LIMIT) == 0, (tmp_path / "err").read_text()
    assert len(list(tmp_path.glob("process * is done"))) == 2
    with Image.open(tmp_path / "run" / "sampled" / "0.png") as picture:
        assert len({picture.crop((x, y, x + 16, y + 16)).tobytes() for x, y in ((2, 2), (20, 2), (2, 20))}) == 3
