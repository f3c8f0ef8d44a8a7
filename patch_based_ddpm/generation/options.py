"""What the commands that draw images share: their flags, the model made ready, and a batch of images."""

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
from patch_based_ddpm.generation.image_folder import digest
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.planning import planner
from patch_based_ddpm.samplers import SAMPLERS, Observe, SamplerConfig, timesteps


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of sampling."""
    parser.add_argument(
        "--batch-size", type=command_line.positive_int, default=8, metavar="B", help="images at a time (default: 8)"
    )
    parser.add_argument(
        "--patch-batch-size",
        type=command_line.positive_int,
        metavar="K",
        help="patches per forward pass, counted over the batch; fewer take less memory (default: all)",
    )
    command_line.add_max_memory(parser)
    parser.add_argument("--compile", action="store_true", help="compile the network: a slow start, then faster")
    default, all_samplers = SamplerConfig(), SAMPLERS.values()
    steps = ", ".join(f"{each.name} {each.default_steps or 'all'}" for each in all_samplers)
    orders = sorted({order for each in all_samplers for order in each.orders})
    order = ", ".join(f"{each.name} {each.default_order}" for each in all_samplers if each.orders)
    fewest = {each.name: each.fewest_logsnr_steps for each in all_samplers if each.fewest_logsnr_steps}
    logsnr = "".join(f"; {name} in {count} steps or more logsnr" for name, count in fewest.items())
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default=default.name, help=f"default: {default.name}")
    parser.add_argument(
        "--steps", type=command_line.positive_int, metavar="K", help=f"timesteps visited (default: {steps})"
    )
    parser.add_argument(
        "--eta",
        type=float,
        default=default.eta,
        help=f"noise that ddim and dpm-solver++ add at each step, 1: as much as ddpm (default: {default.eta:g})",
    )
    parser.add_argument("--order", type=int, choices=orders, help=f"default: {order}")
    spacings = tuple(timesteps.SPACINGS)
    parser.add_argument("--spacing", choices=spacings, help=f"of the timesteps (default: trailing{logsnr})")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last (default: ema)")
    parser.add_argument(
        "--dtype", choices=tuple(command_line.DTYPES), default="float32", help="of the network (default: float32)"
    )


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """The sampler that the flags describe.

    Raises:
        InputError: they contradict one another.
    """
    return SamplerConfig(name=args.sampler, steps=args.steps, eta=args.eta, order=args.order, spacing=args.spacing)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse a checkpoint that is not there, and flags that contradict one another.

    Raises:
        InputError: one of them.
    """
    sampler_config(args)
    if args.ckpt is not None:  # evaluate can do without
        checkpoint.check_path(args.ckpt)


def load_model(args: argparse.Namespace, accelerator: Accelerator, images: int) -> GaussianDiffusion:
    """Load the model of the flags, ready to draw a number of images.

    Raises:
        InputError: it cannot be loaded, has fewer timesteps than --steps, or does not fit into --max-memory.
    """
    sampler = sampler_config(args)
    config = None if args.config is None else Config.load(args.config)
    if config is not None:
        sampler.resolve(config.diffusion.timesteps)  # before the weights are read
    diffusion = checkpoint.load_diffusion(
        args.ckpt,
        config=config,
        weights=args.weights,
        device=accelerator.device,
        dtype=command_line.DTYPES[args.dtype],
    )
    sampler.resolve(diffusion.timesteps)
    if args.compile:
        diffusion.unet.compile(dynamic=False, mode=command_line.compile_mode(accelerator.device))
        diffusion.patch_batching.padded = True  # passes of one shape: compiled once
    if args.max_memory is not None:
        _limit_patch_batch(diffusion, min(args.batch_size, images), args, accelerator)
    return diffusion


def _limit_patch_batch(
    diffusion: GaussianDiffusion, images: int, args: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Let as many patches share a pass as fit into --max-memory, and print their number."""
    patches = diffusion.patch_divider**2 * images
    diffusion.patch_batching.limit, peak = planner.largest_patch_batch(
        lambda size: planner.sampling_peak(
            diffusion.config,
            batch_size=images,
            patch_batch_size=size,
            dtype=command_line.DTYPES[args.dtype],
            sampler=sampler_config(args),
        ),
        min(patches, args.patch_batch_size or patches),
        args.max_memory,
    )
    accelerator.print(planner.sentence(diffusion.patch_batching.limit, patches, peak, args.max_memory))


@torch.inference_mode()
def draw_batch(
    diffusion: GaussianDiffusion,
    seeds: Sequence[int],
    args: argparse.Namespace,
    show: bool,
    observe: Observe | None = None,
) -> Tensor:
    """Draw one image per seed as the flags say: (b, c, H, W) in [-1, 1], on the model's device."""
    return samplers.draw(
        diffusion,
        seeds,
        sampler=sampler_config(args),
        patch_batch_size=args.patch_batch_size,
        progress=lambda steps: tqdm(steps, desc="steps", disable=not show, leave=False, dynamic_ncols=True),
        observe=observe,
    )


def origin(diffusion: GaussianDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """JSON data of all that an image depends on, apart from its seed; not of what only changes speed or memory."""
    config = diffusion.config.to_dict()
    sampler = asdict(sampler_config(args).resolve(diffusion.timesteps))
    return {
        "sampler": sampler.pop("name"),
        **{name: value for name, value in sampler.items() if value is not None},
        "dtype": args.dtype,
        "weights": args.weights,
        "model": config["model"],
        "diffusion": config["diffusion"],
        "digest": digest(diffusion.unet),
    }
