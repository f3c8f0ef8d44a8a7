"""The configuration of a run: frozen sections, read from strict JSON; the one home of every default and key's meaning.

`PYTHONPATH=.:tests python -m support.config_page` copies the keys into docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.strict_json import ConfigFile, Folder, NonNegative, Positive, Seed, Text, key, section

Width = Annotated[StrictInt, Field(ge=1, le=2**20)]
Side = Annotated[StrictInt, Field(ge=1, le=2**16)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]


@section("trainer")
class TrainerConfig:
    """How to train: data, steps, optimizer, averaging, checkpoints, logging and previews."""

    train_dataset_dir: Folder = key(..., "Folder of images, LSUN LMDB folder, or `builtin:faces`.")
    log_dir: Folder = key(..., "Folder of the run: config, metrics, checkpoints and previews.")
    ema_decay: Fraction = key(0.995, "Decay of the averaged (EMA) weights at each update.")
    train_batch_size: Positive = key(32, "Images per process in one forward and backward pass.")
    train_lr: StrictFloat = key(1e-4, "Learning rate of Adam.", gt=0)
    train_num_steps: Positive = key(100000, "Optimizer steps.")
    gradient_accumulate_every: Positive = key(1, "Batches per optimizer step; their gradients are averaged.")
    use_amp: StrictBool = key(False, "Train in fp16. The key of published configs; `mixed_precision` has bf16 too.")
    step_start_ema: NonNegative = key(2000, "First step that averages weights; until then they are copied.")
    update_ema_every: Positive = key(10, "Steps between two updates of the averaged weights.")
    save_and_sample_every: Positive = key(1000, "Steps between two checkpoints, each with a preview.")
    checkpoints_total_limit: Positive | None = key(None, "Checkpoints to keep, the newest ones. null keeps all.")
    num_workers: NonNegative | None = key(
        None, "Processes that load images, per training process. null: an equal share of the machine's cores."
    )
    seed: Seed = key(1234, "Seed of initial weights, data order, flips, noise, timesteps and the built-in faces.")
    wandb_enabled: StrictBool = key(False, "Report the run to wandb.")
    wandb_project: Text | None = key(None, "Project on wandb. null: `patch_based_ddpm`.")
    wandb_name: Text | None = key(None, "Name of the run on wandb. null: the name of the folder `log_dir`.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = key(
        None, "Precision of the forward and backward pass. null: accelerate's setting."
    )
    patch_batch_size: Positive | None = key(
        None, "Patches per forward and backward pass: fewer take less memory, the gradient is the same. null: all."
    )
    recompute_activations: StrictBool = key(
        False, "Recompute activations in the backward pass instead of keeping them: less memory, slower."
    )
    compile: StrictBool = key(False, "Compile the network with `torch.compile`.")
    horizontal_flip: StrictBool = key(True, "Mirror each image with probability 1/2.")
    on_bad_image: Literal["stop", "skip"] = key(
        "stop", "If an image cannot be read, end the run, or use the next image and count the bad one."
    )
    cache_images: StrictBool = key(False, "Resize all images once, into a memory-mapped file in `log_dir`.")
    max_grad_norm: StrictFloat | None = key(None, "Clip the gradient to this L2 norm. null: no clipping.", gt=0)
    lr_warmup_steps: NonNegative = key(0, "Steps over which the learning rate rises linearly. 0: no warm-up.")
    max_skipped_steps: Positive = key(20, "Consecutive steps with a non-finite loss or gradient that end the run.")
    log_every: Positive = key(10, "Steps between two lines of `metrics.jsonl`.")
    preview_count: NonNegative = key(36, "Images in each preview. 0: no previews.")
    preview_sampler: Text = key("ddpm", "Sampler of the previews, one of those of `sample --sampler`.")
    preview_steps: Positive | None = key(
        None, "Sampling steps of a preview, at most `diffusion.timesteps`. null: the sampler's default."
    )
    preview_eta: Fraction = key(
        0.0, "Noise of the previews' sampler: `ddim` 0 (none) to 1 (as `ddpm`), `dpm-solver++` 0 or 1, `ddpm` only 0."
    )
    preview_order: Positive | None = key(
        None, "Order of the previews' sampler, for `dpm-solver++` 1, 2 or 3. null: its default."
    )


@section("model")
class ModelConfig:
    """The network and the geometry of its images and patches."""

    dim: Width = key(..., "Channels of the first level; even, at least 4, and a multiple of `resnet_block_groups`.")
    init_dim: Width | None = key(None, "Channels after the first convolution. null: `dim // 3 * 2`.")
    out_dim: Positive | None = key(None, "Must be null or equal `channels`; published configs have the key.")
    dim_mults: tuple[Width, ...] = key(
        (1, 2, 4, 8),
        "Channels of each level as a multiple of `dim`, the first 1. Each level but the first halves the resolution.",
        min_length=1,
        max_length=16,
    )
    channels: StrictInt = key(3, "Image channels: 1 for grey, 3 for RGB, 4 for RGBA.")
    resnet_block_groups: Positive = key(8, "Groups of each group normalisation.")
    learned_variance: StrictBool = key(False, "Must be false; published configs have the key.")
    patch_divider: Positive = key(4, "N: the image is split into N x N patches. 1 is the ordinary DDPM.")
    image_size: Side | tuple[Side, Side] = key(128, "Side of square images in pixels, or `[height, width]`.")
    halo: Annotated[StrictInt, Field(ge=0, le=2**16)] = key(
        0, "Pixels around its patch that the network also sees, so that neighbouring patches match. The paper has 0."
    )
    grids: Annotated[StrictInt, Field(ge=1, le=4)] = key(
        1,
        "Grids of patches, each moved by half a patch, that take turns in training and sampling, so that neighbouring "
        "patches match; 1, 2 or 4. The paper has 1.",
    )
    position_conditioning: StrictBool = key(True, "Tell the network where its patch lies. false: an ablation.")
    global_content_conditioning: StrictBool = key(
        True, "Show the network the whole noisy image, pooled to patch size. false: an ablation."
    )

    @property
    def first_width(self) -> int:
        """Channels after the first convolution."""
        return self.dim // 3 * 2 if self.init_dim is None else self.init_dim

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        height, width = self.image_shape
        return height // self.patch_divider, width // self.patch_divider

    @property
    def positions(self) -> int:
        """Positions that the network tells apart: one for each patch of each grid."""
        return self.grids * self.patch_divider**2

    def divided(self, patch_divider: int) -> ModelConfig:
        """The same network for another N; a whole image has one grid and no halo.

        Raises:
            InputError: N does not fit the image.
        """
        whole = {"halo": 0, "grids": 1} if patch_divider == 1 else {}
        return dataclasses.replace(self, patch_divider=patch_divider, **whole)

    def __post_init__(self) -> None:
        levels, halvings = len(self.dim_mults), 2 ** (len(self.dim_mults) - 1)
        self._require(self.channels in (1, 3, 4), "channels", "1, 3 or 4")
        self._require(self.out_dim in (None, self.channels), "out_dim", f"null or channels ({self.channels})")
        self._require(not self.learned_variance, "learned_variance", "false: the paper's loss trains no variance")
        self._require(self.dim_mults[0] == 1, "dim_mults", "a list whose first value is 1")
        self._require(self.dim >= 4 and self.dim % 2 == 0, "dim", "even and at least 4")
        groups = self.resnet_block_groups
        self._require(self.dim % groups == 0, "dim", f"a multiple of resnet_block_groups ({groups})")
        most, rest = divmod(math.gcd(*self.image_shape), halvings)
        self._require(rest == 0, "image_size", f"a multiple of {halvings} on every side ({levels} levels)")
        fits = [n for n in range(1, most + 1) if most % n == 0]
        sides = f"image_size {json.dumps(self.image_size)} is divided into sides that are multiples of {halvings}"
        rule = f"one of {', '.join(map(str, fits))}, because {sides} ({levels} levels)"
        self._require(self.patch_divider in fits, "patch_divider", rule)
        self._require(self.halo == 0 or self.patch_divider > 1, "halo", "0 where patch_divider is 1")
        self._require(self.grids in (1, 2, 4), "grids", "1, 2 or 4")
        self._require(self.grids == 1 or self.patch_divider > 1, "grids", "1 where patch_divider is 1")
        self._require(2 * self.halo % halvings == 0, "halo", f"a multiple of {halvings // 2} ({levels} levels)")

    def _require(self, holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise InputError(f"model.{key} is {json.dumps(getattr(self, key))}; it must be {rule}.")


@section("diffusion")
class DiffusionConfig:
    """The forward process and the network's target."""

    timesteps: Annotated[StrictInt, Field(ge=2, le=10**6)] = key(1000, "T, the steps of the forward process.")
    loss_type: Literal["l1", "l2", "huber"] = key("l1", "Distance between the network's output and its target.")
    objective: Literal["pred_noise", "pred_x0", "pred_v"] = key(
        "pred_noise", "The network's target: the noise, the image, or v (Salimans & Ho 2022)."
    )


@section("")
class Config(ConfigFile):
    """A whole configuration: `Config.load(path)` reads one, `config.save(path)` writes it, every default filled in."""

    trainer: TrainerConfig
    model: ModelConfig
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        trainer, steps, timesteps = self.trainer, self.trainer.preview_steps, self.diffusion.timesteps
        if trainer.use_amp and trainer.mixed_precision not in (None, "fp16"):
            raise InputError(
                f'trainer.mixed_precision is "{trainer.mixed_precision}" but use_amp is true, which means fp16; '
                "set one of them."
            )
        if steps is not None and steps > timesteps:
            raise InputError(f"trainer.preview_steps is {steps}; it must be at most diffusion.timesteps ({timesteps}).")
