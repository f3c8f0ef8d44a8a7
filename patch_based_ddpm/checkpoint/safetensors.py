"""One set of weights with its config in a safetensors file: to pass on, or for other programs to read.

The tensors are the UNet's state dict. The metadata holds `format`; `config`, the whole configuration as JSON; and
`weights`, "ema" or "model". The format has no checksum.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import atomic_write

FORMAT = "patch_based_ddpm weights 1"


def is_safetensors(start: bytes) -> bool:
    """Whether a file whose first bytes these are holds safetensors: eight bytes of length, then JSON."""
    return start[8:9] == b"{"


def write(path: Path, config: Config, weights: str, state: dict[str, Tensor]) -> None:
    """Write the UNet's state dict, of the `weights` "ema" or "model", whole or not at all, see `atomic_write`."""
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict()), "weights": weights}
    data = save({name: values.contiguous() for name, values in state.items()}, metadata)  # channels last is refused
    with atomic_write(path) as file:
        file.write(data)


def read(path: Path) -> dict[str, Any]:
    """Read a safetensors file of ours onto the CPU.

    Returns:
        `config`, as JSON text, and under "ema" or "model" the state dict, in the dtype in which it is stored.

    Raises:
        InputError: it is not one of ours.
        Exception: it cannot be read or is damaged; safetensors does not document its exceptions.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        ours = metadata.get("format") == FORMAT and metadata.get("weights") in ("ema", "model") and "config" in metadata
        if not ours:
            raise InputError(
                f"{path}: is a safetensors file that patch_based_ddpm.checkpoint export has not written; its metadata "
                f'must hold "config", as "format" {json.dumps(FORMAT)}, and as "weights" "ema" or "model".'
            )
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    return {"config": metadata["config"], metadata["weights"]: state}
