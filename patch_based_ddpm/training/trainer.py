"""The training loop, and what happens around it: averaging, logging, checkpoints, previews, resuming.

Everything random is a function of (seed, step, process), so a resumed run continues the uninterrupted one.
"""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from ema_pytorch import EMA
from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint
from patch_based_ddpm.config import Config
from patch_based_ddpm.data import pictures
from patch_based_ddpm.data.dataset import Pixels
from patch_based_ddpm.data.loading import micro_batches, prepare_pixels
from patch_based_ddpm.data.sources import Source
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.model.unet import UNet
from patch_based_ddpm.planning.live_memory import MIB, peak_memory, reset_peak_memory
from patch_based_ddpm.signals import SignalWatch, Wish
from patch_based_ddpm.training import run_state
from patch_based_ddpm.training.metrics import Skips, Window
from patch_based_ddpm.training.previews import check_preview, draw_preview
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.saver import Saver, tell_unwritten
from patch_based_ddpm.training.step import StepResult, TrainingStep
from patch_based_ddpm.training.tracking import Tracker


class Trainer:
    """Trains one run, on one process of possibly many.

    Args:
        config: what to train and how.
        accelerator: devices, processes, precision and trackers.
        source: the images.
        folder: where the run lies.
    """

    def __init__(self, config: Config, accelerator: Accelerator, source: Source, folder: RunFolder) -> None:
        check_preview(config)
        self.config = config.trainer
        self.whole_config = config
        self.accelerator = accelerator
        self.source = source
        self.folder = folder
        self.tracker = Tracker(accelerator, config, folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            unet = UNet.from_config(config.model).to(accelerator.device)
        self.ema = EMA(unet, beta=self.config.ema_decay, include_online_model=False)
        self.ema.ema_model.eval().requires_grad_(False)
        adam = torch.optim.Adam(unet.parameters(), lr=self.config.train_lr, fused=True)
        unet.recompute = self.config.recompute_activations
        unet, optimizer = accelerator.prepare(unet, adam)
        if self.config.compile:
            # A study trains several networks in one process, each with its own count of recompilations.
            _unwrapped(accelerator, unet).compile(dynamic=False, isolate_recompiles=True)
        diffusion = GaussianDiffusion(unet, config).to(accelerator.device)
        diffusion.patch_batching.padded = self.config.compile  # one shape, compiled once
        self.averaged = GaussianDiffusion(self.ema.ema_model, config).to(accelerator.device)
        self.training_step = TrainingStep(self.config, accelerator, diffusion, optimizer)
        self.saver = Saver(accelerator, folder, self.config.checkpoints_total_limit)
        self.signals = SignalWatch(accelerator)
        self.step = 0
        self.window = Window()
        self.skips = Skips(0, accelerator.device)
        self.bad_images: set[int] = set()

    @property
    def unet(self) -> UNet:
        """The network in training, without the accelerator's wrappers."""
        return _unwrapped(self.accelerator, self.training_step.diffusion.unet)

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step, over all processes."""
        return self.config.train_batch_size * self.config.gradient_accumulate_every * self.accelerator.num_processes

    def limit_passes(self, patches: int) -> None:
        """Let at most so many patches share a pass, whatever the config says."""
        self.training_step.diffusion.patch_batching.limit = patches
        self.averaged.patch_batching.limit = patches

    def train(self) -> None:
        """Run the steps that are left.

        Raises:
            InputError: an image cannot be read or the cache not be built, too many steps in a row were not finite or
                could not be saved, or the last one before the run ends could not.
            Stopped: a signal asked for it; this step is saved.
        """
        pixels = prepare_pixels(self.whole_config, self.accelerator, self.source, self.folder.image_cache)
        self.tracker.start()
        reset_peak_memory(self.accelerator.device)
        try:
            with self.signals:
                self._train(pixels)
        finally:
            self.tracker.finish()

    def _train(self, pixels: Pixels) -> None:
        config = self.config
        if self.step > 0 and self._preview_is_due and not self.folder.preview(self.step).exists():
            self.preview()  # the run was ended between this checkpoint and its preview
        stream = micro_batches(self.whole_config, self.accelerator, pixels, self.step, self._report_bad_images)
        remaining = range(self.step, config.train_num_steps)
        with closing(stream) as batches, self._progress(remaining, "training") as bar:
            for _ in bar:
                result = self.training_step(self.step, islice(batches, config.gradient_accumulate_every))
                self.step += 1
                self.window.add(result)
                self.skips.count(result.applied)
                self._update_ema(result)
                if self.step % config.log_every == 0 or self._is_last:
                    self._check_skips(result)
                    bar.set_postfix(self._log())
                wish = self.signals.agreed()
                is_last = self._is_last or wish is Wish.STOP
                if (self._preview_is_due or wish) and not self.save() and is_last:
                    raise InputError(f"step {self.step}, the last one, could not be saved.")
                if wish is Wish.STOP:
                    self.signals.stop()
                if self._preview_is_due:
                    self.preview()

    @property
    def _is_last(self) -> bool:
        return self.step == self.config.train_num_steps

    @property
    def _preview_is_due(self) -> bool:
        """Whether this step gets a checkpoint and a preview."""
        return self.step % self.config.save_and_sample_every == 0 or self._is_last

    def _report_bad_images(self, passed_over: tuple[int, ...]) -> None:
        for index in set(passed_over) - self.bad_images:
            self.bad_images.add(index)
            tqdm.write(f"skipped an image that cannot be read: {self.source.name(index)}")

    def _update_ema(self, result: StepResult) -> None:
        """Copy before `step_start_ema`, average from then on; ema-pytorch's own counting and warm-up stay out of it."""
        if self.step % self.config.update_ema_every != 0 or not result.applied:  # asks the device only when it is time
            return
        if self.step < self.config.step_start_ema:
            self.ema.copy_params_from_model_to_ema()
        else:
            self.ema.update_moving_average(self.ema.ema_model, self.ema.model, current_decay=self.config.ema_decay)

    def _check_skips(self, last: StepResult) -> None:
        _, in_a_row = self.skips.figures()
        if in_a_row >= self.config.max_skipped_steps:
            raise InputError(
                f"stopped at step {self.step}: {in_a_row} steps in a row had a non-finite loss ({last.loss.item()}) "
                f"or gradient norm ({last.grad_norm.item()}); a lower train_lr, max_grad_norm or lr_warmup_steps may "
                "help."
            )

    def _log(self) -> dict[str, str]:
        """Report the steps since the last report; returns what the progress bar shows."""
        window, self.window = self.window, Window()
        loss, grad_norm, patch_loss = window.means()
        patch_loss = self.accelerator.reduce(patch_loss, reduction="mean")  # (N*N,)
        scalars = {
            "loss": loss,
            "learning_rate": self.training_step.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "images_per_second": window.steps_per_second() * self.images_per_step,
            "peak_memory_mib": peak_memory(self.accelerator.device) / MIB,
            "ema_decay": self.config.ema_decay if self.step >= self.config.step_start_ema else 0.0,
            "skipped_steps": self.skips.figures()[0],
            "bad_images": len(self.all_bad_images()),
        }
        heat_map = rearrange(patch_loss, "(i j) -> i j", i=self.whole_config.model.patch_divider).cpu().numpy()
        self.tracker.log(self.step, scalars, heat_map)
        return {
            "loss": f"{loss:.4f}",
            "images/s": f"{scalars['images_per_second']:.1f}",
            "memory": f"{scalars['peak_memory_mib']:,.0f} MiB",
        }

    def all_bad_images(self) -> list[int]:
        """The unreadable images that any process met."""
        return [] if self.config.on_bad_image == "stop" else sorted(set(gather_object(list(self.bad_images))))

    def save(self) -> bool:
        """Write the checkpoint of this step, and let model-last.pt be it; returns whether that was possible."""
        return self.saver.save(self.step, run_state.collect(self))

    def resume(self, *candidates: checkpoint.PathLike) -> None:
        """Continue from the first of some checkpoints that is not damaged, ours or a published one.

        Raises:
            InputError: none can be read; or it does not fit the config, or holds weights alone.
        """
        for path in candidates:
            try:
                contents = checkpoint.read(path, verify=True)
            except checkpoint.DamagedCheckpoint as error:
                if path == candidates[-1]:
                    raise
                self.accelerator.print(f"{error} Trying the one before.")
            else:
                run_state.restore(self, contents, path)
                return

    def preview(self) -> None:
        """Draw images with the averaged weights and save them as a grid."""
        if self.config.preview_count == 0:
            return
        images = draw_preview(self.averaged, self.config, self.accelerator, self._preview_steps)
        if self.accelerator.is_main_process:
            picture, path = pictures.tile([pictures.pixels(image) for image in images]), self.folder.preview(self.step)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                pictures.save_png(path, picture)
            except OSError as error:
                tell_unwritten(path, error)
            self.tracker.log_preview(self.step, picture)

    def _preview_steps(self, steps: list[int]) -> Iterator[int]:
        """The steps of a preview, which is left when the run is to stop: resumed, it draws the preview first."""
        for step in self._progress(steps, "preview", leave=False):
            self.signals.check()
            yield step

    def _progress(self, steps: Any, what: str, leave: bool = True) -> tqdm:
        """A progress bar on the main process; a range that starts later shows what is already done."""
        done = steps.start if isinstance(steps, range) else 0
        hidden = not self.accelerator.is_main_process
        return tqdm(
            steps, desc=what, initial=done, total=done + len(steps), disable=hidden, leave=leave, dynamic_ncols=True
        )


def _unwrapped(accelerator: Accelerator, unet: torch.nn.Module) -> UNet:
    """The network itself, also where the launcher was asked to compile it."""
    return accelerator.unwrap_model(unet, keep_torch_compile=False)
