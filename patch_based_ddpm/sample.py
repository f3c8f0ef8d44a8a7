"""Draw images: `accelerate launch -m patch_based_ddpm.sample --ckpt FILE --out-dir DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from patch_based_ddpm import command_line, npz, pictures, planner, samplers
from patch_based_ddpm.checkpoint import load_diffusion
from patch_based_ddpm.config import SAMPLERS
from patch_based_ddpm.diffusion import GaussianDiffusion
from patch_based_ddpm.errors import InputError

GRID_NAME = "grid.png"
SEED_LIMIT = 2**32  # what a CPU generator of PyTorch tells apart


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or with the process's own."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seed is not None:
        parser.error("--seed is the first of --n-samples seeds; it does not go with --seeds")
    first = args.seed or 0
    seeds = range(first, first + args.n_samples) if args.seeds is None else args.seeds
    if seeds[-1] >= SEED_LIMIT:
        parser.error(f"the last seed is {seeds[-1]}; seeds must be less than {SEED_LIMIT}")
    check_sampling_flags(parser, args)
    accelerator = command_line.start_accelerator()
    diffusion = load_model(args, accelerator, len(seeds))
    args.out_dir = _folder(args.out_dir)
    own = seeds[accelerator.process_index :: accelerator.num_processes]
    _draw(diffusion, own, args, show=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and args.grid:
        pictures.save_png(args.out_dir / GRID_NAME, _grid([args.out_dir / _name(seed) for seed in seeds]))
    if accelerator.is_main_process and args.npz:
        npz.write(args.out_dir / npz.NAME, [args.out_dir / _name(seed) for seed in seeds])
    what = args.out_dir / GRID_NAME if args.grid else args.out_dir
    accelerator.print(
        f"{len(seeds)} images are in {args.out_dir}" + (f", side by side in {what}." if args.grid else ".")
    )
    accelerator.end_training()


def load_model(args: argparse.Namespace, accelerator: Accelerator, images: int) -> GaussianDiffusion:
    """Load the model as the flags say, ready to draw so many images."""
    diffusion = load_diffusion(
        args.ckpt,
        config=args.config,
        weights=args.weights,
        device=accelerator.device,
        dtype=command_line.DTYPES[args.dtype],
    )
    if args.compile:
        # CUDA graphs want every pass of one shape; elsewhere it saves a second compilation.
        diffusion.unet.compile(dynamic=False, mode="reduce-overhead" if accelerator.device.type == "cuda" else None)
        diffusion.passes.padded = True
    if args.max_memory is not None:
        _limit_passes(diffusion, min(args.batch_size, images), args, accelerator)
    if args.steps is not None:
        samplers.strided_timesteps(diffusion.timesteps, args.steps)
    return diffusion


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="patch_based_ddpm.sample", description="Draw images from a trained model.")
    parser.add_argument(
        "--ckpt", required=True, metavar="FILE", help="checkpoint or safetensors file, ours or a published one"
    )
    parser.add_argument("--config", metavar="FILE", help="configuration; only a published checkpoint needs it")
    parser.add_argument("--out-dir", required=True, type=Path, metavar="DIR", help="where SEED.png files go")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--n-samples", type=command_line.positive_int, default=16, metavar="N", help="default: 16")
    count.add_argument(
        "--seeds", type=_seed_list, metavar="A-B", help="one image per seed, for example 0-63 or 3,7,10-19"
    )
    parser.add_argument(
        "--seed", type=command_line.non_negative_int, metavar="S", help="first of the n seeds (default: 0)"
    )
    parser.add_argument("--grid", action="store_true", help=f"also put all images into {GRID_NAME}")
    parser.add_argument("--npz", action="store_true", help=f"also put all images into {npz.NAME}, as an array")
    add_sampling_flags(parser)
    return parser


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="default: ddpm, all steps")
    parser.add_argument("--steps", type=command_line.positive_int, metavar="K", help="steps of ddim (default: all)")
    parser.add_argument("--eta", type=_fraction, default=0.0, help="0: deterministic ddim, 1: as noisy as ddpm")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last (default: ema)")
    parser.add_argument(
        "--dtype", choices=tuple(command_line.DTYPES), default="float32", help="of the network (default: float32)"
    )


def check_sampling_flags(parser: command_line.Parser, args: argparse.Namespace) -> None:
    """End the command where flags contradict one another."""
    if args.sampler == "ddpm" and (args.steps is not None or args.eta != 0):
        parser.error("--steps and --eta go with --sampler ddim; ddpm takes all steps")


def _seed_list(text: str) -> Sequence[int]:
    seeds: set[int] = set()
    parts = text.split(",")
    for part in parts:
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal() or int(last) < int(first):
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} must be a seed, or a range A-B with A <= B")
        if int(last) >= SEED_LIMIT:
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} must be less than {SEED_LIMIT}")
        span = range(int(first), int(last) + 1)
        if len(parts) == 1:
            return span
        seeds.update(span)
    return sorted(seeds)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number in [0, 1]")
    return value


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out-dir {str(path)!r} cannot be used: {error.strerror}.") from None
    return path


def _name(seed: int) -> str:
    return f"{seed:06d}.png"


def _draw(diffusion: GaussianDiffusion, seeds: Sequence[int], args: argparse.Namespace, show: bool) -> None:
    """Draw this process's images, a batch at a time, and write each as a PNG file."""
    with tqdm(total=len(seeds), desc="images", unit="image", disable=not show, dynamic_ncols=True) as bar:
        for start in range(0, len(seeds), args.batch_size):
            batch = seeds[start : start + args.batch_size]
            images = draw_batch(diffusion, batch, args, show)
            for seed, image in zip(batch, images.cpu(), strict=True):
                pictures.save_png(args.out_dir / _name(seed), pictures.pixels(image))
            bar.update(len(batch))


@torch.inference_mode()
def draw_batch(diffusion: GaussianDiffusion, seeds: Sequence[int], args: argparse.Namespace, show: bool) -> Tensor:
    """Draw one image per seed as the flags say: (b, c, H, W) in [-1, 1], on the model's device."""
    return samplers.draw(
        diffusion,
        seeds,
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        patch_batch_size=args.patch_batch_size,
        progress=lambda steps: tqdm(steps, desc="steps", disable=not show, leave=False, dynamic_ncols=True),
    )


def _limit_passes(
    diffusion: GaussianDiffusion, images: int, args: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Let as many patches share a pass as fit; says how many."""
    patches = diffusion.patch_divider**2 * images
    diffusion.passes.limit, peak = planner.largest_patch_batch(
        lambda size: planner.sampling_peak(
            diffusion.config, batch_size=images, patch_batch_size=size, dtype=command_line.DTYPES[args.dtype]
        ),
        min(patches, args.patch_batch_size or patches),
        args.max_memory,
    )
    command_line.hold_to(accelerator.device, args.max_memory)
    accelerator.print(planner.sentence(diffusion.passes.limit, patches, peak, args.max_memory))


def _grid(paths: list[Path]) -> np.ndarray:
    return pictures.tile([np.array(Image.open(path)) for path in paths])


if __name__ == "__main__":
    command_line.run(main)
