"""Checkpoints: written whole or not at all, and read without running code from the file.

A checkpoint of ours is a dict of `format`, `config` (JSON data), `step`, the state dicts `model` and `ema` of the UNet,
and the rest of the training state, see `training/`. `published.py` translates checkpoints of the published
implementation, which hold no config and use other names. `safetensors.py` reads and writes files of one set of weights;
`python -m patch_based_ddpm.checkpoint export` makes them. docs/checkpoints.md is the user's page.
"""

import dataclasses
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patch_based_ddpm.checkpoint import published, safetensors
from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import DamagedCheckpoint, InputError
from patch_based_ddpm.files import atomic_write
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.strict_json import parse

FORMAT = "patch_based_ddpm 1"
ZIP_START = b"PK\3\4"
WITHOUT_RUN = {"step": None, "optimizer": None, "scaler": None}  # of a checkpoint that cannot be resumed
PathLike = str | os.PathLike[str]


def save(path: PathLike, contents: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all, see `atomic_write`; `contents` as above, without `format`."""
    with atomic_write(Path(path)) as file:
        try:
            torch.save({"format": FORMAT, **contents}, file)
        except RuntimeError as error:
            # After an OSError torch still tries to finish the archive, and raises this instead.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read(path: PathLike, *, verify: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: ours, a safetensors file or a published one.

    Args:
        path: the file.
        verify: read the whole file and verify the checksums of one of ours, as resuming does. Otherwise the file is
            memory-mapped: a tensor's bytes are read when the tensor is used.

    Returns:
        The contents under our names, with `config` as a `Config`. The `config` of a published checkpoint is None, and
        its `optimizer` needs `published.translate_optimizer`. A safetensors file lacks `model` or `ema`, and its `step`
        and `optimizer` are None.

    Raises:
        DamagedCheckpoint: it cannot be read, or is damaged.
        InputError: there is no such file, it holds code, or it is no checkpoint.
    """
    path = check_path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            if safetensors.is_safetensors(start):
                contents = safetensors.read(path)
                return {**WITHOUT_RUN, **contents, "config": _config(contents["config"], path)}
            file.seek(0)
            # torch.load maps zip archives only, and takes any path with this suffix for a safetensors file.
            mapped = not verify and start.startswith(ZIP_START) and not path.name.endswith(".safetensors")
            contents = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        ours = isinstance(contents, dict) and contents.get("format") == FORMAT
        if ours and verify:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # compares the CRC-32 checksums, which torch writes and does not read
            if damaged is not None:
                raise DamagedCheckpoint(f"{path}: is damaged; the checksum of {damaged!r} in it is wrong.")
    except InputError:
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror or error}.") from None
    except Exception as error:
        # torch, safetensors and zipfile do not document their exceptions: UnpicklingError, RuntimeError, EOFError...
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):  # a class or function that torch does not use for weights
            raise InputError(f"{path}: refused, because it holds code ({code[1]}) and not only weights.") from None
        raise DamagedCheckpoint(f"{path}: is damaged or not a checkpoint ({type(error).__name__}).") from None
    if not isinstance(contents, dict) or not all(isinstance(contents.get(key), dict) for key in ("model", "ema")):
        raise InputError(f"{path}: is not a checkpoint; it must hold the weights `model` and `ema`.")
    weights = {key: _without_wrappers(contents[key], path) for key in ("model", "ema")}
    if ours:
        return {**WITHOUT_RUN, **contents, **weights, "config": _config(contents.get("config"), path)}
    if not published.is_published(weights["model"]):
        raise InputError(f"{path}: is a checkpoint of neither this nor the published implementation.")
    return {
        "config": None,
        "step": contents.get("step"),
        **{key: published.translate_weights(state) for key, state in weights.items()},
        "published_model": weights["model"],
        "optimizer": contents.get("opt"),
        "scaler": contents.get("scaler"),
    }


def check_path(path: PathLike) -> Path:
    """The path of a file that exists. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, not a checkpoint file" if path.is_dir() else "there is no such file"
        raise InputError(f"{path}: {problem}.")
    return path


def _config(data: Any, path: Path) -> Config:
    """The config in a file, JSON data or text."""
    try:
        data = parse(data) if isinstance(data, str) else data
        if isinstance(data, dict) and isinstance(data.get("trainer"), dict):
            # Earlier versions took an empty name for the working folder.
            folders = {key: "." for key in ("train_dataset_dir", "log_dir") if data["trainer"].get(key) == ""}
            data = {**data, "trainer": {**data["trainer"], **folders}}
        return Config.from_dict(data)
    except InputError as error:
        raise InputError(f"{path}: the configuration in it is not valid: {error}") from None


def _without_wrappers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers leave in names."""
    if not all(isinstance(name, str) and isinstance(values, Tensor) for name, values in state.items()):
        raise InputError(f"{path}: is not a checkpoint; its weights must be named tensors.")
    return {re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", name): values for name, values in state.items()}


def check_same_model(path: PathLike, saved: Config, wanted: Config, *, but: Sequence[str] = ()) -> None:
    """Refuse a config whose `model` or `diffusion` differs from a checkpoint's, because the weights might still fit.

    The keys in `but` may differ.
    """
    for section in ("model", "diffusion"):
        given = dataclasses.asdict(getattr(wanted, section))
        for key, found in dataclasses.asdict(getattr(saved, section)).items():
            if given[key] != found and key not in but:
                raise InputError(
                    f"{path}: was trained with {section}.{key} {found}, but the configuration says {given[key]}."
                )


def load_weights(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict that must fit exactly; `where` names it in the InputError."""
    wanted, found = ({name: tuple(of[name].shape) for name in of} for of in (module.state_dict(), state))
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    shapes = [(name, found[name], shape) for name, shape in wanted.items() if found.get(name, shape) != shape]
    problems += [f"{name} has the shape {got} instead of {shape}" for name, got, shape in shapes]
    if problems:
        more = f", and {len(problems) - 1} more such differences" if len(problems) > 1 else ""
        raise InputError(f"{where}: the weights do not fit the configuration's model: {problems[0]}{more}.")
    module.load_state_dict(state)


def load_diffusion(
    path: PathLike,
    config: Config | PathLike | None = None,
    weights: Literal["ema", "model"] = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> GaussianDiffusion:
    """Load a trained model from one of our checkpoints, a safetensors file or a published checkpoint.

    Only the wanted weights are read; checksums are not verified, see docs/checkpoints.md.

    Args:
        path: the checkpoint.
        config: a `Config` or the path of a config file. A published checkpoint needs it. Ours carry their own; a given
            one must then agree in `model` and `diffusion`.
        weights: "ema" for the averaged weights, "model" for the last ones.
        device: of the model.
        dtype: of the network's weights; None: float32, also for a file in half precision. The diffusion stays float32.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        InputError: the file is missing, damaged, holds code or lacks the weights, or the config does not fit.
    """
    if weights not in ("ema", "model"):
        raise InputError(f'weights is "{weights}"; it must be "ema" or "model".')
    if config is not None and not isinstance(config, Config):
        config = Config.load(config)
    contents = read(path)
    if weights not in contents:
        held = "model" if weights == "ema" else "ema"
        raise InputError(f'{path}: holds the weights "{held}" alone; weights is "{weights}", but must be "{held}".')
    saved = contents["config"]
    if config is None and saved is None:
        raise InputError(f"{path}: is a published checkpoint, which carries no configuration; give its config file.")
    if config is not None and saved is not None:
        check_same_model(path, saved, config)
    diffusion = GaussianDiffusion.from_config(config or saved)
    load_weights(diffusion.unet, contents[weights], f"{path} ({weights})")
    diffusion.unet.to(device=device, dtype=dtype)
    return diffusion.to(device).eval().requires_grad_(False)
