"""Measures memory and time of training steps and sampling steps, of our network and of baselines.

Shapes: `b` images, `c` channels, `H W` image, `N` patches a side.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint, samplers
from patch_based_ddpm.benchmarking.baseline_unet import BaselineUNet
from patch_based_ddpm.command_line import DTYPES, compile_options
from patch_based_ddpm.config import Config
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.model.patch_batching import PatchBatching
from patch_based_ddpm.model.unet import UNet
from patch_based_ddpm.planning.live_memory import LiveMemory, peak_memory, reset_peak_memory

NETWORKS = {"baseline": BaselineUNet, "ours": UNet.from_config}
WARM_UP, WARM_UP_COMPILED = 1, 3  # rounds that do not count; CUDA graphs are recorded in the second one


@dataclass(frozen=True)
class Setting:
    """One way to run a model.

    Attributes:
        network: "baseline" or "ours".
        patch_divider: N.
        patches: per pass, in [1, N*N*b].
        dtype: "float32", or "bf16": in sampling of weights and features, in training of the features (autocast).
    """

    network: str
    patch_divider: int
    patches: int
    dtype: str


def settings(
    patch_dividers: Iterable[int], patch_batch_sizes: Sequence[int | None], dtypes: Sequence[str], images: int
) -> list[Setting]:
    """The baselines (on whole images, and for each N on all patches at once) and our network in every combination."""
    chosen = [Setting("baseline", 1, images, "float32")]
    for divider in patch_dividers:
        total = divider**2 * images
        chosen.append(Setting("baseline", divider, total, "float32"))
        for size in patch_batch_sizes:
            chosen += [Setting("ours", divider, min(size or total, total), dtype) for dtype in dtypes]
    return list(dict.fromkeys(chosen))


Model = tuple[GaussianDiffusion, torch.optim.Optimizer | None]  # the optimizer in training


class _FixedPatchBatching(PatchBatching):
    """Keeps the size of passes when memory runs out: smaller ones are another setting."""

    def shrink(self, size: int) -> None:
        raise torch.OutOfMemoryError


def sampling_step(diffusion: GaussianDiffusion, _optimizer: None, setting: Setting, images: int) -> None:
    """Draw b images by the first step of ancestral sampling."""
    with torch.inference_mode():
        x_T = torch.randn(images, *diffusion.image_shape, device=diffusion.alpha_bar.device)  # (b, c, H, W)
        # Of two steps the first, as the last one draws no noise.
        options = {"noise": lambda: torch.randn_like(x_T), "steps": 2, "progress": lambda timesteps: timesteps[:1]}
        samplers.ddpm(diffusion, x_T, patch_batch_size=setting.patches, **options)


def training_step(
    diffusion: GaussianDiffusion, optimizer: torch.optim.Optimizer, setting: Setting, images: int
) -> None:
    """Train on b random images by one optimizer step."""
    x_0 = torch.randn(images, *diffusion.image_shape, device=diffusion.alpha_bar.device)  # (b, c, H, W)
    t = torch.randint(diffusion.timesteps, (images,), device=x_0.device)
    autocast = torch.autocast(x_0.device.type, torch.bfloat16, enabled=setting.dtype == "bf16")
    list(diffusion.accumulate_gradient(x_0, t, torch.randn_like(x_0), setting.patches, autocast=autocast))
    optimizer.step()
    optimizer.zero_grad()


STEPS = {"sampling": sampling_step, "training": training_step}


@dataclass(frozen=True)
class Benchmark:
    """Measures settings of one model.

    Attributes:
        kind: "sampling" or "training".
        configs: the configuration for each N.
        images: b.
        device: of the model.
        compiled: whether `seconds` compiles our network; `memory` cannot see the tensors inside compiled code.
    """

    kind: str
    configs: dict[int, Config]
    images: int
    device: torch.device
    compiled: bool

    def memory(self, setting: Setting) -> dict[str, int] | None:
        """The peak of a setting's second step; in the first one the optimizer creates its state.

        Returns:
            In bytes: the fields of `live_memory.Peak`, and `device`, see `live_memory.peak_memory`; on a GPU that of
            this step alone. None where the device runs out of memory.
        """
        gc.collect()  # frees the model before
        with contextlib.suppress(torch.OutOfMemoryError):
            model = self._model(setting.network, setting.patch_divider, self._weights(setting))
            STEPS[self.kind](*model, setting, self.images)
            reset_peak_memory(self.device)
            with LiveMemory(*model) as live:
                STEPS[self.kind](*model, setting, self.images)
            return asdict(live.peak()) | {"device": peak_memory(self.device)}
        return None

    def seconds(self, chosen: Sequence[Setting], repeats: int) -> dict[Setting, list[float]]:
        """Time one step of each setting per round; interleaved, so that machine load affects all settings alike.

        Args:
            chosen: the settings.
            repeats: rounds that count, after those that warm up.

        Returns:
            The seconds of each setting in each round, without settings that do not fit into memory beside the others.
        """
        models, shared = {}, functools.cache(self._model)
        for setting in chosen:
            with contextlib.suppress(torch.OutOfMemoryError):
                model = shared(setting.network, setting.patch_divider, self._weights(setting))
                models[setting] = self._compile(*model) if self.compiled and setting.network == "ours" else model
        seconds = {setting: [] for setting in models}
        warm_up = WARM_UP_COMPILED if self.compiled else WARM_UP
        for number in tqdm(range(warm_up + repeats), desc=self.kind, dynamic_ncols=True):
            for setting in list(seconds):
                start = self._now()
                try:
                    STEPS[self.kind](*models[setting], setting, self.images)
                except torch.OutOfMemoryError:
                    del models[setting], seconds[setting]
                    continue
                if number >= warm_up:
                    seconds[setting].append(self._now() - start)
        return seconds

    def _weights(self, setting: Setting) -> torch.dtype:
        return DTYPES[setting.dtype] if self.kind == "sampling" else torch.float32

    def _model(self, network: str, patch_divider: int, weights: torch.dtype) -> Model:
        config, trained = self.configs[patch_divider], self.kind == "training"
        unet = NETWORKS[network](config.model).to(self.device, weights).requires_grad_(trained)
        optimizer = torch.optim.Adam(unet.parameters(), lr=config.trainer.train_lr, fused=True) if trained else None
        return self._diffusion(unet, config), optimizer

    def _compile(self, diffusion: GaussianDiffusion, optimizer: torch.optim.Optimizer | None) -> Model:
        """The same weights, compiled for one setting as `sample` and `train` do."""
        options = compile_options(self.device, sampling=self.kind == "sampling")
        unet = torch.compile(diffusion.unet, fullgraph=True, **options)
        return self._diffusion(unet, diffusion.config, padded=True), optimizer

    def _diffusion(self, unet: nn.Module, config: Config, *, padded: bool = False) -> GaussianDiffusion:
        diffusion = GaussianDiffusion(unet, config).to(self.device)
        diffusion.patch_batching = _FixedPatchBatching(padded=padded)
        return diffusion

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def checkpoint_loading(config: Config, folder: Path) -> dict[str, int]:
    """Write a checkpoint as large as those of training into a folder, and load it to sample from it.

    Returns:
        In bytes: `file`, its size, and `peak`, the peak host memory of loading above that of the imports.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "model.pt"
        _in_new_process(_write_checkpoint, config, path)
        return {"file": path.stat().st_size, "peak": _in_new_process(_peak_of_loading, path)}


def _in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function by itself, as the peak memory of a process never falls."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _write_checkpoint(config: Config, path: Path) -> None:
    weights = UNet.from_config(config.model).state_dict()
    copies = [{name: values.clone() for name, values in weights.items()} for _ in range(3)]
    moments = dict(zip(("exp_avg", "exp_avg_sq"), copies[1:]))
    contents = {"config": config.to_dict(), "step": 0, "model": weights, "ema": copies[0], "optimizer": moments}
    checkpoint.save(path, contents)


def _peak_of_loading(path: Path) -> int:
    host = torch.device("cpu")
    before = peak_memory(host)
    checkpoint.load_diffusion(path)
    return peak_memory(host) - before


def loading_speed(batches: Iterator[Tensor], repeats: int, batches_per_repeat: int) -> list[float]:
    """Images per second of a stream of batches (b, c, H, W), in each repeat; one more repeat before them warms up."""
    speeds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        images = sum(len(next(batches)) for _ in range(batches_per_repeat))
        speeds.append(images / (time.perf_counter() - start))
    return speeds[1:]
