"""What the benchmark measures: memory and time of a training step and of a denoising pass, beside plain networks.

Shapes: `b` images, `c` channels, `H W` image, `N` patches a side.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from patch_based_ddpm.benchmarking.baseline_unet import PlainUNet
from patch_based_ddpm.command_line import compile_mode
from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import OnePatchTooMany
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.model.patch_batching import PatchBatching
from patch_based_ddpm.model.unet import UNet
from patch_based_ddpm.planning.live_memory import LiveMemory, peak_memory

NETWORKS = {"plain": PlainUNet, "lean": UNet.from_config}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
WARM_UP, WARM_UP_COMPILED = 1, 3  # rounds that do not count; CUDA graphs are recorded in the second one

Progress = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Setting:
    """One way to run a model.

    Attributes:
        network: "plain", or "lean" for ours.
        patch_divider: N.
        patches: how many share a pass, in [1, N*N*b].
        dtype: of weights and features in sampling, of the features (mixed precision) in training.
    """

    network: str
    patch_divider: int
    patches: int
    dtype: str


def settings(
    patch_dividers: Iterable[int], patch_batch_sizes: Sequence[int | None], dtypes: Sequence[str], images: int
) -> list[Setting]:
    """The baselines, and our network under every combination.

    Args:
        patch_dividers: each N.
        patch_batch_sizes: patches per pass, counted over all images; None: all.
        dtypes: see `Setting`.
        images: b.

    Returns:
        Each once: the plain network on whole images, then for each N the plain network on all patches at once and ours.
    """
    chosen = [Setting("plain", 1, images, "float32")]
    for divider in patch_dividers:
        total = divider**2 * images
        chosen.append(Setting("plain", divider, total, "float32"))
        for size in patch_batch_sizes:
            chosen += [Setting("lean", divider, min(size or total, total), dtype) for dtype in dtypes]
    return list(dict.fromkeys(chosen))


@dataclass(frozen=True)
class Model:
    """A diffusion model and, where it is trained, its optimizer."""

    diffusion: GaussianDiffusion
    optimizer: torch.optim.Optimizer | None


def sampling_step(model: Model, setting: Setting, images: int) -> None:
    """Denoise b random images by one step."""
    diffusion = model.diffusion
    diffusion.patch_batching.limit = None
    with torch.inference_mode(), contextlib.suppress(OnePatchTooMany):
        x_t, t = _noise_and_time(diffusion, images)
        diffusion.p_mean_variance(x_t, t, setting.patches)
        if diffusion.patch_batching.limit is None:
            return
    raise torch.OutOfMemoryError  # if it went on, then with fewer patches, which is another setting


def training_step(model: Model, setting: Setting, images: int) -> None:
    """Train on b random images: the gradient of all patches, then Adam. The gradients are left to the caller."""
    diffusion = model.diffusion
    x_0, t = _noise_and_time(diffusion, images)
    for batch in diffusion.training_batches(x_0, t, torch.randn_like(x_0), setting.patches):
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=setting.dtype == "bf16"):
            losses = diffusion.patch_losses(batch)  # (n,)
        (losses.sum() / (setting.patch_divider**2 * images)).backward()
    model.optimizer.step()


STEPS = {"sampling": sampling_step, "training": training_step}


def _noise_and_time(diffusion: GaussianDiffusion, images: int) -> tuple[Tensor, Tensor]:
    device = diffusion.alpha_bar.device
    x = torch.randn(images, *diffusion.image_shape, device=device)  # (b, c, H, W)
    return x, torch.randint(diffusion.timesteps, (images,), device=device)


@dataclass(frozen=True)
class Bench:
    """Measures settings of one model.

    Attributes:
        configs: the configuration for each N.
        images: b.
        device: where.
        compiled: whether `seconds` compiles our network; `memory` never does, live tensors of compiled code cannot be
            followed.
    """

    configs: dict[int, Config]
    images: int
    device: torch.device
    compiled: bool

    def memory(self, kind: str, setting: Setting) -> dict[str, int] | None:
        """The peak of one step, the second one, so that the optimizer has its moments.

        Args:
            kind: "sampling" or "training".
            setting: what to measure.

        Returns:
            In bytes: the fields of `live_memory.Peak`, and `device`, see `live_memory.peak_memory`; on a GPU that is
            of this step alone. None where the device runs out of memory.
        """
        gc.collect()  # what the model before held
        with contextlib.suppress(torch.OutOfMemoryError):
            model = self._build(kind, setting.network, setting.patch_divider, _weights(kind, setting))
            self._step(kind, model, setting)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            with LiveMemory(model.diffusion, model.optimizer) as meter:
                self._step(kind, model, setting, clear=False)  # the meter recognises gradients when it closes
            return asdict(meter.peak()) | {"device": peak_memory(self.device)}
        return None

    def seconds(
        self, kind: str, chosen: Sequence[Setting], repeats: int, progress: Progress = iter
    ) -> dict[Setting, list[float]]:
        """Time one step of each setting in turn, round after round, so that all see the machine in the same mood.

        Args:
            kind: "sampling" or "training".
            chosen: what to time.
            repeats: rounds that count, after those that warm up.
            progress: wraps the list of rounds, to show how far it is.

        Returns:
            The seconds of each setting in each round. Those that find no room beside the others are not among them.
        """
        build = functools.cache(functools.partial(self._build, kind))
        models, taken = {}, {setting: [] for setting in chosen}
        for setting in chosen:
            with contextlib.suppress(torch.OutOfMemoryError):
                model = build(setting.network, setting.patch_divider, _weights(kind, setting))
                compiled = self.compiled and setting.network == "lean"
                models[setting] = self._compile(kind, model) if compiled else model
        warm_up = WARM_UP_COMPILED if self.compiled else WARM_UP
        for number in progress(range(warm_up + repeats)):
            for setting, model in list(models.items()):
                start = self._now()
                try:
                    self._step(kind, model, setting)
                except torch.OutOfMemoryError:
                    del models[setting]
                    continue
                if number >= warm_up:
                    taken[setting].append(self._now() - start)
        return {setting: taken[setting] for setting in models}

    def _build(self, kind: str, network: str, patch_divider: int, dtype: str) -> Model:
        config = self.configs[patch_divider]
        unet = NETWORKS[network](config.model).to(self.device, DTYPES[dtype])
        optimizer = None
        if kind == "training":
            optimizer = torch.optim.Adam(unet.parameters(), lr=config.trainer.train_lr, fused=True)
        unet.requires_grad_(kind == "training")
        return Model(GaussianDiffusion(unet, config).to(self.device), optimizer)

    def _compile(self, kind: str, model: Model) -> Model:
        """The same weights, compiled for one setting as `sample` and `train` do."""
        mode = compile_mode(self.device) if kind == "sampling" else None
        unet = torch.compile(model.diffusion.unet, fullgraph=True, dynamic=False, isolate_recompiles=True, mode=mode)
        diffusion = GaussianDiffusion(unet, model.diffusion.config).to(self.device)
        diffusion.patch_batching = PatchBatching(padded=True)
        return Model(diffusion, model.optimizer)

    def _step(self, kind: str, model: Model, setting: Setting, clear: bool = True) -> None:
        STEPS[kind](model, setting, self.images)
        if clear and model.optimizer is not None:
            model.optimizer.zero_grad()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _weights(kind: str, setting: Setting) -> str:
    return setting.dtype if kind == "sampling" else "float32"


def loading_speed(batches: Iterator[Tensor], repeats: int, batches_a_repeat: int) -> list[float]:
    """Images per second of a stream of batches (b, c, H, W), in each repeat; as many batches before them warm up."""
    speeds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        images = sum(len(next(batches)) for _ in range(batches_a_repeat))
        speeds.append(images / (time.perf_counter() - start))
    return speeds[1:]
