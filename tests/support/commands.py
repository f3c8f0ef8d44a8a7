"""Starts the project's commands as its users do: through `accelerate launch`, in processes of their own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 300  # seconds until a command that hangs is ended; none comes near it


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with package and tests importable, on the CPU, wandb off unless a test says so."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # One thread each: beside other tests, threads that wait for each other would take most of the time.
    fixed = {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, **extra}


def launch_line(*words: object, processes: int | None = 1) -> list[str]:
    """The words of an `accelerate launch` on CPU; `words` are `-m MODULE` or a script, and its arguments.

    Without a launcher, `processes=None`, a command starts faster.
    """
    if processes is None:
        return [sys.executable, *map(str, words)]
    several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"] if processes > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_cpu_threads_per_process", "1"]
    return [*launcher, *several, *map(str, words)]


def launch(
    *words: object, processes: int | None = 1, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the caller looks at its return code and output."""
    line, env = launch_line(*words, processes=processes), env or environment()
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)


def train(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return launch("-m", "patch_based_ddpm.train", *arguments, **options)


def sample(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return launch("-m", "patch_based_ddpm.sample", *arguments, **options)


@contextlib.contextmanager
def running(line: list[object], folder: Path) -> Iterator[subprocess.Popen]:
    """Run a command beside the test, in a session of its own; what is left of it at the end is killed, unwarned.

    Its output goes to `folder`/out and `folder`/err, after what is there.
    """
    with open(folder / "out", "a") as out, open(folder / "err", "a") as err:
        words = list(map(str, line))
        process = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=out, stderr=err, start_new_session=True)
    try:
        yield process
    finally:
        for member in family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A command's process and all that it started, those that left its session or lost their parent included."""
    members = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        members = {member.pid: member for member in psutil.Process(process.pid).children(recursive=True)}
    for member in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(member.pid) == process.pid:
                members[member.pid] = member
    return list(members.values())


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | None = None, pause: float = 0.02) -> None:
    """Wait for something that a command does while it runs; fails when it does not come, or the command has ended."""
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
        assert process is None or process.poll() is None, "the command ended before it came to that"
        assert time.monotonic() < deadline, "the command makes no progress"
        time.sleep(pause)


def write_config(folder: Path, model: dict[str, Any] | None = None, **trainer: Any) -> Path:
    """A config file of a tiny model whose run lies in `folder`/run; returns its path."""
    config = {
        "trainer": {
            "train_dataset_dir": "builtin:faces",
            "log_dir": str(folder / "run"),
            "train_batch_size": 2,
            "train_num_steps": 6,
            "save_and_sample_every": 3,
            "num_workers": 0,
            "log_every": 1,
            "step_start_ema": 2,
            "update_ema_every": 1,
            "preview_count": 3,
            "preview_sampler": "ddim",
            "preview_steps": 2,
            **trainer,
        },
        "model": {"dim": 8, "dim_mults": [1, 2], "image_size": 16, "patch_divider": 2, **(model or {})},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
