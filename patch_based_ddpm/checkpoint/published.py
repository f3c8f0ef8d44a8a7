"""Checkpoints of the published implementation: their names and shapes, translated into ours."""

import re
from typing import Any

from torch import Tensor

PREFIX = "denoise_fn."
IDLE = re.compile(r"_patched_decoder\._embedder\.(weight|bias)")  # a layer whose output the network drops

# Applied in order, from the start of a name to its end.
RENAMES = [
    (r"^_patched_encoder\._init_conv\.", "conv_in."),
    (r"^_patched_encoder\._downsLayers\.", "encoder."),
    (r"^_patched_decoder\.ups\.", "decoder."),
    (r"^_patched_decoder\.mid_block(\d)\.", r"middle_\1."),
    (r"^_patched_decoder\.mid_attn\.", "middle_attention."),
    (r"^_patched_decoder\.final_conv\.0\.", "block_out."),
    (r"^_patched_decoder\.final_conv\.1\.", "conv_out."),
    (r"^_embedding\._time_embedding_layer\.1\.", "condition.time."),
    (r"^_embedding\._pos_embedding_layer\.0\.", "condition.position."),
    (r"^_embedding\._mapping\.0\.", "condition.join."),
    (r"^((?:en|de)coder\.\d+)\.0\.", r"\1.block_1."),
    (r"^((?:en|de)coder\.\d+)\.1\.", r"\1.block_2."),
    (r"^((?:en|de)coder\.\d+)\.2\.", r"\1.attention."),
    (r"^((?:en|de)coder\.\d+)\.3\.", r"\1.resample."),
    (r"\.mlp\.1\.", ".modulation."),
    (r"\.block(\d)\.proj\.", r".conv_\1."),
    (r"\.block(\d)\.norm\.", r".norm_\1."),
    (r"\.res_conv\.", ".skip."),
    (r"\.fn\.norm\.g$", ".norm.gain"),
    (r"\.fn\.norm\.b$", ".norm.bias"),
    (r"\.fn\.fn\.to_qkv\.", ".to_qkv."),
    (r"\.fn\.fn\.to_out\.1\.g$", ".norm_out.gain"),
    (r"\.fn\.fn\.to_out\.1\.b$", ".norm_out.bias"),
    (r"\.fn\.fn\.to_out\.(?:0\.)?", ".to_out."),
]


def is_published(state: dict[str, Any]) -> bool:
    """Whether a state dict has the published layout."""
    return any(name.startswith(PREFIX) for name in state)


def translate_name(name: str) -> str:
    """Our name of a published parameter, given without its prefix; an unknown name comes back unchanged."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def translate_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a published state dict, without the prefixes of wrappers, into one of our UNet's.

    The unused layer and the buffers of the schedule are left out. An unknown parameter keeps its name, so that loading
    refuses it.
    """
    names = [name.removeprefix(PREFIX) for name in state if name.startswith(PREFIX)]
    return {translate_name(name): _shape(name, state[PREFIX + name]) for name in names if not IDLE.fullmatch(name)}


def _shape(name: str, values: Tensor) -> Tensor:
    """Gains and biases of the published channel norms are (1, C, 1, 1), ours (C,)."""
    return values.flatten() if re.search(r"\.[gb]$", name) else values


def translate_optimizer(optimizer: dict[str, Any], model: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """Turn the published state of Adam into one for our parameters.

    Args:
        optimizer: published `opt`; its entries are numbered in the order of `model`'s parameters.
        model: the published state dict of the same file, without the prefixes of wrappers.
        names: our parameters' names in the order of our optimizer.
    """
    published = [name.removeprefix(PREFIX) for name in model if name.startswith(PREFIX)]
    entries = {}
    for number, entry in optimizer["state"].items():
        moments = {key: _shape(published[number], entry[key]) for key in ("exp_avg", "exp_avg_sq")}
        entries[translate_name(published[number])] = {**moments, "step": entry["step"]}
    group = {**optimizer["param_groups"][0], "params": list(range(len(names)))}
    return {"state": {i: entries[name] for i, name in enumerate(names) if name in entries}, "param_groups": [group]}
