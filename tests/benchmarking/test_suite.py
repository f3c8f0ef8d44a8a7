"""The suite of measurements for a GPU, here on a CPU at toy size and without compiling."""

import json

import pytest
import torch

from patch_based_ddpm import Config, benchmark
from patch_based_ddpm.benchmarking.suite import Suite

CPU = torch.device("cpu")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)


@pytest.fixture
def suite(make_config, tmp_path):
    config = make_config(model={"dim": 16, "dim_mults": [1], "image_size": 8})
    return Suite(config, images=2, device=CPU, folder=tmp_path / "suite")


def figures(suite):
    return {path.stem: json.loads(path.read_text()) for path in suite.folder.glob("*.json")}


@pytest.mark.slow
def test_every_piece_is_measured(suite, uncompiled, monkeypatch):
    monkeypatch.setattr("patch_based_ddpm.benchmarking.suite.REPEATS", 2)
    assert suite.run(minutes=60)
    found = figures(suite)
    assert found.keys() == suite.pieces.keys()
    assert not [piece for piece in found.values() if "error" in piece]
    assert found["gradient-float32"]["worst_parameter"] == 0
    assert 0 < found["gradient-float32-1-patch"]["worst_parameter"] < 1e-4
    assert 1e-4 < found["gradient-bf16"]["gradient"] < 0.2
    assert found["resume"]["equal"] is True
    for name in ("training-float32", "drawing-bf16"):
        piece = found[name]
        seconds = sorted(piece["seconds"])[len(piece["seconds"]) // 2]
        assert piece["images_per_second"] == pytest.approx(piece["images"] / seconds, rel=0.5)
        assert piece["planned_peak"] > 0
    assert sum(found["profile"]["shares"].values()) == pytest.approx(1)
    assert suite.markdown().startswith(f"{len(found)} of {len(found)} pieces are measured.")


def test_it_goes_on_with_the_pieces_that_are_missing(suite):
    calls = []
    suite.__dict__["pieces"] = {name: lambda name=name: calls.append(name) or {"figure": name} for name in "abc"}
    assert not suite.run(minutes=0)
    assert calls == []
    assert suite.run(minutes=60)
    (suite.folder / "b.json").unlink()
    assert suite.run(minutes=60)
    assert calls == ["a", "b", "c", "b"]


def test_a_piece_that_fails_records_its_error(suite):
    def fail():
        raise RuntimeError("no kernel")

    suite.__dict__["pieces"] = {"first": fail, "second": lambda: {"figure": 1}}
    assert suite.run(minutes=60)
    assert figures(suite)["first"]["error"] == "RuntimeError: no kernel"
    assert figures(suite)["second"]["figure"] == 1
    assert "no kernel" in suite.markdown()


def test_arithmetic_of_the_papers_network():
    """72.5 billion multiplications and additions in a prediction of an image, counted independently."""
    config = Config.load("configs/config_patch_divider=4.json")
    assert Suite(config, 1, CPU, None)._flops(4) / 2e9 == pytest.approx(72.5, rel=1e-3)


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Suite, "run", lambda suite, minutes: minutes > 3)
    arguments = ["--suite", "--dim", "16", "--image-size", "32", "--device", "cpu", "--out-dir", str(tmp_path)]
    benchmark.main([*arguments, "--minutes", "3"])
    assert "The same command measures the other pieces." in capsys.readouterr().out
    benchmark.main([*arguments, "--minutes", "4"])
    assert "other pieces" not in capsys.readouterr().out
    assert (tmp_path / "suite.md").read_text().startswith("0 of ")
