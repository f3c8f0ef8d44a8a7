import json
import math
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator

from patch_based_ddpm import Config
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.tracking import Tracker, record
from support.commands import ROOT, environment, metrics, train, write_config

SCALARS = {"loss": 0.5, "grad_norm": float("nan")}
PATCH_LOSS = np.array([[0.25, 0.5], [0.75, np.nan]])


def make_tracker(folder, **trainer):
    config = Config.load(write_config(folder, **trainer))
    run = RunFolder(folder / "run")
    run.create()
    return Tracker(Accelerator(cpu=True), config, run)


def records(path):
    """The records of a .wandb file: a 7-byte header, then blocks of 32 KiB in LevelDB's log format."""
    data, position, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:  # a block's last bytes, too few for a header
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield part
            part = b""


def wandb_records(folder):
    """What an offline run wrote: the logged rows and the configuration."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (folder / "run" / "wandb").glob("offline-run-*/*.wandb")
    rows, config = [], {}
    for data in records(path):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
        for update in (*record.run.config.update, *record.config.update) if kind in ("run", "config") else ():
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    return rows, config


def test_without_wandb_the_metrics_go_to_the_file(tmp_path):
    tracker = make_tracker(tmp_path)
    tracker.start()
    tracker.log(10, SCALARS, PATCH_LOSS)
    tracker.log_preview(10, np.zeros((4, 4, 3), np.uint8))
    tracker.finish()
    wanted = {"step": 10, "loss": 0.5, "grad_norm": None, "patch_loss": [[0.25, 0.5], [0.75, None]]}
    assert metrics(tmp_path) == [wanted]


def test_a_wandb_that_cannot_start_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    import wandb

    attempts = []

    def fail(**options):
        attempts.append(options["mode"])
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()  # forgets the settings with which an earlier test of this process has started it
    tracker = make_tracker(tmp_path, wandb_enabled=True)
    tracker.start()
    tracker.log(1, SCALARS, PATCH_LOSS)
    tracker.finish()
    assert attempts == [None, "offline"]  # as the user set it up, then without the network
    assert len(metrics(tmp_path)) == 1
    assert "continues without wandb" in capsys.readouterr().out


def test_a_wandb_that_breaks_in_the_middle_does_not_stop_the_run(tmp_path, capsys):
    class Broken:
        def log(self, values):
            raise OSError("disk full")

    tracker = make_tracker(tmp_path)
    tracker.wandb = Broken()
    for step in (1, 2):
        tracker.log(step, SCALARS, PATCH_LOSS)
    tracker.finish()
    assert len(metrics(tmp_path)) == 2
    assert capsys.readouterr().out.count("disk full") == 1


def test_an_interval_without_an_applied_step_reaches_wandb(tmp_path):
    logged = []
    tracker = make_tracker(tmp_path)
    tracker.wandb = SimpleNamespace(log=logged.append)
    tracker.log(1, {"loss": float("nan")}, np.full((2, 2), np.nan))
    assert math.isnan(logged[0]["loss"])
    assert not np.any(logged[0]["patch_loss"].image)
    assert metrics(tmp_path) == [{"step": 1, "loss": None, "patch_loss": [[None, None], [None, None]]}]


def test_a_login_that_wandb_cannot_look_up_means_offline(tmp_path, monkeypatch, capsys):
    import wandb

    modes = []
    monkeypatch.setattr(wandb, "init", lambda **options: modes.append(options["mode"]) or 1 / 0)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **options: 1 / 0)
    make_tracker(tmp_path, wandb_enabled=True).start()
    assert modes == ["offline"]
    assert "no login found" in capsys.readouterr().out


def test_figures_are_a_run_of_their_own_and_never_a_failure(tmp_path, monkeypatch, capsys):
    import wandb

    class Run:
        def log(self, scalars):
            done.append(scalars)

        def finish(self):
            done.append("finished")

    def start(**options):
        done.append((options["mode"], options["project"], options["config"], options["dir"]))
        if options["mode"] is None:
            raise wandb.errors.CommError("no network")
        return Run()

    done = []
    monkeypatch.setattr(wandb, "init", start)
    monkeypatch.setenv("WANDB_MODE", "online")
    record({"of": "samples"}, {"FID": 3.0}, project=None, folder=tmp_path)
    asked = ("patch_based_ddpm", {"of": "samples"}, str(tmp_path))
    assert done == [(None, *asked), ("offline", *asked), {"FID": 3.0}, "finished"]
    assert capsys.readouterr().out.count("no network") == 1
    done.clear()
    monkeypatch.setattr(wandb, "init", lambda **options: done.append(options["project"]) or 1 / 0)
    record({}, {}, project="mine", folder=tmp_path)
    assert done == ["mine", "mine"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    record({}, {}, project=None, folder=tmp_path)
    assert "wandb is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_an_offline_run_holds_what_was_logged_and_continues_when_resumed(tmp_path):
    config = write_config(tmp_path, wandb_enabled=True, wandb_project="faces", log_every=2)
    home = {"WANDB_MODE": "", "HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    env = {name: value for name, value in environment(**home).items() if name != "WANDB_MODE"}
    assert "WANDB_MODE" not in env
    done = train("--config", config, env=env, processes=None)
    assert done.returncode == 0, done.stderr
    assert "no login found, recording offline" in done.stdout

    rows, held = wandb_records(tmp_path)
    scalars = [row for row in rows if "loss" in row]
    written = metrics(tmp_path)
    assert [row["step"] for row in scalars] == [2, 4, 6]
    for row, line in zip(scalars, written, strict=True):
        for name in ("loss", "learning_rate", "grad_norm", "images_per_second", "peak_memory_mib", "ema_decay"):
            assert row[name] == pytest.approx(line[name])
        assert row["patch_loss/_type"] == "image-file"
    assert [row["step"] for row in rows if "preview/_type" in row] == [3, 6]
    assert held["model"] == json.loads((tmp_path / "run" / "config.json").read_text())["model"]

    first_id = (tmp_path / "run" / "wandb_run_id").read_text()
    again = train(
        "--config", config, "--resume", tmp_path / "run" / "checkpoints" / "model-3.pt", env=env, processes=None
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "wandb_run_id").read_text() == first_id
    runs = {path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert len(runs) == 2
    assert all(name.endswith(first_id.strip()) for name in runs)


def test_package_imports_without_wandb():
    """Only users of wandb need it: nothing imports it at the top of a module."""
    for path in (ROOT / "patch_based_ddpm").rglob("*.py"):
        assert "\nimport wandb" not in path.read_text(), path
