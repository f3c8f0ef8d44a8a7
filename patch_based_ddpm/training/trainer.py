"""The training loop with its exponential moving average, logging, checkpoints, previews and resuming.

Everything random is a function of (seed, step, process), so a resumed run continues the uninterrupted one.
"""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from einops import rearrange
from ema_pytorch import EMA
from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint, processes
from patch_based_ddpm.checkpoint import published
from patch_based_ddpm.config import Config
from patch_based_ddpm.data import pictures
from patch_based_ddpm.data.cache import prepare_pixels
from patch_based_ddpm.data.dataset import Pixels, micro_batches
from patch_based_ddpm.data.sources import Source
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.model.unet import UNet
from patch_based_ddpm.planning.live_memory import MIB, peak_memory, reset_peak_memory
from patch_based_ddpm.signals import SignalHandler, SignalRequest, Stopped
from patch_based_ddpm.training.metrics import TrainingMetrics
from patch_based_ddpm.training.previews import check_preview, draw_preview
from patch_based_ddpm.training.run_folder import RunFolder, report_unwritten
from patch_based_ddpm.training.step import StepResult, TrainingStep
from patch_based_ddpm.training.tracking import Tracker

MAX_FAILED_SAVES = 3  # in a row


class Trainer:
    """Trains one run, on one process of possibly many.

    Args:
        config: what to train and how.
        accelerator: devices, processes and precision.
        source: the images.
        folder: the run's folder.
    """

    def __init__(self, config: Config, accelerator: Accelerator, source: Source, folder: RunFolder) -> None:
        check_preview(config)
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
        if trainer.compile:
            # A study trains several networks in one process, each with its own count of recompilations.
            _unwrapped(accelerator, unet).compile(dynamic=False, isolate_recompiles=True)
        diffusion = GaussianDiffusion(unet, config).to(accelerator.device)
        diffusion.patch_batching.padded = trainer.compile  # passes of one shape are compiled once
        self.ema_diffusion = GaussianDiffusion(self.ema.ema_model, config).to(accelerator.device)
        self.training_step = TrainingStep(trainer, accelerator, diffusion, optimizer)
        self.tracker = Tracker(accelerator, config, folder)
        self.signals = SignalHandler(accelerator.is_main_process)
        self.step = 0
        self.metrics = TrainingMetrics()
        self.bad_images: set[int] = set()
        self.failed_saves = 0  # in a row

    @property
    def unet(self) -> UNet:
        """The network in training, without the accelerator's wrappers."""
        return _unwrapped(self.accelerator, self.training_step.diffusion.unet)

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step, over all processes."""
        trainer = self.config.trainer
        return trainer.train_batch_size * trainer.gradient_accumulate_every * self.accelerator.num_processes

    def limit_patch_batch(self, patches: int) -> None:
        """Let at most so many patches share a pass, whatever the config says."""
        self.training_step.diffusion.patch_batching.limit = patches
        self.ema_diffusion.patch_batching.limit = patches

    def train(self) -> None:
        """Run the steps that are left.

        Raises:
            InputError: an image cannot be read or the cache not be built, too many steps in a row were not finite or
                could not be saved, or the last one before the run ends could not.
            Stopped: a signal asked for it; this step is saved.
        """
        pixels = prepare_pixels(self.config, self.source, self.folder.image_cache)
        self.tracker.start()
        reset_peak_memory(self.accelerator.device)
        try:
            with self.signals:
                self._run_steps(pixels)
        finally:
            self.tracker.finish()

    def _run_steps(self, pixels: Pixels) -> None:
        trainer = self.config.trainer
        if self.step > 0 and self._is_milestone and not self.folder.preview(self.step).exists():
            self.preview()  # the run had ended between this checkpoint and its preview
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
        """Collective: report the steps since the last report, or since the run was resumed.

        Args:
            last: the result of the last step.

        Returns:
            What the progress bar shows.

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
        """Collective: the contents of a checkpoint, see `checkpoint`."""
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

    def load_state_dict(self, state: dict[str, Any], path: checkpoint.PathLike) -> None:
        """Continue from a checkpoint, ours or a published one.

        Args:
            state: what `checkpoint.read` returned.
            path: the file it came from, for messages.

        Raises:
            InputError: it does not fit the config, or holds weights alone.
        """
        if not state["published"]:
            # A network trained with another halo soon adapts.
            checkpoint.check_same_model(path, state["config"], self.config, but="halo")
        optimizer = state["optimizer"]
        if type(state["step"]) is not int or not isinstance(optimizer, dict) or "param_groups" not in optimizer:
            raise InputError(f"{path}: holds no step and optimizer state; it can be sampled from, but not continued.")
        checkpoint.load_weights(self.unet, state["model"], f"{path} (model)")
        checkpoint.load_weights(self.ema.ema_model, state["ema"], f"{path} (ema)")
        self.training_step.load_optimizer(_optimizer_state(state, self.unet, path))
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.metrics = TrainingMetrics(state.get("skipped_steps", 0))
        self.bad_images = set(state.get("bad_images", ()))
        wanted, saved = self.config.model.halo, 0 if state["published"] else state["config"].model.halo
        if wanted != saved:
            self.accelerator.print(f"{path}: was trained with a halo of {saved} pixels; going on with one of {wanted}.")

    def resume(self, *candidates: checkpoint.PathLike) -> None:
        """Continue from the first of some checkpoints that is not damaged, ours or a published one.

        Raises:
            InputError: none can be read; or it does not fit the config, or holds weights alone.
        """
        for path in candidates:
            try:
                state = checkpoint.read(path, verify=True)
            except checkpoint.DamagedCheckpoint as error:
                if path == candidates[-1]:
                    raise
                self.accelerator.print(f"{error} Trying the one before.")
            else:
                self.load_state_dict(state, path)
                return

    def preview(self) -> None:
        """Collective: draw images with the averaged weights and save them as a grid.

        Raises:
            Stopped: a signal asked for it; a resumed run draws the preview first.
        """
        trainer = self.config.trainer
        if trainer.preview_count == 0:
            return
        images = draw_preview(self.ema_diffusion, trainer, self.accelerator, self._preview_steps)
        if self.accelerator.is_main_process:
            picture, path = pictures.tile([pictures.pixels(image) for image in images]), self.folder.preview(self.step)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                pictures.save_png(path, picture)
            except OSError as error:
                report_unwritten(path, error)
            self.tracker.log_preview(self.step, picture)

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


def _unwrapped(accelerator: Accelerator, unet: torch.nn.Module) -> UNet:
    """The network itself, also where the launcher was asked to compile it."""
    return accelerator.unwrap_model(unet, keep_torch_compile=False)


def _optimizer_state(state: dict[str, Any], unet: UNet, path: checkpoint.PathLike) -> dict[str, Any]:
    """The optimizer state of a checkpoint, checked against the network, because Adam compares no shapes."""
    optimizer, parameters = state["optimizer"], dict(unet.named_parameters())
    try:
        if state["published"]:
            optimizer = published.translate_optimizer(optimizer, state["published_model"], list(parameters))
        (group,) = optimizer["param_groups"]
        shapes = [parameter.shape for parameter in parameters.values()]
        fits = len(group["params"]) == len(shapes) and all(
            moments[key].shape == shapes[number]
            for number, moments in optimizer["state"].items()
            for key in ("exp_avg", "exp_avg_sq")
        )
    except (LookupError, TypeError, ValueError, AttributeError):  # the state is malformed
        fits = False
    if not fits:
        raise InputError(
            f"{path}: the optimizer state does not fit the configuration's model; it must be Adam's, for "
            f"{len(parameters)} parameters of the same shapes."
        )
    return optimizer
