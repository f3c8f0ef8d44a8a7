"""One set of weights with its config in a safetensors file: to pass on, or for other programs to read.

The file's metadata holds `format`; `config`, the whole configuration as JSON; `weights`, "ema" or "model"; and `sha256`
over all these and the tensors, because the format itself has no checksum. The tensors are the UNet's state dict.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from patch_based_ddpm import strict_json
from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import DamagedCheckpoint, InputError
from patch_based_ddpm.files import atomic_write

FORMAT = "patch_based_ddpm weights 1"
DESCRIPTION = ("format", "config", "weights")
HEADER_START = 8  # bytes, in which its length is; the header is JSON


def is_safetensors(file: BinaryIO) -> bool:
    """Whether a file, at whose beginning it is left, holds safetensors by its content; a name may say anything."""
    start = file.read(HEADER_START + 1)
    file.seek(0)
    return start[HEADER_START:] == b"{"


def write(path: Path, config: Config, weights: str, state: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all, see `atomic_write`.

    Args:
        path: the file; its folder exists.
        config: of the model.
        weights: "ema" or "model", what the state is.
        state: of the UNet, on the CPU, in the dtype in which it is to be stored.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict()), "weights": weights}
    state = {name: values.contiguous() for name, values in state.items()}  # the UNet's convolutions are channels last
    data = save(state, {**metadata, "sha256": _sha256(metadata, state)})
    with atomic_write(path) as file:
        file.write(data)


def read(path: Path) -> dict[str, Any]:
    """Read a safetensors file of ours onto the CPU, and verify its checksum.

    Args:
        path: the file.

    Returns:
        `config`, a `Config`, and under "ema" or "model" the state dict, in the dtype in which it is stored.

    Raises:
        DamagedCheckpoint: the checksum tells that it is damaged.
        InputError: it is not one of ours, or its config is not valid.
        Exception: it cannot be read, or is so damaged that safetensors or torch stumbles over it.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        _check_ours(metadata, path)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    if _sha256(metadata, state) != metadata["sha256"]:
        raise DamagedCheckpoint(f"{path}: is damaged; the checksum in it is not that of its contents.")
    try:
        config = Config.from_dict(strict_json.parse(metadata["config"]))
    except InputError as error:
        raise InputError(f"{path}: the configuration in it is not valid: {error}") from None
    return {"config": config, metadata["weights"]: state}


def _check_ours(metadata: dict[str, str], path: Path) -> None:
    lacking = [key for key in (*DESCRIPTION, "sha256") if key not in metadata]
    if lacking:
        raise InputError(
            f"{path}: is a safetensors file without our configuration; its metadata lacks {', '.join(lacking)}, which "
            "patch_based_ddpm.checkpoint export writes."
        )
    for key, known in (("format", (FORMAT,)), ("weights", ("ema", "model"))):
        if metadata[key] not in known:
            raise InputError(
                f"{path}: {key} in its metadata is {json.dumps(metadata[key])}; it must be "
                f"{' or '.join(map(json.dumps, known))}."
            )


def _sha256(metadata: dict[str, str], state: dict[str, Tensor]) -> str:
    """Over meaning, not bytes: the library orders metadata at random, and other tools may write a file anew."""
    digest = hashlib.sha256(json.dumps([metadata[key] for key in DESCRIPTION]).encode())
    for name, values in sorted(state.items()):
        digest.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
