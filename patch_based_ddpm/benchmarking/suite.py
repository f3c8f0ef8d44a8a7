"""The suite: correctness, speed, memory and a profile of one network on one device, measured in resumable pieces.

Each piece takes minutes at most and writes a JSON file. A later call measures the missing ones, so the suite can be
spread over short loans of a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from patch_based_ddpm import samplers
from patch_based_ddpm.benchmarking.variants import VARIANTS, Variant
from patch_based_ddpm.command_line import DTYPES, compile_options, start_accelerator
from patch_based_ddpm.config import Config, TrainerConfig
from patch_based_ddpm.data.sources import BUILTIN_FACES, FacesSource
from patch_based_ddpm.files import write_json
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.planning import planner
from patch_based_ddpm.planning.live_memory import MIB, peak_memory, reset_peak_memory
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.trainer import Trainer

REPEATS = 10  # timed steps
DRAW_STEPS = 10  # of DPM-Solver++
LOSS_STEPS = 500  # over which losses of float32, bf16 and fp16 are compared
LOOP_STEPS = 60  # of the training loop, the first half to warm up
FACES = 1024  # drawn images in the data of those two
KERNELS = {  # kinds of kernels by parts of their names; the first match counts
    "convolutions, matrix products": ("conv", "gemm", "xmma", "cutlass", "wgrad", "dgrad", "mm", "dot"),
    "norms": ("norm", "welford"),
    "copies, layout": ("copy", "nchw", "nhwc", "transpose", "memcpy", "memset", "cat"),
    "optimizer": ("adam", "multi_tensor"),
    "softmax, attention": ("softmax", "attention", "flash"),
}


@dataclass(frozen=True)
class Suite:
    """Measures one network.

    Attributes:
        config: of the network; N is `model.patch_divider`.
        images: per training step; sampling takes twice as many.
        device: a GPU, or a CPU at toy size.
        folder: of the files.
    """

    config: Config
    images: int
    device: torch.device
    folder: Path

    def run(self, minutes: float) -> bool:
        """Measure the missing pieces, none of which starts after `minutes`; returns whether all are there.

        A piece that fails records its error, so that the others get their turn. Delete its file to repeat it.
        """
        end = time.monotonic() + 60 * minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, measure in self.pieces.items():
            path = self.folder / f"{name}.json"
            if path.exists():
                continue
            if time.monotonic() >= end:
                return False
            print(f"measuring {name}", flush=True)
            torch.manual_seed(0)
            torch.compiler.reset()
            gc.collect()  # frees the model before
            start = time.monotonic()
            try:
                figures = measure()
            except Exception as error:
                figures = {"error": f"{type(error).__name__}: {error}"}
            write_json(path, {**figures, "minutes": (time.monotonic() - start) / 60})
        return True

    @cached_property
    def pieces(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """The function of each piece, the most important ones first."""
        N = self.config.model.patch_divider
        all_patches = N * N * self.images
        few = [patches for patches in (64, 8) if patches < all_patches]
        pieces = {"ceilings": self.ceilings, "resume": self.resume, "synchronisation": self.synchronisation}
        first, *others = (name for name in VARIANTS if name != "baseline")
        for name in (first, "baseline", *others):
            if VARIANTS[name].network == "ours":
                pieces[f"gradient-{name}"] = partial(self.gradient, VARIANTS[name])
            pieces[f"training-{name}"] = partial(self.training, VARIANTS[name], N, all_patches)
        pieces["gradient-1-patch"] = partial(self.gradient, Variant(), patches=1)
        for name in (first, "bf16-cuda-graphs"):
            for patches in few:
                pieces[f"training-{name}-{patches}-patches"] = partial(self.training, VARIANTS[name], N, patches)
        pieces |= {
            "drawing-bf16-compiled": partial(self.drawing, 2 * self.images, None, compiled=True),
            "drawing-bf16": partial(self.drawing, 2 * self.images, None, compiled=False),
            "drawing-1-patch-compiled": partial(self.drawing, 1, 1, compiled=True),
            "drawing-1-patch": partial(self.drawing, 1, 1, compiled=False),
            "profile": self.profile,
            "loop": self.loop,
        }
        for other in sorted({1, 2, 4, 8} - {N}):
            with contextlib.suppress(ValueError):  # the image size does not allow this N
                self._config(other)
                pieces[f"training-{first}-N{other}"] = partial(
                    self.training, VARIANTS[first], other, other**2 * self.images
                )
        losses = {"float32": ("no", 0), "float32-other-seed": ("no", 1), "bf16": ("bf16", 0), "fp16": ("fp16", 0)}
        if self.device.type == "cpu":
            del losses["fp16"]
        return pieces | {f"loss-{name}": partial(self.loss, *how) for name, how in losses.items()}

    def ceilings(self) -> dict[str, float]:
        """What the device reaches at most: bf16 matrix products, in FLOP/s, and copies, in bytes/s read and written."""
        side, length = (8192, 2**30) if self.device.type == "cuda" else (256, 2**20)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.randint(256, (length,), device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return {
            "bf16_flop_per_second": 2 * side**3 / statistics.median(self._time(lambda: a @ b)),
            "copied_bytes_per_second": 2 * length / statistics.median(self._time(lambda: target.copy_(source))),
        }

    def gradient(self, variant: Variant, patches: int | None = None) -> dict[str, float]:
        """Loss and gradient of two images against float32 on the CPU, eager, all patches in a pass.

        Returns:
            Relative errors ||a - b|| / ||b||: of the loss, of the whole gradient, and the largest of a parameter whose
            gradient has at least 1/1000 of the norm of the whole.
        """
        reference = self._gradient(Variant(), torch.device("cpu"))
        found = self._gradient(variant, self.device, patches)
        total = torch.cat([values.flatten() for values in reference[1].values()])
        errors = {name: _error(found[1][name], values) for name, values in reference[1].items()}
        large = [name for name, values in reference[1].items() if values.norm() >= total.norm() / 1000]
        return {
            "loss": _error(found[0], reference[0]),
            "gradient": _error(torch.cat([values.flatten() for values in found[1].values()]), total),
            "worst_parameter": max(errors[name] for name in large),
        }

    def _gradient(
        self, variant: Variant, device: torch.device, patches: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        diffusion, _ = variant.build(self.config, device)
        generator = torch.Generator().manual_seed(0)
        x_0, noise = (torch.randn(2, *diffusion.image_shape, generator=generator).to(device) for _ in range(2))
        t = torch.randint(diffusion.timesteps, (2,), generator=generator).to(device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=variant.bf16)
        with variant.precision():
            losses = torch.cat(list(diffusion.accumulate_gradient(x_0, t, noise, patches, autocast=autocast)))
        gradients = {name: parameter.grad.double().cpu() for name, parameter in diffusion.named_parameters()}
        return losses.double().mean().cpu(), gradients

    def resume(self) -> dict[str, Any]:
        """Four bf16 training steps against two, a checkpoint, and two more: how far their weights are apart."""
        whole = self._trainer("whole", steps=4)
        whole.train()
        half = self._trainer("resumed", steps=2)
        half.train()
        resumed = self._trainer("resumed", steps=4)
        resumed.resume(resumed.folder.checkpoint(2))
        resumed.train()
        pairs = zip(whole.unet.parameters(), resumed.unet.parameters(), strict=True)
        difference = max((a - b).abs().max().item() for a, b in pairs)
        return {"equal": difference == 0, "largest_difference": difference}

    def synchronisation(self) -> dict[str, Any]:
        """Training steps under PyTorch's check that the host waits for the GPU nowhere."""
        if self.device.type != "cuda":
            return {"free_of_waits": None}
        trainer = self._trainer("synchronisation", steps=4)
        batch = torch.zeros(self.images, *trainer.ema_diffusion.image_shape).pin_memory()
        trainer.training_step(0, [batch])
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.metrics.add(trainer.training_step(1, [batch]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"free_of_waits": True}

    def _trainer(self, name: str, steps: int) -> Trainer:
        folder = RunFolder(self.folder / "runs" / name)
        given = {"train_dataset_dir": BUILTIN_FACES, "save_and_sample_every": 2, "num_workers": 0}
        config = replace(self.config, trainer=self._trainer_section(folder, steps, given))
        folder.create()
        accelerator = start_accelerator(cpu=self.device.type == "cpu", mixed_precision="bf16")
        return Trainer(config, accelerator, FacesSource(*config.model.image_shape, config.trainer.seed), folder)

    def _trainer_section(self, folder: RunFolder, steps: int, given: dict[str, Any]) -> TrainerConfig:
        run = {"log_dir": str(folder.root), "train_num_steps": steps, "train_batch_size": self.images}
        return replace(self.config.trainer, **run, preview_count=0, wandb_enabled=False, **given)

    def training(self, variant: Variant, N: int, patches: int) -> dict[str, Any]:
        """Time, arithmetic and memory of an optimizer step, beside the planned memory."""
        config = self._config(N)
        with variant.precision():
            step = self._step(variant, config, patches)
            step()  # compiles, and creates the moments
            reset_peak_memory(self.device)
            seconds = self._time(step)
        plan = planner.training_peak(
            config, batch_size=self.images, patch_batch_size=patches, precision="bf16" if variant.bf16 else "no"
        )
        return {
            **self._rates(self.images, 3 * planner.prediction_flops(config.model), seconds),
            "device_peak": peak_memory(self.device),
            "planned_peak": plan.total - plan.weights // 2,  # no weights are averaged here
        }

    def _step(self, variant: Variant, config: Config, patches: int) -> Callable[[], None]:
        """A function that trains a model by an optimizer step on random images."""
        diffusion, adam = variant.build(config, self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=variant.bf16)

        def step() -> None:
            x_0 = torch.randn(self.images, *diffusion.image_shape, device=self.device)
            t = torch.randint(diffusion.timesteps, (self.images,), device=self.device)
            list(diffusion.accumulate_gradient(x_0, t, torch.randn_like(x_0), patches, autocast=autocast))
            adam.step()
            adam.zero_grad(set_to_none=not variant.keeps_gradients)

        return step

    def loop(self) -> dict[str, Any]:
        """Images per second of the `train` command in bf16, compiled, with cached images, after it warmed up."""
        given = {"mixed_precision": "bf16", "compile": self.device.type == "cuda", "log_every": LOOP_STEPS // 2}
        last = self._train("loop", LOOP_STEPS, given)[-1]
        return {"loop_images_per_second": last["images_per_second"], "peak_memory_mib": last["peak_memory_mib"]}

    def loss(self, precision: str, seed: int) -> dict[str, Any]:
        """Training loss of the `train` command, the mean of each tenth of a short run."""
        given = {"mixed_precision": precision, "log_every": LOSS_STEPS // 10, "seed": seed}
        metrics = self._train(f"loss-{precision}-{seed}", LOSS_STEPS, given)
        return {"losses": [line["loss"] for line in metrics]}

    def _train(self, name: str, steps: int, given: dict[str, Any]) -> list[dict[str, Any]]:
        """Train on a folder of drawn faces, in a process of its own; returns the lines of metrics.jsonl."""
        faces, folder = self.folder / "runs" / "faces", RunFolder(self.folder / "runs" / name)
        if not faces.exists():
            faces.mkdir(parents=True)
            source = FacesSource(*self.config.model.image_shape, seed=0)
            for index in range(FACES):
                source.read(index).save(faces / f"{index}.png")
        given |= {"train_dataset_dir": str(faces), "cache_images": True, "save_and_sample_every": steps}
        trainer = self._trainer_section(folder, steps, given)
        shutil.rmtree(folder.root, ignore_errors=True)
        folder.create()
        replace(self.config, trainer=trainer).save(folder.config)
        environment = {**os.environ, "ACCELERATE_USE_CPU": str(self.device.type == "cpu").lower()}
        command = [sys.executable, "-m", "patch_based_ddpm.train", "--config", str(folder.config)]
        subprocess.run(command, check=True, env=environment)
        return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]

    def drawing(self, images: int, patches: int | None, *, compiled: bool) -> dict[str, Any]:
        """Time, arithmetic and memory of drawing images with DPM-Solver++ in bf16, beside the planned memory."""
        N = self.config.model.patch_divider
        diffusion = GaussianDiffusion.from_config(self.config).to(self.device).eval().requires_grad_(False)
        diffusion.unet.to(DTYPES["bf16"])
        if compiled:
            diffusion.unet.compile(**compile_options(self.device, sampling=True))
            diffusion.patch_batching.padded = True
        sampler = samplers.SamplerConfig(name="dpm-solver++", steps=min(DRAW_STEPS, diffusion.timesteps))
        draw = partial(samplers.draw, diffusion, range(images), sampler=sampler, patch_batch_size=patches)
        reset_peak_memory(self.device)
        with torch.inference_mode():
            seconds = self._time(draw, repeats=3)
        options = {"batch_size": images, "patch_batch_size": patches, "dtype": DTYPES["bf16"], "sampler": sampler}
        return {
            **self._rates(images, sampler.steps * planner.prediction_flops(self._config(N).model), seconds),
            "device_peak": peak_memory(self.device),
            "planned_peak": planner.sampling_peak(self.config, **options).total,
        }

    def profile(self) -> dict[str, Any]:
        """Shares of a compiled bf16 training step's time: of each kind of kernel, and of the longest kernels."""
        cuda = self.device.type == "cuda"
        variant = VARIANTS["bf16-compiled" if cuda else "bf16"]
        step = self._step(variant, self.config, self.config.model.patch_divider**2 * self.images)
        for _ in range(3):
            step()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            step()
            self._wait()
        time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
        times = {event.key: getattr(event, time_of) for event in profiler.key_averages()}
        total = sum(times.values())
        shares = dict.fromkeys([*KERNELS, "others"], 0.0)
        for name, spent in times.items():
            matches = (kind for kind, parts in KERNELS.items() if any(part in name.lower() for part in parts))
            shares[next(matches, "others")] += spent / total
        longest = sorted(times, key=times.get, reverse=True)[:15]
        return {"shares": shares, "longest": {name: times[name] / total for name in longest}}

    def _config(self, N: int) -> Config:
        return replace(self.config, model=self.config.model.divided(N))

    def _rates(self, images: int, flops: float, seconds: list[float]) -> dict[str, Any]:
        median = statistics.median(seconds)
        return {
            "images": images,
            "seconds": seconds,
            "images_per_second": images / median,
            "flop_per_second": images * flops / median,
        }

    def _time(self, function: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
        """Seconds of each call, after three calls that warm up."""
        seconds = []
        for _ in range(3 + repeats):
            self._wait()
            start = time.perf_counter()
            function()
            self._wait()
            seconds.append(time.perf_counter() - start)
        return seconds[3:]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def markdown(self) -> str:
        """The figures measured so far, as tables."""
        files = {name: self.folder / f"{name}.json" for name in self.pieces}
        found = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
        peak = found.get("ceilings", {}).get("bf16_flop_per_second", math.nan)
        gradients, rates, others = [], [], []
        for name, figures in found.items():
            if "worst_parameter" in figures:
                gradients.append([name, *(f"{figures[key]:.1e}" for key in ("loss", "gradient", "worst_parameter"))])
            elif "images_per_second" in figures:
                speed, arithmetic = figures["images_per_second"], figures["flop_per_second"]
                memory = [f"{figures[key] / MIB:,.0f}" for key in ("device_peak", "planned_peak")]
                rates.append([name, f"{speed:.4g}", f"{arithmetic / 1e12:.4g}", f"{arithmetic / peak:.1%}", *memory])
            else:
                others.append(f"- {name}: {json.dumps(figures)}")
        return "\n".join(
            [
                f"{len(found)} of {len(files)} pieces are measured.",
                "",
                *_table(["relative error of", "loss", "gradient", "worst parameter"], gradients),
                "",
                *_table(["", "images/s", "TFLOP/s", "of the bf16 ceiling", "device peak, MiB", "planned, MiB"], rates),
                "",
                *others,
            ]
        )


def _error(found: Tensor, reference: Tensor) -> float:
    return ((found - reference).norm() / reference.norm()).item()


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
