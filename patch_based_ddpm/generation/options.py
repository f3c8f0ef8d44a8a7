"""What the commands that draw images share: the flags that say how, the model made ready, and one batch of images."""

import argparse
from collections.abc import Sequence
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
from patch_based_ddpm.samplers import options, timesteps
from patch_based_ddpm.samplers.loop import Observe


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how to draw."""
    parser.add_argument(
        "--batch-size", type=command_line.positive_int, default=8, metavar="B", help="images at a time (default: 8)"
    )
    parser.add_argument(
        "--patch-batch-size",
        type=command_line.positive_int,
        metavar="K",
        help="patches per forward pass, counted over the batch; less is less memory (default: all)",
    )
    command_line.add_max_memory(parser)
    parser.add_argument("--compile", action="store_true", help="compile the network: a slow start, then faster")
    parser.add_argument("--sampler", choices=options.SAMPLERS, default="ddpm", help="default: ddpm")
    parser.add_argument(
        "--steps", type=command_line.positive_int, metavar="K", help="(default: all, or 20 of dpm-solver++)"
    )
    parser.add_argument("--eta", type=_fraction, default=0.0, help="0: ddim or dpm-solver++ without noise, 1: with all")
    parser.add_argument("--order", type=int, choices=options.ORDERS, help="of dpm-solver++ (default: 2)")
    parser.add_argument(
        "--spacing", choices=timesteps.SPACINGS, help="of the steps (default: trailing, or logsnr of dpm-solver++)"
    )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last (default: ema)")
    parser.add_argument(
        "--dtype", choices=tuple(command_line.DTYPES), default="float32", help="of the network (default: float32)"
    )


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number in [0, 1]")
    return value


def check_flags(args: argparse.Namespace) -> None:
    """Refuse a checkpoint that is not there, and flags that contradict one another.

    Raises:
        InputError: one of them.
    """
    options.check(args.sampler, eta=args.eta, order=args.order)
    if args.ckpt is not None:  # evaluate can do without
        checkpoint.check_path(args.ckpt)


def load_model(args: argparse.Namespace, accelerator: Accelerator, images: int) -> GaussianDiffusion:
    """Load the model as the flags say, ready to draw so many images.

    Raises:
        InputError: it cannot be loaded, has fewer timesteps than --steps, or does not fit into --max-memory.
    """
    config = None if args.config is None else Config.load(args.config)
    if config is not None and args.steps is not None:
        timesteps.check(config.diffusion.timesteps, args.steps)  # before the weights are read
    diffusion = checkpoint.load_diffusion(
        args.ckpt,
        config=config,
        weights=args.weights,
        device=accelerator.device,
        dtype=command_line.DTYPES[args.dtype],
    )
    if args.steps is not None:
        timesteps.check(diffusion.timesteps, args.steps)
    if args.compile:
        diffusion.unet.compile(dynamic=False, mode=command_line.compile_mode(accelerator.device))
        diffusion.patch_batching.padded = True  # passes of one shape: compiled once
    if args.max_memory is not None:
        _limit_passes(diffusion, min(args.batch_size, images), args, accelerator)
    return diffusion


def _limit_passes(
    diffusion: GaussianDiffusion, images: int, args: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Let as many patches share a pass as fit; says how many."""
    patches = diffusion.patch_divider**2 * images
    diffusion.patch_batching.limit, peak = planner.largest_patch_batch(
        lambda size: planner.sampling_peak(
            diffusion.config,
            batch_size=images,
            patch_batch_size=size,
            dtype=command_line.DTYPES[args.dtype],
            sampler=args.sampler,
            eta=args.eta,
            order=args.order,
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
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        order=args.order,
        spacing=args.spacing,
        patch_batch_size=args.patch_batch_size,
        progress=lambda steps: tqdm(steps, desc="steps", disable=not show, leave=False, dynamic_ncols=True),
        observe=observe,
    )


def origin(diffusion: GaussianDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """All that an image depends on apart from its seed, as JSON data; not what merely says how it is computed."""
    config = diffusion.config.to_dict()
    given = {name: getattr(args, name) for name in ("steps", "order", "spacing")}
    given = {name: value for name, value in given.items() if value is not None}
    return {
        "sampler": args.sampler,
        "eta": args.eta,
        **options.defaults(args.sampler, diffusion.timesteps),
        **given,
        "dtype": args.dtype,
        "weights": args.weights,
        "model": config["model"],
        "diffusion": config["diffusion"],
        "digest": digest(diffusion.unet),
    }
