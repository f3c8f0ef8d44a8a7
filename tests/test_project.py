"""The files around the package: environment, configs, README and its commands."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import lmdb
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

from patch_based_ddpm import Config, GaussianDiffusion, checkpoint, config, demo
from patch_based_ddpm.studies.config import StudyConfig, StudySection
from support.commands import ROOT, TIME_LIMIT, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
STUDIES = sorted((ROOT / "configs" / "study").glob("*.json"))
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL) for kind in ("bash", "yaml", "python")}


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
    assert study.study.patch_dividers == (1, 2, 4, 8)
    assert study.folder == Path("logs/study") / path.stem
    sizes = []
    with torch.device("meta"):
        for model in study.models():
            sizes.append(sum(p.numel() for p in GaussianDiffusion.from_config(model.config).parameters()))
    assert max(sizes) < 1.02 * min(sizes)


def test_all_studies_are_there():
    assert [path.name for path in STUDIES] == ["faces32.json", "faces64.json"]


def test_the_paper_is_reproduced_by_default():
    loaded = Config.load(ROOT / "configs" / "config_patch_divider=4.json")
    trainer = loaded.trainer
    assert (trainer.train_batch_size, trainer.train_num_steps, trainer.train_lr) == (32, 100_000, 1e-4)
    assert (trainer.ema_decay, trainer.step_start_ema, trainer.update_ema_every) == (0.995, 2000, 10)
    assert (trainer.save_and_sample_every, trainer.preview_count, trainer.preview_sampler) == (2000, 36, "ddpm")


def test_the_demo_uses_the_folder_of_its_config():
    assert Path(Config.load(demo.CONFIG).trainer.log_dir) == demo.FOLDER


def config_table(sections):
    """A table of keys in the README, from the dataclasses themselves."""
    lines = ["| key | default | |", "|---|---|---|"]
    for section, kind in sections.items():
        for field in dataclasses.fields(kind):
            required = field.default is dataclasses.MISSING
            default = "required" if required else f"`{json.dumps(field.default)}`"
            lines.append(f"| `{section}.{field.name}` | {default} | {field.metadata['doc']} |")
    return "\n".join(lines)


def test_readme_names_every_config_key():
    assert config_table(typing.get_type_hints(config.Config)) in README
    assert config_table({"study": StudySection}) in README


def test_readme_pictures_exist_and_are_small():
    paths = [ROOT / path for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)]
    assert paths
    assert sum(path.stat().st_size for path in paths) < 2_000_000


def test_readme_opens_with_the_two_commands():
    assert [block.strip() for block in BLOCKS["bash"][:2]] == [
        "pip install pipenv && pipenv install && pipenv run demo",
        "pip install pipenv && pipenv install --dev && pipenv run test",
    ]


def test_readme_machine_file_is_one_that_accelerate_reads(tmp_path):
    (block,) = BLOCKS["yaml"]
    path = tmp_path / "machines.yaml"
    path.write_text(block)
    loaded = load_config_from_file(str(path))
    assert (loaded.num_machines, loaded.num_processes, loaded.mixed_precision) == (2, 8, "no")


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """A folder in which README's commands find their files under the same names, but tiny."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").mkdir()
    for path in CONFIGS:
        content = json.loads(path.read_text())
        content["trainer"] |= {"train_batch_size": 2, "train_num_steps": 2, "save_and_sample_every": 1}
        content["trainer"] |= {"num_workers": 0, "preview_count": 1}
        content["model"] |= {"dim": 8, "dim_mults": [1, 2], "image_size": 32}
        content["diffusion"] |= {"timesteps": 60}
        (folder / "configs" / path.name).write_text(json.dumps(content))
    (folder / "configs" / "study").mkdir()
    for path in STUDIES:
        content = json.loads(path.read_text())
        content["trainer"] |= {"train_batch_size": 2, "train_num_steps": 2, "num_workers": 0, "preview_count": 0}
        content["model"] |= {"dim": 8, "dim_mults": [1], "patch_divider": 2, "image_size": 32}
        content["study"] |= {"patch_dividers": [1, 2], "halos": [2], "seeds": [0], "samples": 2, "real_images": 2}
        content["study"] |= {"steps": 2, "ddpm_steps": [2], "ddim_steps": [2], "dpm_solver_pp_steps": [2]}
        (folder / "configs" / "study" / path.name).write_text(json.dumps(content))
    celeba = folder / "data" / "celeba" / "img_align_celeba"
    celeba.mkdir(parents=True)
    Image.radial_gradient("L").convert("RGB").resize((178, 218)).save(celeba / "000001.jpg")
    bedroom = folder / "data" / "lsun" / "bedroom_train_lmdb"
    bedroom.mkdir(parents=True)
    with lmdb.open(str(bedroom)) as database, database.begin(write=True) as transaction:
        transaction.put(b"key", (celeba / "000001.jpg").read_bytes())
    return folder


def readme_commands():
    lines = [line for block in BLOCKS["bash"][2:] for line in block.strip().split("\n")]
    return [line for line in lines if line.startswith(("accelerate launch", "python -m patch_based_ddpm", "for i in"))]


@pytest.mark.slow
def test_readme_commands_run_word_for_word(playground, published_state):
    small = Config.load(playground / "configs" / "config_patch_divider=4.json")
    state = published_state(0, small.model.dim, small.model.dim_mults, 4, timesteps=60)
    torch.save({"step": 1, "model": state, "ema": state, "opt": {}, "scaler": None}, playground / "model-published.pt")
    commands = readme_commands()
    assert len(commands) >= 8
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in commands:
        if line.endswith("configs/demo.json"):
            shutil.rmtree(playground / "logs" / "demo", ignore_errors=True)
        if line.startswith("for i in"):  # processes that share a study
            shutil.rmtree(playground / "logs" / "study")
        words = ["bash", "-c", line] if line.startswith("for i in") else line.split()
        done = subprocess.run(
            words, cwd=playground, env=environment(PATH=path), capture_output=True, text=True, timeout=TIME_LIMIT
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert len(list((playground / "sampled").glob("*.png"))) == 65
    assert len(list((playground / "sampled_fast").glob("*.png"))) == 4
    assert len(list((playground / "sampled_published").glob("*.png"))) == 16
    assert checkpoint.read(playground / "logs" / "demo" / "checkpoints" / "model-last.pt")["step"] == 2
    assert {path.name for path in (playground / "benchmark").iterdir()} == {"benchmark.json", "benchmark.png"}
    figures = json.loads((playground / "logs" / "evaluation.json").read_text())["figures"]
    study = {path.name for path in (playground / "logs" / "study" / "faces32").iterdir() if path.is_file()}
    assert study == {"study.json", "tables.md", "study.png", "models.png", "samplers.png"}
    for number in (1, 2):
        assert "The fewest steps with an SWD of at most" in (playground / f"study-{number}.log").read_text()
    assert {"seam ratio, 4 x 4", "SWD x 10^3, 32 px", "MS-SSIM"} <= set(figures)
    assert len(list((playground / "logs" / "evaluation").glob("statistics-*.npz"))) == 2
    assert (playground / "logs" / "lsun_bedroom128" / "lmdb_keys-bedroom_train_lmdb.npz").exists()

    (program,) = BLOCKS["python"]
    done = subprocess.run(
        [sys.executable, "-c", program + "\nprint(tuple(x_0.shape), x_0.abs().max() <= 1)"],
        cwd=playground,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.stdout == "(4, 3, 32, 32) tensor(True)\n", done.stderr
