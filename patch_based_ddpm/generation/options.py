"""Shared by the commands that draw images: the flags of sampling, loading the model, and drawing a batch."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from patch_based_ddpm import checkpoint, command_line, samplers
from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.generation.image_folder import digest
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.planning import planner
from patch_based_ddpm.samplers import SAMPLERS, Observe, SamplerConfig, timesteps


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of sampling."""
    count, add = command_line.positive_int, parser.add_argument
    add("--batch-size", type=count, default=8, metavar="B", help="images at a time (default: 8)")
    patch_batch = "patches per forward pass, counted over the batch; fewer take less memory (default: all)"
    add("--patch-batch-size", type=count, metavar="K", help=patch_batch)
    command_line.add_max_memory(parser)
    add("--compile", action="store_true", help="compile the network: a slow start, then faster")
    default, all_samplers = SamplerConfig(), SAMPLERS.values()
    steps = ", ".join(f"{each.name} {each.default_steps or 'all'}" for each in all_samplers)
    orders = sorted({order for each in all_samplers for order in each.orders})
    order = ", ".join(f"{each.name} {each.default_order}" for each in all_samplers if each.orders)
    fewest = {each.name: each.fewest_logsnr_steps for each in all_samplers if each.fewest_logsnr_steps}
    logsnr = "".join(f", but logsnr for {name} in {least} steps or more" for name, least in fewest.items())
    add("--sampler", choices=tuple(SAMPLERS), default=default.name, help=f"default: {default.name}")
    add("--steps", type=count, metavar="K", help=f"timesteps visited (default: {steps})")
    eta = f"noise that ddim and dpm-solver++ add at each step, 1: as much as ddpm (default: {default.eta:g})"
    add("--eta", type=float, default=default.eta, help=eta)
    add("--order", type=int, choices=orders, help=f"order of the sampler (default: {order})")
    add("--spacing", choices=tuple(timesteps.SPACINGS), help=f"how timesteps are spread (default: trailing{logsnr})")
    blend = "share of the steps, the last ones, that blend the grids of a model with several "
    blend += f"(default: {default.resolve(T=2, grids=2).blend:g})"
    add("--blend", type=float, metavar="SHARE", help=blend)
    add(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="averaged (ema) or last (model) weights (default: ema)",
    )
    dtypes = tuple(command_line.DTYPES)
    add("--dtype", choices=dtypes, default="float32", help="precision of the network (default: float32)")


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """The sampler of the flags; an `InputError` if they contradict one another."""
    return SamplerConfig(
        name=args.sampler, steps=args.steps, eta=args.eta, order=args.order, spacing=args.spacing, blend=args.blend
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raise an `InputError` for a missing checkpoint, or flags that contradict one another."""
    sampler_config(args)
    if args.ckpt is not None:  # evaluate can do without
        checkpoint.check_path(args.ckpt)


def load_model(args: argparse.Namespace, accelerator: Accelerator, images: int) -> GaussianDiffusion:
    """Load the model of the flags, to draw a number of images.

    Raises:
        InputError: it cannot be loaded, has fewer timesteps than --steps, or does not fit into --max-memory.
    """
    sampler = sampler_config(args)
    config = None if args.config is None else Config.load(args.config)
    if config is not None:
        sampler.resolve(config.diffusion.timesteps, config.model.grids)  # before the weights are read
    dtype, device = command_line.DTYPES[args.dtype], accelerator.device
    diffusion = checkpoint.load_diffusion(args.ckpt, config=config, weights=args.weights, device=device, dtype=dtype)
    sampler.resolve(diffusion.timesteps, diffusion.grids)
    if args.compile:
        diffusion.unet.compile(**command_line.compile_options(device, sampling=True))
        diffusion.patch_batching.padded = True  # passes of one shape: compiled once
    if args.max_memory is not None:
        batch_size, options = min(args.batch_size, images), {"dtype": dtype, "sampler": sampler}
        diffusion.patch_batching.limit, choice = planner.limit_patch_batch(
            planner.sampling_peak, diffusion.config, batch_size, args.patch_batch_size, args.max_memory, **options
        )
        accelerator.print(choice)
    return diffusion


@torch.inference_mode()
def draw_batch(
    diffusion: GaussianDiffusion,
    seeds: Sequence[int],
    args: argparse.Namespace,
    show: bool,
    observe: Observe | None = None,
) -> Tensor:
    """Draw one image per seed: (b, c, H, W) in [-1, 1], on the model's device; an `InputError` if one is not finite."""
    images = samplers.draw(
        diffusion,
        seeds,
        sampler=sampler_config(args),
        patch_batch_size=args.patch_batch_size,
        progress=lambda steps: tqdm(steps, desc="steps", disable=not show, leave=False, dynamic_ncols=True),
        observe=observe,
    )
    for seed, image in zip(seeds, images, strict=True):
        if not image.isfinite().all():
            raise InputError(
                f"the image of seed {seed} is not finite, which no picture can show; --dtype float32 or bf16 holds "
                "larger numbers than fp16."
            )
    return images


def origin(diffusion: GaussianDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """JSON data of all that an image depends on, except its seed and the flags that change only speed or memory."""
    config = diffusion.config.to_dict()
    sampler = asdict(sampler_config(args).resolve(diffusion.timesteps, diffusion.grids))
    return {
        "sampler": sampler.pop("name"),
        **{name: value for name, value in sampler.items() if value is not None},
        "dtype": args.dtype,
        "weights": args.weights,
        "model": config["model"],
        "diffusion": config["diffusion"],
        "digest": digest(diffusion.unet),
    }
