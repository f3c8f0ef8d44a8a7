"""The files around the package: style, environment, configs."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patch_based_ddpm import Config, GaussianDiffusion, demo
from patch_based_ddpm.studies.config import StudyConfig
from support.commands import ROOT

PACKAGE = ROOT / "patch_based_ddpm"
NAMES = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
STUDIES = sorted((ROOT / "configs" / "study").glob("*.json"))


def test_lint():
    """`pipenv run test` includes what `pipenv run lint` checks."""
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_no_package_index_is_named():
    """A user's own mirror or proxy decides where packages come from."""
    pipfile, lock = ((ROOT / name).read_text() for name in ("Pipfile", "Pipfile.lock"))
    assert "[[source]]" not in pipfile
    assert "/simple" not in pipfile + lock
    assert json.loads(lock)["_meta"]["sources"] == []
    assert '"index":' not in lock


def test_the_lock_holds_everything_for_every_python():
    lock = json.loads((ROOT / "Pipfile.lock").read_text())
    assert {"torch", "torchvision", "accelerate", "wandb", "einops", "tqdm", "pillow", "numpy", "ema-pytorch"} <= set(
        lock["default"]
    )
    assert {"pytest", "ruff", "lmdb", "matplotlib", "torch-fidelity"} <= set(lock["develop"])
    assert set(lock["lsun"]) == {"lmdb"}
    assert "matplotlib" in lock["benchmark"]
    assert "torch-fidelity" in lock["evaluate"]
    for section in ("default", "develop", "lsun", "benchmark", "evaluate"):
        for name, entry in lock[section].items():
            assert not re.search(r"python_version >= '3\.1[1-9]'", entry.get("markers", "")), name


def test_scripts_need_no_shell():
    """They run on every system: the python of the environment, nothing else."""
    scripts = re.search(r"\[scripts\]\n(.*)", (ROOT / "Pipfile").read_text(), flags=re.DOTALL)[1]
    assert set(re.findall(r"^(\w+) = ", scripts, flags=re.MULTILINE)) == {"demo", "test", "lint"}
    assert all(line.split(" = ")[1].startswith('"python -m ') for line in scripts.split("\n") if " = " in line)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_build(path):
    loaded = Config.load(path)
    with torch.device("meta"):
        diffusion = GaussianDiffusion.from_config(loaded)
    if "patch_divider" in path.stem:
        assert loaded.model.patch_divider == int(path.stem[-1])
        positions = loaded.model.patch_divider**2
        assert sum(p.numel() for p in diffusion.parameters()) == 126851919 - 66048 + (positions - 16) * 128


def test_all_configs_are_there():
    names = {f"{data}patch_divider={n}.json" for data in ("config_", "config_lsun_bedroom_") for n in (1, 2, 4, 8)}
    assert names | {"demo.json"} == {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_build(path):
    """Equal networks but for what they are told, and nothing that two studies write in one place."""
    study = StudyConfig.load(path)
    assert study.study.patch_dividers == ((1, 4) if path.stem == "seams32" else (1, 2, 4, 8))
    assert study.folder == Path("logs/study") / path.stem
    sizes = []
    with torch.device("meta"):
        for config in study.models().values():
            sizes.append(sum(p.numel() for p in GaussianDiffusion.from_config(config).parameters()))
    assert max(sizes) < 1.02 * min(sizes)


def test_all_studies_are_there():
    assert [path.name for path in STUDIES] == ["faces32.json", "faces64.json", "seams32.json"]


def test_the_paper_is_reproduced_by_default():
    loaded = Config.load(ROOT / "configs" / "config_patch_divider=4.json")
    trainer = loaded.trainer
    assert (trainer.train_batch_size, trainer.train_num_steps, trainer.train_lr) == (32, 100_000, 1e-4)
    assert (trainer.ema_decay, trainer.step_start_ema, trainer.update_ema_every) == (0.995, 2000, 10)
    assert (trainer.save_and_sample_every, trainer.preview_count, trainer.preview_sampler) == (2000, 36, "ddpm")


def test_the_demo_uses_the_folder_of_its_config():
    assert Path(Config.load(demo.CONFIG).trainer.log_dir) == demo.FOLDER


FLOORS = (  # imports run from a later floor to an earlier one
    {"errors", "randomness"},
    {"files", "processes"},
    {"command_line", "strict_json"},
    {"config", "signals"},
    {"model", "data"},
    {"samplers", "evaluation"},
    {"checkpoint", "planning"},
    {"generation", "training"},
    {"benchmarking", "studies"},
    {"train", "sample", "memory", "benchmark"},
    {"evaluate", "study", "demo", "__init__"},
)


def imported(path):
    """The folders and files of the package that a module imports, wherever the import stands in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE.name:
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            yield from (name if name in NAMES else "__init__" for name in names)


def test_imports_run_one_way():
    assert set.union(*FLOORS) == NAMES
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        wrong = {name for name in imported(path) if name != own and floor[name] >= floor[own]}
        assert not wrong, f"{path.name} imports {wrong}"


def test_no_folder_is_crowded():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}:
        assert len(list(folder.glob("*.py"))) <= 13, folder


def test_the_pipfile_names_every_package_that_is_imported():
    named = set(re.findall(r'^"?([\w-]+)"? = ', (ROOT / "Pipfile").read_text(), flags=re.MULTILINE))
    imported = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    others = imported - set(sys.stdlib_module_names) - {PACKAGE.name, "support", "tomli"}  # pytest needs tomli, too
    assert {{"PIL": "pillow"}.get(name, name.replace("_", "-")) for name in others} <= named
