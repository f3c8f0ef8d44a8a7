"""The training loop with its exponential moving average, logging, checkpoints, previews and resuming.

Everything random is a function of (seed, step, process), so a resumed run continues the uninterrupted one.
"""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from ema_pytorch import EMA
from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint, processes, samplers
from patch_based_ddpm.checkpoint import published
from patch_based_ddpm.command_line import compile_options
from patch_based_ddpm.config import Config
from patch_based_ddpm.data import pictures
from patch_based_ddpm.data.cache import prepare_pixels
from patch_based_ddpm.data.dataset import Pixels, micro_batches
from patch_based_ddpm.data.sources import Source
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.model.patches import inherited_positions
from patch_based_ddpm.model.unet import UNet
from patch_based_ddpm.planning.live_memory import MIB, peak_memory, reset_peak_memory
from patch_based_ddpm.samplers import SamplerConfig
from patch_based_ddpm.signals import SignalHandler, SignalRequest, Stopped, handled_by
from patch_based_ddpm.training.run_folder import RunFolder, report_unwritten
from patch_based_ddpm.training.step import StepResult, TrainingStep
from patch_based_ddpm.training.tracking import Tracker, TrainingMetrics

POSITIONS = "condition.position.weight"  # (d, G*N*N)
MAX_FAILED_SAVES = 3  # in a row


def preview_sampler(config: Config) -> SamplerConfig:
    """The sampler of the previews; `Config`, which imports no sampler, cannot check its options.

    Raises:
        InputError: there is no such sampler, or it does not take these options.
    """
    trainer = config.trainer
    try:
        sampler = SamplerConfig(
            name=trainer.preview_sampler,
            steps=trainer.preview_steps,
            eta=trainer.preview_eta,
            order=trainer.preview_order,
        )
        return sampler.resolve(config.diffusion.timesteps, config.model.grids)
    except InputError as error:
        raise InputError(f"trainer.preview_sampler and its options: {error}") from None


class Trainer:
    """Trains one run, on one process of possibly many."""

    def __init__(self, config: Config, accelerator: Accelerator, source: Source, folder: RunFolder) -> None:
        self.preview_sampler = preview_sampler(config)
        self.config = config
        self.accelerator = accelerator
        self.source = source
        self.folder = folder
        trainer = config.trainer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trainer.seed)
            unet = UNet.from_config(config.model).to(accelerator.device)
        self.ema = EMA(unet, beta=trainer.ema_decay, include_online_model=False)
        self.ema.ema_model.eval().requires_grad_(False)
        adam = torch.optim.Adam(unet.parameters(), lr=trainer.train_lr, fused=True)
        unet.recompute = trainer.recompute_activations
        unet, optimizer = accelerator.prepare(unet, adam)
        diffusion = GaussianDiffusion(unet, config).to(accelerator.device)
        diffusion.patch_batching.padded = trainer.compile  # passes of one shape are compiled once
        self.ema_diffusion = GaussianDiffusion(self.ema.ema_model, config).to(accelerator.device)
        self.training_step = TrainingStep(trainer, accelerator, diffusion, optimizer)
        if trainer.compile:
            self.unet.compile(**compile_options(accelerator.device, sampling=False))
        self.tracker = Tracker(accelerator, config, folder)
        self.signals = SignalHandler(accelerator.is_main_process)
        self.step = 0
        self.metrics = TrainingMetrics()
        self.bad_images: set[int] = set()
        self.failed_saves = 0  # in a row

    @property
    def unet(self) -> UNet:
        """The network in training, without the wrappers of accelerate, which compiles it if the launcher says so."""
        return self.accelerator.unwrap_model(self.training_step.diffusion.unet, keep_torch_compile=False)

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step, over all processes."""
        trainer = self.config.trainer
        return trainer.train_batch_size * trainer.gradient_accumulate_every * self.accelerator.num_processes

    def limit_patch_batch(self, patches: int) -> None:
        """Set an upper limit to the patches in a pass, beside the config's."""
        self.training_step.diffusion.patch_batching.limit = patches
        self.ema_diffusion.patch_batching.limit = patches

    def train(self) -> None:
        """Run the remaining steps.

        Raises:
            InputError: an image cannot be read, the cache cannot be built, too many steps in a row were not finite, or
                too many checkpoints or the last one cannot be written.
            Stopped: a signal asked for it; the step is saved.
        """
        pixels = prepare_pixels(self.config, self.source, self.folder.image_cache)
        self.tracker.start()
        reset_peak_memory(self.accelerator.device)
        try:
            with handled_by(self.signals.receive):
                self._run_steps(pixels)
        finally:
            self.tracker.finish()

    def _run_steps(self, pixels: Pixels) -> None:
        trainer = self.config.trainer
        if self.step > 0 and self._is_milestone and not self.folder.preview(self.step).exists():
            self.preview()  # the run ended between this checkpoint and its preview
        batches = micro_batches(self.config, self.accelerator, pixels, self.step, self._report_bad_images)
        with closing(batches), self._progress(range(self.step, trainer.train_num_steps), "training") as bar:
            for _ in bar:
                result = self.training_step(self.step, islice(batches, trainer.gradient_accumulate_every))
                self.step += 1
                self.metrics.add(result)
                self._update_ema(result)
                if self.step % trainer.log_every == 0 or self.step == trainer.train_num_steps:
                    bar.set_postfix(self.log(result))
                request = self.signals.requested()
                is_last = request is SignalRequest.STOP or self.step == trainer.train_num_steps
                if (self._is_milestone or request) and not self.save() and is_last:
                    raise InputError(f"step {self.step}, the last one, could not be saved.")
                if request is SignalRequest.STOP:
                    raise Stopped(self.signals.cause)
                if self._is_milestone:
                    self.preview()

    @property
    def _is_milestone(self) -> bool:
        """Whether this step gets a checkpoint and a preview."""
        trainer = self.config.trainer
        return self.step % trainer.save_and_sample_every == 0 or self.step == trainer.train_num_steps

    def _report_bad_images(self, skipped: tuple[int, ...]) -> None:
        for index in set(skipped) - self.bad_images:
            self.bad_images.add(index)
            tqdm.write(f"skipped an image that cannot be read: {self.source.name(index)}")

    def _update_ema(self, result: StepResult) -> None:
        """Copy the weights before `step_start_ema`, average them from then on.

        The published rule counts the steps of the run and has no warm-up, as ema-pytorch's own `update` has.
        """
        trainer = self.config.trainer
        if self.step % trainer.update_ema_every != 0 or not result.applied:  # `applied` waits for the device: last
            return
        if self.step < trainer.step_start_ema:
            self.ema.copy_params_from_model_to_ema()
        else:
            self.ema.update_moving_average(self.ema.ema_model, self.ema.model, current_decay=trainer.ema_decay)

    def log(self, last: StepResult) -> dict[str, str]:
        """Collective: report the steps since the last report or resume; returns the figures for the progress bar.

        Raises:
            InputError: too many steps in a row were skipped.
        """
        trainer, interval = self.config.trainer, self.metrics.end_interval()
        if interval.skipped_in_a_row >= trainer.max_skipped_steps:
            raise InputError(
                f"stopped at step {self.step}: {interval.skipped_in_a_row} steps in a row had a non-finite loss "
                f"({last.loss.item()}) or gradient norm ({last.grad_norm.item()}); a lower train_lr, max_grad_norm or "
                "lr_warmup_steps may help."
            )
        patch_losses, bad_images = zip(*processes.gather((interval.patch_loss, self.bad_images)))
        scalars = {
            "loss": interval.loss,
            "learning_rate": self.training_step.optimizer.param_groups[0]["lr"],
            "grad_norm": interval.grad_norm,
            "images_per_second": interval.steps_per_second * self.images_per_step,
            "peak_memory_mib": peak_memory(self.accelerator.device) / MIB,
            "ema_decay": trainer.ema_decay if self.step >= trainer.step_start_ema else 0.0,
            "skipped_steps": self.metrics.skipped_steps(),
            "bad_images": len(set().union(*bad_images)),
        }
        patch_loss = torch.stack(patch_losses).mean(dim=0)  # (N*N,)
        divider = self.config.model.patch_divider
        self.tracker.log(self.step, scalars, rearrange(patch_loss, "(i j) -> i j", i=divider).numpy())
        return {
            "loss": f"{interval.loss:.4f}",
            "images/s": f"{scalars['images_per_second']:.1f}",
            "memory": f"{scalars['peak_memory_mib']:,.0f} MiB",
        }

    def save(self) -> bool:
        """Collective: write the checkpoint of this step; returns whether that was possible.

        Raises:
            InputError: it could not be written, for the `MAX_FAILED_SAVES`th time in a row.
        """
        state, failure = self.state_dict(), None
        if self.accelerator.is_main_process:
            try:
                self.folder.save_checkpoint(self.step, state, self.config.trainer.checkpoints_total_limit)
            except OSError as error:
                failure = report_unwritten(self.folder.checkpoint(self.step), error)
        failure = processes.from_main(failure)
        self.failed_saves = 0 if failure is None else self.failed_saves + 1
        if self.failed_saves == MAX_FAILED_SAVES:
            raise InputError(
                f"stopped at step {self.step}, as {self.failed_saves} saves in a row failed; the last: {failure}"
            )
        return failure is None

    def state_dict(self) -> dict[str, Any]:
        """Collective: the contents of a checkpoint."""
        scaler = self.accelerator.scaler
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "model": self.unet.state_dict(),
            "ema": self.ema.ema_model.state_dict(),
            "optimizer": self.training_step.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped_steps": self.metrics.skipped_steps(),
            "bad_images": sorted(set().union(*processes.gather(self.bad_images))),
        }

    def resume(self, *candidates: checkpoint.PathLike) -> None:
        """Continue from the first of some checkpoints that is not damaged, ours or a published one.

        Raises:
            InputError: none can be read; or it does not fit the config, or holds weights alone.
        """
        for path in candidates:
            try:
                state = checkpoint.read(path, verify=True)
                break
            except checkpoint.DamagedCheckpoint as error:
                if path == candidates[-1]:
                    raise
                self.accelerator.print(f"{error} Trying the one before.")
        self.load_state_dict(state, path)

    def load_state_dict(self, state: dict[str, Any], path: checkpoint.PathLike) -> None:
        """Continue from what `checkpoint.read` returned for `path`.

        Raises:
            InputError: it does not fit the config, or holds weights alone.
        """
        saved, optimizer = state["config"], state["optimizer"]
        if saved is not None:
            # A network trained with another halo, or without shifted grids, soon adapts.
            checkpoint.check_same_model(path, saved, self.config, but=("halo", "grids"))
        if type(state["step"]) is not int or not optimizer:
            raise InputError(f"{path}: holds no step and optimizer state; it can be sampled from, but not continued.")
        grids, saved_grids = self.config.model.grids, 1 if saved is None else saved.model.grids
        inherited = inherited_positions(self.config.model.patch_divider, saved_grids, grids)
        names = [name for name, _ in self.unet.named_parameters()]
        for key, module in {"model": self.unet, "ema": self.ema.ema_model}.items():
            if POSITIONS in state[key] and grids != saved_grids:
                state[key][POSITIONS] = state[key][POSITIONS] @ inherited
            checkpoint.load_weights(module, state[key], f"{path} ({key})")
        try:
            if saved is None:
                optimizer = published.translate_optimizer(optimizer, state["published_model"], names)
            if POSITIONS in names and grids != saved_grids:
                moments = optimizer["state"][names.index(POSITIONS)]
                moments |= {key: moments[key] @ inherited for key in ("exp_avg", "exp_avg_sq")}
            self.training_step.load_optimizer(optimizer)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            raise InputError(
                f"{path}: the optimizer state does not fit the configuration's model; it must be Adam's, with moments "
                "of the same shapes as the parameters."
            ) from None
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.metrics = TrainingMetrics(state.get("skipped_steps", 0))
        self.bad_images = set(state.get("bad_images", ()))
        halo, saved_halo = self.config.model.halo, 0 if saved is None else saved.model.halo
        if halo != saved_halo:
            self.accelerator.print(
                f"{path}: was trained with a halo of {saved_halo} pixels; training continues with one of {halo}."
            )
        if grids != saved_grids:
            self.accelerator.print(
                f"{path}: was trained with {saved_grids} grid(s) of patches; training continues with {grids}."
            )

    def preview(self) -> None:
        """Collective: draw the images of the first seeds with the averaged weights and save them as a grid.

        Raises:
            Stopped: a signal asked for it; a resumed run draws the preview first.
        """
        if self.config.trainer.preview_count == 0:
            return
        images = self._draw_preview()
        if self.accelerator.is_main_process:
            picture, path = pictures.tile(images), self.folder.preview(self.step)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                pictures.save_png(path, picture)
            except OSError as error:
                report_unwritten(path, error)
            self.tracker.log_preview(self.step, picture)

    def _draw_preview(self) -> list[np.ndarray]:
        """The images of seeds 0, 1, ..., each (H, W, c) uint8; the processes share them."""
        trainer, accelerator = self.config.trainer, self.accelerator
        count, drawn = trainer.preview_count, {}
        # Where the images do not divide evenly, some are drawn twice, so that no process has fewer batches.
        own = [(accelerator.process_index + i) % count for i in range(0, count, accelerator.num_processes)]
        for start in range(0, len(own), trainer.train_batch_size):
            seeds = own[start : start + trainer.train_batch_size]
            with torch.inference_mode(), accelerator.autocast():
                images = samplers.draw(
                    self.ema_diffusion,
                    seeds,
                    sampler=self.preview_sampler,
                    patch_batch_size=trainer.patch_batch_size,
                    progress=self._preview_steps,
                )
            drawn |= zip(seeds, map(pictures.pixels, images.cpu()), strict=True)
        for part in processes.gather(drawn):
            drawn |= part
        return [drawn[seed] for seed in range(count)]

    def _preview_steps(self, steps: list[int]) -> Iterator[int]:
        for step in self._progress(steps, "preview", leave=False):
            self.signals.stop_if_requested()
            yield step

    def _progress(self, steps: Any, what: str, leave: bool = True) -> tqdm:
        """A progress bar on the main process; a range that starts later shows the steps already done."""
        done = steps.start if isinstance(steps, range) else 0
        hidden = not self.accelerator.is_main_process
        return tqdm(
            steps, desc=what, initial=done, total=done + len(steps), disable=hidden, leave=leave, dynamic_ncols=True
        )
