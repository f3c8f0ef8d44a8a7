"""The configuration of a run: frozen dataclasses, strict JSON in and out, and the one home of every default.

A file has three sections, `trainer`, `model` and `diffusion`. Every value is checked when it is loaded; what is wrong
is said in one sentence that names the file, the field, the value and the rule.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_based_ddpm import strict_json
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import write_json
from patch_based_ddpm.strict_json import field, required

MAX_IMAGE_SIZE = 2**16
MAX_LEVELS = 16


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train: data, steps, optimizer, averaging, what is saved and shown."""

    train_dataset_dir: str = required("folder of images, LSUN LMDB folder, or `builtin:faces`")
    log_dir: str = required("folder of the run: config, metrics, checkpoints, previews")
    ema_decay: float = field(0.995, "decay of the averaged weights", least=0, most=1)
    train_batch_size: int = field(32, "images per process and forward-backward pass", least=1)
    train_lr: float = field(1e-4, "learning rate of Adam", above=0)
    train_num_steps: int = field(100000, "optimizer steps", least=1)
    gradient_accumulate_every: int = field(1, "batches per optimizer step", least=1)
    use_amp: bool = field(False, "the published switch for fp16; `mixed_precision` says more")
    step_start_ema: int = field(2000, "before this step the averaged weights are a copy of the model", least=0)
    update_ema_every: int = field(10, "steps between two updates of the averaged weights", least=1)
    save_and_sample_every: int = field(1000, "steps between two checkpoints with their preview", least=1)
    checkpoints_total_limit: int | None = field(None, "so many checkpoints stay, the newest; null: all", least=1)
    num_workers: int | None = field(
        None, "processes that load images, per training process; null: its share of the cores", least=0
    )
    seed: int = field(
        1234, "seed of weights, data order, flips, noise, and of the built-in faces", least=0, below=2**63
    )
    wandb_enabled: bool = field(False, "report to wandb")
    wandb_project: str | None = field(None, "wandb project; null: `patch_based_ddpm`")
    wandb_name: str | None = field(None, "wandb run name; null: the name of `log_dir`")
    mixed_precision: str | None = field(
        None, "`no`, `fp16` or `bf16`; null: what accelerate was launched with", choices=("no", "fp16", "bf16")
    )
    patch_batch_size: int | None = field(
        None, "patches per forward-backward pass, less is less memory; null: all", least=1
    )
    recompute_activations: bool = field(
        False, "keep each level's input alone and compute the rest again in the backward pass: slower, less memory"
    )
    compile: bool = field(False, "compile the network with torch.compile")
    horizontal_flip: bool = field(True, "mirror every second image at random")
    on_bad_image: str = field("stop", "`stop` at an unreadable image, or `skip` and count it", choices=("stop", "skip"))
    cache_images: bool = field(False, "resize the images once, and read them from a memory-mapped file in `log_dir`")
    max_grad_norm: float | None = field(None, "clip the gradient's L2 norm; null: off", above=0)
    lr_warmup_steps: int = field(0, "steps over which the learning rate rises linearly; 0: off", least=0)
    max_skipped_steps: int = field(20, "stop after so many steps in a row with a non-finite loss or gradient", least=1)
    log_every: int = field(10, "steps between two lines of metrics", least=1)
    preview_count: int = field(36, "images in a preview; 0: no previews", least=0)
    preview_sampler: str = field("ddpm", "`ddpm`, `ddim` or `dpm-solver++`")
    preview_steps: int | None = field(None, "sampling steps of a preview; null: all, or 20 of `dpm-solver++`", least=1)
    preview_eta: float = field(0.0, "its noise on the way: see `--eta` of `sample`", least=0, most=1)
    preview_order: int | None = field(None, "of `dpm-solver++`: 1, 2 or 3; null: 2")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and the geometry of its images and patches."""

    dim: int = required("width of the first level", least=4)
    init_dim: int | None = field(None, "width after the first convolution; null: `dim // 3 * 2`", least=1)
    out_dim: int | None = field(None, "accepted at null or `channels`")
    dim_mults: tuple[int, ...] = field(
        (1, 2, 4, 8), "width of each level over `dim`; each but the first halves the patch", least=1
    )
    channels: int = field(3, "1 grey, 3 RGB, 4 RGBA", choices=(1, 3, 4))
    resnet_block_groups: int = field(8, "groups of the group normalisations; divides `dim`", least=1)
    learned_variance: bool = field(False, "accepted at false")
    patch_divider: int = field(4, "N: the image is cut into N x N patches; 1 is the ordinary DDPM", least=1)
    image_size: int | tuple[int, int] = field(128, "side in pixels, or `[height, width]`", least=1, most=MAX_IMAGE_SIZE)
    halo: int = field(0, "pixels around its patch that the network sees too, so that borders fit; 0: none", least=0)
    position_conditioning: bool = field(True, "tell the network where a patch lies; false is an ablation")
    global_content_conditioning: bool = field(True, "show it the pooled whole image; false is an ablation")

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        height, width = self.image_shape
        return height // self.patch_divider, width // self.patch_divider

    def divided(self, patch_divider: int) -> ModelConfig:
        """The same network for another N; a whole image has no halo.

        Raises:
            InputError: the image size does not allow it.
        """
        return dataclasses.replace(self, patch_divider=patch_divider, halo=0 if patch_divider == 1 else self.halo)

    def __post_init__(self) -> None:
        if self.out_dim not in (None, self.channels):
            raise InputError(
                f"model.out_dim is {self.out_dim}; only null or channels ({self.channels}) works, because the network "
                "predicts one value per channel and no variance."
            )
        if self.learned_variance:
            raise InputError(
                "model.learned_variance is true; it must be false, because the paper's loss trains no variance."
            )
        if self.dim_mults[0] != 1:
            raise InputError(
                f"model.dim_mults is {list(self.dim_mults)}; its first value must be 1, the level of width dim."
            )
        if len(self.dim_mults) > MAX_LEVELS:
            raise InputError(f"model.dim_mults has {len(self.dim_mults)} levels; it must have at most {MAX_LEVELS}.")
        if self.dim % 2:
            raise InputError(f"model.dim is {self.dim}; it must be even, half of it are sines and half cosines.")
        if self.dim % self.resnet_block_groups:
            raise InputError(
                f"model.dim is {self.dim}; it must be a multiple of resnet_block_groups ({self.resnet_block_groups})."
            )
        self._check_patches()

    def _check_patches(self) -> None:
        height, width = self.image_shape
        halvings = 2 ** (len(self.dim_mults) - 1)
        fits = [
            n for n in range(1, min(height, width) + 1) if height % (n * halvings) == 0 and width % (n * halvings) == 0
        ]
        if not fits:
            raise InputError(
                f"model.image_size is {json.dumps(self.image_size)}; with {len(self.dim_mults)} levels every side must "
                f"be a multiple of {halvings}."
            )
        if self.patch_divider not in fits:
            raise InputError(
                f"model.patch_divider is {self.patch_divider}; it must divide image_size {json.dumps(self.image_size)} "
                f"into patches whose sides are multiples of {halvings} ({len(self.dim_mults)} levels): "
                f"{', '.join(map(str, fits))} would do."
            )
        if self.halo and self.patch_divider == 1:
            raise InputError(f"model.halo is {self.halo}; it must be 0 where patch_divider is 1: nothing lies around.")
        if 2 * self.halo % halvings:
            raise InputError(
                f"model.halo is {self.halo}; it must be a multiple of {halvings // 2} ({len(self.dim_mults)} levels)."
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process and what the network learns."""

    timesteps: int = field(1000, "T, steps of the forward process", least=2)
    loss_type: str = field("l1", "`l1`, `l2` or `huber`", choices=("l1", "l2", "huber"))
    objective: str = field(
        "pred_noise", "`pred_noise`, `pred_x0` or `pred_v`", choices=("pred_noise", "pred_x0", "pred_v")
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole configuration: `Config.load(path)` reads one, `config.save(path)` writes it, every default filled in."""

    trainer: TrainerConfig
    model: ModelConfig
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        trainer, steps = self.trainer, self.trainer.preview_steps
        if trainer.use_amp and trainer.mixed_precision not in (None, "fp16"):
            raise InputError(
                f'trainer.mixed_precision is "{trainer.mixed_precision}" but use_amp is true, which means fp16; '
                "set one of them."
            )
        if steps is not None and steps > self.diffusion.timesteps:
            raise InputError(
                f"trainer.preview_steps is {steps}; it must be at most {self.diffusion.timesteps}, diffusion.timesteps."
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Config:
        """Read a configuration file.

        Args:
            path: a JSON file.

        Raises:
            InputError: the file cannot be read, is not JSON, or holds a key or value that does not fit.
        """
        try:
            return cls.from_dict(strict_json.parse(strict_json.read_text(path)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Any) -> Config:
        """Check plain JSON data and build the configuration.

        Raises:
            InputError: a key or value does not fit.
        """
        return strict_json.build(cls, data, "the configuration")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every default filled in."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as JSON, every default filled in."""
        write_json(Path(path), self.to_dict())
