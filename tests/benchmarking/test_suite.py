"""The suite of measurements for a GPU, here on a CPU at toy size and without compiling."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from patch_based_ddpm import benchmark, train
from patch_based_ddpm.benchmarking.suite import Suite
from patch_based_ddpm.benchmarking.variants import VARIANTS, PixelGroupNorm, _compiled_norm_act
from patch_based_ddpm.model.layers import GroupNorm

CPU = torch.device("cpu")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    _compiled_norm_act.cache_clear()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)


@pytest.fixture
def commands_in_process(monkeypatch):
    def run(command, **_):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert command[1:3] == ["-m", "patch_based_ddpm.train"]
        train.main(command[3:])

    monkeypatch.setattr("subprocess.run", run)


@pytest.fixture
def suite(make_config, tmp_path):
    config = make_config(model={"dim": 16, "dim_mults": [1], "image_size": 8})
    return Suite(config, images=2, device=CPU, folder=tmp_path / "suite")


def figures(suite):
    return {path.stem: json.loads(path.read_text()) for path in suite.folder.glob("*.json")}


@pytest.mark.slow
def test_every_piece_is_measured(suite, uncompiled, commands_in_process, monkeypatch):
    for constant, value in {"REPEATS": 2, "LOSS_STEPS": 20, "LOOP_STEPS": 4, "FACES": 4}.items():
        monkeypatch.setattr(f"patch_based_ddpm.benchmarking.suite.{constant}", value)
    assert suite.run(minutes=60)
    found = figures(suite)
    assert found.keys() == suite.pieces.keys()
    assert not [piece for piece in found.values() if "error" in piece]
    assert found["gradient-float32"]["worst_parameter"] == 0
    assert 0 < found["gradient-1-patch"]["worst_parameter"] < 1e-4
    for piece in (found[f"gradient-{name}"] for name, variant in VARIANTS.items() if f"gradient-{name}" in found):
        assert piece["gradient"] < 0.2
    assert 1e-4 < found["gradient-bf16"]["gradient"] < 0.2
    assert found["resume"]["equal"] is True
    for name in ("training-float32", "drawing-bf16"):
        piece = found[name]
        seconds = sorted(piece["seconds"])[len(piece["seconds"]) // 2]
        assert piece["images_per_second"] == pytest.approx(piece["images"] / seconds, rel=0.5)
        assert piece["planned_peak"] > 0
    assert len(found["loss-bf16"]["losses"]) == 10
    assert found["loss-float32"]["losses"] != found["loss-float32-other-seed"]["losses"]
    assert found["loop"]["loop_images_per_second"] > 0
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


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Suite, "run", lambda suite, minutes: minutes > 3)
    arguments = ["--suite", "--dim", "16", "--image-size", "32", "--device", "cpu", "--out-dir", str(tmp_path)]
    benchmark.main([*arguments, "--minutes", "3"])
    assert "The same command measures the other pieces." in capsys.readouterr().out
    benchmark.main([*arguments, "--minutes", "4"])
    assert "other pieces" not in capsys.readouterr().out
    assert (tmp_path / "suite.md").read_text().startswith("0 of ")


def test_flags_of_the_other_benchmark_are_refused(capsys):
    for flag in (["--dtypes", "bf16"], ["--compile"], ["--patch-batch-sizes", "8"]):
        with pytest.raises(SystemExit):
            benchmark.main(["--suite", *flag])
        assert f"{flag[0]} does not go with --suite, which chooses its settings itself" in capsys.readouterr().err


def test_group_norm_over_pixels():
    torch.manual_seed(0)
    ours, pixels = GroupNorm(4, 12), PixelGroupNorm(4, 12)
    torch.nn.init.normal_(ours.weight)
    pixels.load_state_dict(ours.state_dict())
    x = torch.randn(2, 12, 3, 5).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pixels(x), ours(x))
    assert pixels(x).is_contiguous(memory_format=torch.channels_last)


def test_a_variant_with_a_fused_norm_has_the_same_gradient(suite, uncompiled):
    assert suite.gradient(replace(VARIANTS["bf16-fused-norm"], bf16=False))["worst_parameter"] < 1e-5


def test_a_variant_restores_the_precision_of_products():
    before = torch.get_float32_matmul_precision()
    with VARIANTS["tf32"].precision():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
