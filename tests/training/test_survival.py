"""Runs that are killed, signalled and resumed, as real commands, end with the result of an undisturbed run."""

import os
import random
import signal
import time

import psutil
import pytest

from patch_based_ddpm import checkpoint, command_line
from patch_based_ddpm import train as train_command
from patch_based_ddpm.signals import REQUEUE_STATUS
from patch_based_ddpm.training import trainer
from patch_based_ddpm.training.run_folder import RunFolder
from support.commands import family, launch_line, metrics, running, train, wait_until, write_config
from support.runs import assert_same, mixed_images, timeless


def command(folder, **trainer):
    return launch_line("-m", "patch_based_ddpm.train", "--config", write_config(folder, **trainer), processes=None)


def logged_steps(folder):
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def assert_same_run(folder, other):
    """The same weights, averages, moments, logged figures and preview."""
    (last,) = {RunFolder(place / "run").steps()[-1] for place in (folder, other)}
    got, wanted = (checkpoint.read(RunFolder(place / "run").checkpoint(last)) for place in (folder, other))
    assert got.pop("config") != wanted.pop("config")  # the folders differ
    assert_same(got, wanted)
    assert timeless(metrics(folder)) == timeless(metrics(other))
    previews = [RunFolder(place / "run").preview(last).read_bytes() for place in (folder, other)]
    assert previews[0] == previews[1]


EVERY = 5  # steps between two checkpoints of a run that is going to be killed


def kill_in(moment, process, folder, chance):
    """Kill a run in the middle of something; returns in the middle of what it was."""
    run, before = RunFolder(folder / "run"), logged_steps(folder)
    if moment == "start":
        time.sleep(chance.uniform(0, 2))
    else:
        least = before + chance.randrange(8)
        wait_until(lambda: logged_steps(folder) > least, process)
    if moment == "step":
        wait_until(lambda: logged_steps(folder) % EVERY == 1, process, pause=0)  # a few steps before the next save
    if moment == "save":
        wait_until(lambda: any(run.checkpoints.glob("*.unfinished")), process, pause=0)
    if moment == "preview":
        saved = run.steps()
        wait_until(lambda: run.steps() != saved, process, pause=0)
        time.sleep(chance.uniform(0, 0.05))
    for member in family(process):
        member.kill()
    process.wait()
    if logged_steps(folder) == before:
        return "start"
    if any(run.checkpoints.glob("*.unfinished")):
        return "save"
    return "step" if not run.steps() or run.preview(run.steps()[-1]).exists() else "preview"


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path, request):
    kills = request.config.getoption("--kills")
    options = {"train_num_steps": 20 * kills, "save_and_sample_every": EVERY, "preview_steps": 10}
    options |= {"checkpoints_total_limit": 3, "log_every": 1}
    chance, where = random.Random(0), []
    moments = [["start", "step", "save", "preview"][i % 4] for i in range(kills)]
    chance.shuffle(moments)
    line = command(tmp_path, **options)
    for moment in moments:
        with running([*line, "--resume", "latest"], tmp_path) as process:
            where.append(kill_in(moment, process, tmp_path, chance))
    print(f"killed {kills} times: " + ", ".join(f"{where.count(kind)} in the {kind}" for kind in sorted(set(where))))
    with running([*line, "--resume", "latest"], tmp_path) as process:
        assert process.wait() == 0, (tmp_path / "err").read_text()
    assert_same_run(tmp_path, undisturbed(tmp_path, **options))
    assert set(where) == set(moments), where


def undisturbed(tmp_path, **options):
    """The folder of the same run, done in this process."""
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    train_command.main(["--config", str(write_config(folder, **options))])
    return folder


@pytest.mark.slow
def test_signals_to_one_process(tmp_path):
    options = {"train_num_steps": 60, "save_and_sample_every": 40}
    line, run = command(tmp_path, num_workers=1, **options), RunFolder(tmp_path / "run")
    with running(line, tmp_path) as process:
        wait_until(lambda: logged_steps(tmp_path) >= 5, process)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: run.steps(), process)
        (asked_for,) = run.steps()
        assert asked_for < 40
        wait_until(lambda: logged_steps(tmp_path) > asked_for + 2, process)
        for member in family(process):  # as a scheduler does it
            member.send_signal(signal.SIGTERM)
        assert process.wait() == REQUEUE_STATUS, (tmp_path / "err").read_text()
    stopped = run.steps()[-1]
    assert stopped == logged_steps(tmp_path) < 60
    assert f"Stopped by SIGTERM at step {stopped}; --resume latest continues it." in (tmp_path / "out").read_text()
    with running([*line, "--resume", "latest"], tmp_path) as process:
        wait_until(lambda: logged_steps(tmp_path) > stopped + 2, process)
        for member in family(process):  # as Ctrl-C in a terminal
            member.send_signal(signal.SIGINT)
        assert process.wait() == REQUEUE_STATUS
    train_command.main(["--config", str(write_config(tmp_path, **options)), "--resume", "latest"])
    assert_same_run(tmp_path, undisturbed(tmp_path, **options))


def test_a_second_interrupt_stops_within_the_step(tmp_path, monkeypatch, capfd):
    def interrupted(step, micro_batches):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step goes on")

    monkeypatch.setattr(trainer.TrainingStep, "__call__", lambda self, *arguments: interrupted(*arguments))
    monkeypatch.setattr("sys.argv", ["train", "--config", str(write_config(tmp_path))])
    with pytest.raises(SystemExit) as status:
        command_line.run(train_command.main)
    assert status.value.code == 128 + signal.SIGINT
    assert "interrupt again to stop at once" in capfd.readouterr().err
    assert RunFolder(tmp_path / "run").steps() == []


@pytest.mark.slow
def test_a_run_stops_with_its_launcher(tmp_path):
    config = write_config(tmp_path, train_num_steps=10**6, save_and_sample_every=10**6)
    with running(launch_line("-m", "patch_based_ddpm.train", "--config", config), tmp_path) as launcher:
        wait_until(lambda: logged_steps(tmp_path) >= 3, launcher)
        members = family(launcher)
        launcher.terminate()
        launcher.wait()
        _, alive = psutil.wait_procs(members, timeout=60)
        assert not alive
    assert "Stopped by the end of its launcher" in (tmp_path / "out").read_text()
    assert len(RunFolder(tmp_path / "run").steps()) == 1


@pytest.mark.slow
def test_two_processes_that_are_signalled_and_killed(tmp_path):
    """Signals to the second one, the death of the second one, a signal to the launcher."""
    images = mixed_images(tmp_path / "images")
    options = {"train_num_steps": 60, "save_and_sample_every": 25, "gradient_accumulate_every": 2}
    options |= {"train_dataset_dir": str(images), "on_bad_image": "skip", "patch_batch_size": 3, "preview_count": 3}
    config, run = write_config(tmp_path, **options), RunFolder(tmp_path / "run")
    line = launch_line("-m", "patch_based_ddpm.train", "--config", config, "--resume", "latest", processes=2)
    with running(line, tmp_path) as launcher:
        wait_until(lambda: logged_steps(tmp_path) >= 3, launcher)
        second = trainers(launcher)[1]
        second.send_signal(signal.SIGUSR1)
        wait_until(lambda: run.steps(), launcher)
        assert run.steps()[0] < 25
        second.send_signal(signal.SIGTERM)
        assert launcher.wait() == 1  # of accelerate's own, whatever its processes end with
    assert f"exitcode  : {REQUEUE_STATUS}" in (tmp_path / "err").read_text()
    stopped = run.steps()[-1]
    assert run.steps() == sorted({run.steps()[0], stopped})
    with running(line, tmp_path) as launcher:
        wait_until(lambda: logged_steps(tmp_path) > stopped + 2, launcher)
        members = family(launcher)
        trainers(launcher)[1].kill()
        assert launcher.wait(timeout=60) == 1
        _, alive = psutil.wait_procs(members, timeout=60)
        assert not alive
    assert "Signal 9 (SIGKILL) received" in (tmp_path / "err").read_text()
    reached = logged_steps(tmp_path)
    with running(line, tmp_path) as launcher:
        wait_until(lambda: logged_steps(tmp_path) > reached, launcher)
        launcher.terminate()
        assert launcher.wait() == 1
    assert f"Stopped by SIGTERM at step {run.steps()[-1]};" in (tmp_path / "out").read_text()
    assert run.steps()[-1] < 60
    with running(line, tmp_path) as launcher:
        assert launcher.wait() == 0, (tmp_path / "err").read_text()
    (tmp_path / "undisturbed").mkdir()
    whole = train("--config", write_config(tmp_path / "undisturbed", **options), processes=2)
    assert whole.returncode == 0, whole.stderr
    assert "on 2 process(es)" in whole.stdout
    assert metrics(tmp_path)[-1]["bad_images"] == 1
    assert_same_run(tmp_path, tmp_path / "undisturbed")


def trainers(launcher):
    """The two training processes behind a launcher."""
    found = [member for member in family(launcher) if member.pid != launcher.pid and is_trainer(member)]
    assert len(found) == 2
    return found


def is_trainer(process):
    line = process.cmdline()
    return "patch_based_ddpm.train" in line and "accelerate.commands.launch" not in line
