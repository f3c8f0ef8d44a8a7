"""`pip install .` installs what the Pipfile does, and all of the package."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from support.commands import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PIPFILE, PYPROJECT = (tomllib.loads((ROOT / name).read_text()) for name in ("Pipfile", "pyproject.toml"))


def requirements(section):
    """A Pipfile's section as pip writes it."""
    return {name + ("" if version == "*" else version) for name, version in section.items()}


def test_dependencies_are_those_of_the_pipfile():
    assert set(PYPROJECT["project"]["dependencies"]) == requirements(PIPFILE["packages"])
    extras = {name: set(extra) for name, extra in PYPROJECT["project"]["optional-dependencies"].items()}
    assert extras == {name: requirements(PIPFILE[name]) for name in ("lsun", "benchmark", "evaluate")}


@pytest.mark.slow
def test_a_wheel_holds_the_whole_package_and_nothing_else(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for name in ("patch_based_ddpm", "tests", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", wheels, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {str(path.relative_to(ROOT)) for path in (ROOT / "patch_based_ddpm").rglob("*.py")}
