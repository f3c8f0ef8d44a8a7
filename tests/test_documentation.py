"""README.md and docs/: their commands run word for word, their examples compute, their links and pictures exist.

Commands run in process, because a launcher adds nothing to most of them; those for two processes are launched for real.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import lmdb
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from PIL import Image

from patch_based_ddpm import Config, memory, train
from patch_based_ddpm.benchmarking import measure
from support.commands import ROOT, TIME_LIMIT, environment

PAGES = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}


def blocks(page, kind):
    return re.findall(rf"```{kind}\n(.*?)```", TEXTS[page], flags=re.DOTALL)


def commands(page):
    """The lines of a page's bash blocks, joined where they end in a backslash."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def template(tmp_path_factory, published_state):
    """A folder with the files that the pages name: tiny configs and data, a trained and a published model."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "configs" / "study").mkdir(parents=True)
    for path in (ROOT / "configs").glob("*.json"):
        content = json.loads(path.read_text())
        content["trainer"] |= {"train_batch_size": 2, "train_num_steps": 2, "save_and_sample_every": 1}
        content["trainer"] |= {"num_workers": 0, "preview_count": 1}
        content["model"] |= {"dim": 8, "dim_mults": [1], "image_size": 32}
        content["diffusion"] |= {"timesteps": 60}
        (folder / "configs" / path.name).write_text(json.dumps(content))
    for path in (ROOT / "configs" / "study").glob("*.json"):
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
    small = Config.load(folder / "configs" / "config_patch_divider=4.json")
    state = published_state(0, small.model.dim, small.model.dim_mults, 4, timesteps=60)
    torch.save({"step": 1, "model": state, "ema": state, "opt": {}, "scaler": None}, folder / "model-published.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("WANDB_MODE", "disabled")
        train.main(["--config", "configs/config_patch_divider=4.json"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def playground(template, tmp_path, monkeypatch):
    """A copy of the template as the working folder."""
    shutil.copytree(template, tmp_path / "playground")
    monkeypatch.chdir(tmp_path / "playground")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # Fewer plans and no new processes; tests of their own cover both.
    monkeypatch.setattr(memory, "DIVIDERS", (1, 2))
    monkeypatch.setattr(measure, "_in_new_process", lambda function, *args: function(*args))
    return tmp_path / "playground"


def run(line):
    """Run one command of a page."""
    words = shlex.split(line)
    if "-m" not in words:
        assert words[:2] == ["pip", "install"], f"{line}: is no command of this project"
        return
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if module.endswith(".train") and not {"--resume", "--restart-step", "--dry-run"} & set(arguments):
        log_dir = Config.load(arguments[arguments.index("--config") + 1]).trainer.log_dir
        shutil.rmtree(log_dir, ignore_errors=True)  # another page's command, or one above, has trained there
    if "--multi_gpu" in words:
        words[words.index("-m") : words.index("-m")] = ["--main_process_port", "0"]  # other tests launch, too
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(words, env=environment(PATH=path), capture_output=True, text=True, timeout=TIME_LIMIT)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return
    try:
        found = import_module(module)
        main = found.main if hasattr(found, "main") else import_module(f"{module}.__main__").main
        main(arguments)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_run_word_for_word(page, playground):
    costly = {line for line in commands("README") if "--multi_gpu" in line or "--max-memory" in line}
    for line in commands(page):
        if page == "README" or line not in costly:  # which README's own test runs
            run(line)
    if page == "README":
        assert {path.name for path in (playground / "sampled").glob("*.png")} == {
            *(f"{seed:06d}.png" for seed in range(64)),
            "grid.png",
        }


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_examples_run(page, playground):
    for block in blocks(page, "python"):
        names = {}
        exec(compile(block, page, "exec"), names)
        if page == "README":
            assert names["x_0"].shape == (4, 3, 32, 32)
            assert names["x_0"].abs().max() <= 1


def test_readme_opens_with_the_two_commands():
    assert [block.strip() for block in blocks("README", "bash")[:2]] == [
        "pip install pipenv && pipenv install && pipenv run demo",
        "pip install pipenv && pipenv install --dev && pipenv run test",
    ]


def test_readme_is_short_and_names_every_page():
    assert len(TEXTS["README"].splitlines()) <= 220
    assert {f"docs/{name}.md" for name in PAGES if name != "README"} <= set(
        re.findall(r"\]\(([^)#]+)", TEXTS["README"])
    )


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", TEXTS[page]):
        name, _, anchor = target.partition("#")
        path = PAGES[page] if not name else (PAGES[page].parent / name).resolve()
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_pictures_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()) < 2_000_000


def test_no_marks_of_a_merge():
    assert not [
        name for name, text in TEXTS.items() if re.search(r"^(<<<<<<<|=======|>>>>>>>)", text, flags=re.MULTILINE)
    ]


def test_the_map_of_folders_names_every_folder():
    folders = {path.parent.name for path in (ROOT / "patch_based_ddpm").glob("*/__init__.py")}
    assert folders == set(re.findall(r"^\| `(\w+)/` \|", TEXTS["developing"], flags=re.MULTILINE))


def test_the_machine_file_is_one_that_accelerate_reads(tmp_path):
    (block,) = (block for page in PAGES for block in blocks(page, "yaml"))
    path = tmp_path / "machines.yaml"
    path.write_text(block)
    loaded = load_config_from_file(str(path))
    assert (loaded.num_machines, loaded.num_processes, loaded.mixed_precision) == (2, 8, "no")
