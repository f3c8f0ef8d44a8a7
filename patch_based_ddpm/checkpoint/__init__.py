"""Checkpoints: written whole or not at all, read without running code from the file.

A checkpoint is a dict of `format`, `config` (JSON data), `step`, `model` and `ema` (state dicts of the UNet),
`optimizer`, `scaler`, `skipped_steps`, `bad_images` and `window`, see `run_state.py`. Those of the published
implementation hold no config and use other names; `published.py` translates them. A safetensors file holds `config` and
one of `model` and `ema` alone, see `safetensors_file.py`.
"""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patch_based_ddpm.checkpoint import published, safetensors_file
from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import DamagedCheckpoint, InputError
from patch_based_ddpm.files import atomic_write
from patch_based_ddpm.model.diffusion import GaussianDiffusion

FORMAT = "patch_based_ddpm 1"
WITHOUT_RUN = {"step": None, "optimizer": None, "scaler": None}  # of a checkpoint that no run can go on from
PathLike = str | os.PathLike[str]


def save(path: PathLike, contents: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all, see `atomic_write`.

    Args:
        path: the file; its folder exists.
        contents: as above, without `format`.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(Path(path)) as file:
        try:
            torch.save({"format": FORMAT, **contents}, file)
        except RuntimeError as error:
            # torch tries to end the archive even so, and what went wrong with that hides the reason.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read(path: PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, ours, a safetensors file or a published one, with our names in any case.

    The checksums (CRC-32) of one of ours are verified: torch writes them, but does not look at them.

    Prefixes that wrappers leave in names (`module.`, `_orig_mod.`) are taken off.

    Args:
        path: the file.

    Returns:
        The contents, and `published`, whether it is such a one. Ours hold `config` as a `Config`. A published one holds
        none, and its `optimizer` is still in its own layout, see `published.translate_optimizer`. A safetensors
        file lacks `model` or `ema`, and its `step` and `optimizer` are None.

    Raises:
        DamagedCheckpoint: it cannot be read, or is damaged.
        InputError: there is no such file, it holds code, or it is no checkpoint.
    """
    path = check_path(path)
    try:
        with open(path, "rb") as file:
            if safetensors_file.is_safetensors(file):
                return {**WITHOUT_RUN, **safetensors_file.read(path), "published": False}
            contents = torch.load(file, map_location="cpu", weights_only=True)  # of a path, it would heed the suffix
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # followed by a class or function that is none of torch's own for weights
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            code = f" ({named[1]})" if named else ""
            raise InputError(f"{path}: refused, because it holds code{code} and not only weights.") from None
        raise DamagedCheckpoint(f"{path}: is damaged or not a checkpoint.") from None
    except InputError:
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror or error}.") from None
    except Exception as error:
        # What torch and safetensors raise on a damaged file is not documented: RuntimeError, EOFError, KeyError...
        raise DamagedCheckpoint(f"{path}: is damaged or not a checkpoint ({type(error).__name__}).") from None
    if not isinstance(contents, dict) or not all(isinstance(contents.get(key), dict) for key in ("model", "ema")):
        raise InputError(f"{path}: is not a checkpoint; it must hold the weights `model` and `ema`.")
    weights = {key: _without_wrappers(contents[key], path) for key in ("model", "ema")}
    if contents.get("format") == FORMAT:
        _verify(path)
        return {
            **WITHOUT_RUN,
            **contents,
            **weights,
            "config": _config(contents, path),
            "published": False,
        }
    if not published.is_published(weights["model"]):
        raise InputError(f"{path}: is a checkpoint of neither this nor the published implementation.")
    return {
        "step": contents.get("step"),
        "model": published.translate_weights(weights["model"]),
        "ema": published.translate_weights(weights["ema"]),
        "published_model": weights["model"],
        "optimizer": contents.get("opt"),
        "scaler": contents.get("scaler"),
        "published": True,
    }


def check_path(path: PathLike) -> Path:
    """The path of a file that is there.

    Raises:
        InputError: it is not.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: {'is a folder, not a checkpoint file' if path.is_dir() else 'there is no such file'}."
        )
    return path


def _verify(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile, too, raises whatever damaged headers lead it to
        raise DamagedCheckpoint(f"{path}: is damaged ({type(error).__name__}).") from None
    if damaged is not None:
        raise DamagedCheckpoint(f"{path}: is damaged; the checksum of {damaged!r} in it is not that of its bytes.")


def _config(contents: dict[str, Any], path: Path) -> Config:
    try:
        return Config.from_dict(contents.get("config"))
    except InputError as error:
        raise InputError(f"{path}: the configuration in it is not valid: {error}") from None


def _without_wrappers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if not all(isinstance(name, str) and isinstance(values, Tensor) for name, values in state.items()):
        raise InputError(f"{path}: is not a checkpoint; its weights must be named tensors.")
    return {re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", name): values for name, values in state.items()}


def load_weights(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict that must fit exactly.

    Args:
        module: the UNet.
        state: the weights, under our names.
        where: what is being loaded, for messages.

    Raises:
        InputError: a key is missing or unknown, or a shape differs.
    """
    wanted = module.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in wanted]
    problems += [
        f"{name} has the shape {tuple(state[name].shape)} instead of {tuple(values.shape)}"
        for name, values in wanted.items()
        if name in state and state[name].shape != values.shape
    ]
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
    """Load a trained model, from one of our checkpoints, from a safetensors file or from a published checkpoint.

    Args:
        path: the checkpoint.
        config: a `Config` or the path of a config file; a published checkpoint needs it, ours carry their own.
        weights: "ema" for the averaged weights, "model" for the last ones.
        device: where it goes.
        dtype: of the network's weights; None: float32, whatever the file holds. The diffusion itself stays float32.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        InputError: the file is missing, damaged, holds code, or does not fit the config; or there are no such weights.
    """
    if weights not in ("ema", "model"):
        raise InputError(f'weights is "{weights}"; it must be "ema" or "model".')
    if config is not None and not isinstance(config, Config):
        config = Config.load(config)
    contents = read(path)
    if weights not in contents:
        held = "model" if weights == "ema" else "ema"
        raise InputError(f'{path}: holds the weights "{held}" alone; weights is "{weights}", but must be "{held}".')
    if config is None:
        if contents["published"]:
            raise InputError(
                f"{path}: is a published checkpoint, which carries no configuration; give its config file too."
            )
        config = contents["config"]
    diffusion = GaussianDiffusion.from_config(config)
    load_weights(diffusion.unet, contents[weights], f"{path} ({weights})")
    diffusion.to(device)
    if dtype is not None:
        diffusion.unet.to(dtype)
    return diffusion.eval().requires_grad_(False)


if __name__ == "__main__":
    from patch_based_ddpm import command_line
    from patch_based_ddpm.checkpoint import __main__ as export  # they import this module

    command_line.run(export.main)
