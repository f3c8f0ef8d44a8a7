"""The training loop, and what happens around it: averaging, logging, checkpoints, previews, resuming.

Everything random is a function of (seed, step, process), so a resumed run continues the uninterrupted one.
"""

import dataclasses
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from ema_pytorch import EMA
from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint, pictures, published
from patch_based_ddpm.batches import micro_batches, prepare_pixels
from patch_based_ddpm.config import Config
from patch_based_ddpm.diffusion import GaussianDiffusion
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.live_memory import MIB, peak_memory
from patch_based_ddpm.previews import draw_preview
from patch_based_ddpm.run_folder import RunFolder
from patch_based_ddpm.sources import Source
from patch_based_ddpm.tracking import Tracker
from patch_based_ddpm.training_step import StepResult, TrainingStep
from patch_based_ddpm.unet import UNet
from patch_based_ddpm.window import Skips, Window


class Trainer:
    """Trains one run, on one process of possibly many.

    Args:
        config: what to train and how.
        accelerator: devices, processes, precision and trackers.
        source: the images.
        folder: where the run lies.
    """

    def __init__(self, config: Config, accelerator: Accelerator, source: Source, folder: RunFolder) -> None:
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
        unet, optimizer = accelerator.prepare(unet, adam)
        diffusion = GaussianDiffusion(unet, config).to(accelerator.device)
        self.averaged = GaussianDiffusion(self.ema.ema_model, config).to(accelerator.device)
        self.training_step = TrainingStep(self.config, accelerator, diffusion, optimizer)
        self.step = 0
        self.skips = Skips(0, accelerator.device)
        self.bad_images: set[int] = set()

    @property
    def unet(self) -> UNet:
        """The network in training, without the accelerator's wrappers."""
        return self.accelerator.unwrap_model(self.training_step.diffusion.unet)

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step, over all processes."""
        return self.config.train_batch_size * self.config.gradient_accumulate_every * self.accelerator.num_processes

    def train(self) -> None:
        """Run the steps that are left.

        Raises:
            InputError: an image cannot be read or the cache not be built, or too many steps in a row were not finite.
        """
        config = self.config
        pixels = prepare_pixels(self.whole_config, self.accelerator, self.source, self.folder)
        self.tracker.start()
        if self.step > 0 and not self.folder.preview(self.step).exists():
            self.preview()  # the run was ended between this checkpoint and its preview
        batches = micro_batches(self.whole_config, self.accelerator, pixels, self.step, self._report_bad_images)
        window = Window()
        with self._progress(range(self.step, config.train_num_steps), "training") as bar:
            for _ in bar:
                result = self.training_step(self.step, islice(batches, config.gradient_accumulate_every))
                self.step += 1
                window.results.append(result)
                self.skips.count(result.applied)
                self._update_ema(result)
                last = self.step == config.train_num_steps
                if self.step % config.log_every == 0 or last:
                    self._check_skips(result)
                    bar.set_postfix(self._log(window))
                    window = Window()
                if self.step % config.save_and_sample_every == 0 or last:
                    self.save()
                    self.preview()
                    window = Window()  # so that a run resumed here logs what this one does
        self.tracker.finish()

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

    def _log(self, window: Window) -> dict[str, str]:
        """Report the steps since the last report; returns what the progress bar shows."""
        loss, grad_norm, patch_loss = window.means()
        patch_loss = self.accelerator.reduce(patch_loss, reduction="mean")  # (N*N,)
        scalars = {
            "loss": loss,
            "learning_rate": self.training_step.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "images_per_second": len(window.results) * self.images_per_step / window.seconds,
            "peak_memory_mib": peak_memory(self.accelerator.device) / MIB,
            "ema_decay": self.config.ema_decay if self.step >= self.config.step_start_ema else 0.0,
            "skipped_steps": self.skips.figures()[0],
            "bad_images": len(self._all_bad_images()),
        }
        heat_map = rearrange(patch_loss, "(i j) -> i j", i=self.whole_config.model.patch_divider).cpu().numpy()
        self.tracker.log(self.step, scalars, heat_map)
        return {
            "loss": f"{loss:.4f}",
            "images/s": f"{scalars['images_per_second']:.1f}",
            "memory": f"{scalars['peak_memory_mib']:,.0f} MiB",
        }

    def _all_bad_images(self) -> list[int]:
        """The unreadable images that any process met."""
        return [] if self.config.on_bad_image == "stop" else sorted(set(gather_object(list(self.bad_images))))

    def save(self) -> None:
        """Write the checkpoint of this step, and let model-last.pt be it."""
        bad_images = self._all_bad_images()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        path = self.folder.checkpoint(self.step)
        contents = {
            "config": self.whole_config.to_dict(),
            "step": self.step,
            "model": self.unet.state_dict(),
            "ema": self.ema.ema_model.state_dict(),
            "optimizer": self.training_step.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped_steps": self.skips.figures()[0],
            "bad_images": bad_images,
        }
        checkpoint.save(path, contents)
        self.folder.point_last_at(path)

    def resume(self, path: checkpoint.PathLike) -> None:
        """Continue from a checkpoint, ours or a published one.

        Raises:
            InputError: it cannot be read, does not fit the config, or holds weights alone.
        """
        contents = checkpoint.read(path)
        if not contents["published"]:
            self._check_same_model(contents["config"], path)
        optimizer = contents["optimizer"]
        if type(contents["step"]) is not int or not isinstance(optimizer, dict) or "param_groups" not in optimizer:
            raise InputError(f"{path}: holds no step and optimizer state; it can be sampled from, but not continued.")
        checkpoint.load_weights(self.unet, contents["model"], f"{path} (model)")
        checkpoint.load_weights(self.ema.ema_model, contents["ema"], f"{path} (ema)")
        if contents["published"]:
            names = [name for name, _ in self.unet.named_parameters()]
            optimizer = published.translate_optimizer(optimizer, contents["published_model"], names)
        self.training_step.optimizer.load_state_dict(optimizer)
        self.training_step.lay_out_moments()
        if contents["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(contents["scaler"])
        self.step = contents["step"]
        self.skips = Skips(contents.get("skipped_steps", 0), self.accelerator.device)
        self.bad_images = set(contents.get("bad_images", ()))

    def _check_same_model(self, saved: Config, path: checkpoint.PathLike) -> None:
        """Weights may fit and still mean something else, for example another objective."""
        for section in ("model", "diffusion"):
            ours, theirs = getattr(self.whole_config, section), getattr(saved, section)
            for field in dataclasses.fields(ours):
                wanted, found = getattr(ours, field.name), getattr(theirs, field.name)
                if wanted != found:
                    raise InputError(
                        f"{path}: was trained with {section}.{field.name} {found}, but the configuration says {wanted}."
                    )

    def preview(self) -> None:
        """Draw images with the averaged weights and save them as a grid."""
        if self.config.preview_count == 0:
            return
        images = draw_preview(
            self.averaged, self.config, self.accelerator, lambda steps: self._progress(steps, "preview", leave=False)
        )
        if self.accelerator.is_main_process:
            picture = pictures.tile([pictures.pixels(image) for image in images])
            pictures.save_png(self.folder.preview(self.step), picture)
            self.tracker.log_preview(self.step, picture)

    def _progress(self, steps: Any, what: str, leave: bool = True) -> tqdm:
        """A progress bar on the main process; a range that starts later shows what is already done."""
        done = steps.start if isinstance(steps, range) else 0
        hidden = not self.accelerator.is_main_process
        return tqdm(
            steps, desc=what, initial=done, total=done + len(steps), disable=hidden, leave=leave, dynamic_ncols=True
        )
