"""Draw images: `accelerate launch -m patch_based_ddpm.sample --ckpt FILE --out-dir DIR`."""

import argparse
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm

from patch_based_ddpm import command_line, processes
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.generation import animation, image_folder, options
from patch_based_ddpm.generation.image_folder import ARCHIVE_NAME, GRID_NAME, ImageFolder
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.samplers import SEED_LIMIT

GRID_LIMIT = 1024  # images in a grid; few programs open larger pictures
LIST_LIMIT = 10**6  # seeds of several ranges; those of a single one are not listed in memory


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or with the process's own."""
    parser = _parser()
    args = parser.parse_args(argv)
    seeds = _seeds(parser, args)
    if args.trajectory is None and (args.trajectory_of is not None or args.patch_borders):
        parser.error("--trajectory-of and --patch-borders go with --trajectory")
    options.check_flags(args)
    image_folder.check_place(args.out_dir)
    accelerator = command_line.start_accelerator()
    diffusion = options.load_model(args, accelerator, len(seeds))
    folder = ImageFolder(args.out_dir, diffusion.image_shape)
    if args.trajectory is not None:
        animation.make_folder(args.trajectory)
    processes.run_on_main(lambda: folder.claim(options.origin(diffusion, args), seeds, args.overwrite))
    _draw(folder, diffusion, seeds, args, accelerator)
    if accelerator.is_main_process and args.grid:
        folder.write_grid(seeds)
    if accelerator.is_main_process and args.npz:
        folder.write_npz(seeds)
    grid = f", side by side in {args.out_dir / GRID_NAME}" if args.grid else ""
    accelerator.print(f"{len(seeds)} images are in {args.out_dir}{grid}.")
    accelerator.end_training()


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="patch_based_ddpm.sample", description="Draw images from a trained model.")
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint or safetensors file, ours or a published one")
    add("--config", metavar="FILE", help="configuration; only a published checkpoint needs it")
    add("--out-dir", required=True, type=Path, metavar="DIR", help="where SEED.png files go")
    images = parser.add_mutually_exclusive_group().add_argument
    images("--n-samples", type=command_line.positive_int, default=16, metavar="N", help="default: 16")
    images("--seeds", type=_seed_list, metavar="A-B", help="one image per seed, for example 0-63 or 3,7,10-19")
    add("--seed", type=command_line.non_negative_int, metavar="S", help="seed of the first image (default: 0)")
    add("--overwrite", action="store_true", help="draw images again that are there already")
    add("--grid", action="store_true", help=f"also put all images into {GRID_NAME}")
    add("--npz", action="store_true", help=f"also put all images into {ARCHIVE_NAME}, as an array")
    add("--trajectory", type=animation.file_name, metavar="FILE", help="animate the first batch, as .webp or .gif")
    add("--trajectory-of", choices=animation.KINDS, help="the noisy or the predicted images (default: x_t)")
    add("--patch-borders", action="store_true", help="draw the borders of the patches into the animation")
    options.add_flags(parser)
    return parser


def _seeds(parser: command_line.Parser, args: argparse.Namespace) -> Sequence[int]:
    if args.seeds is not None and args.seed is not None:
        parser.error("--seed is the first of --n-samples seeds; it does not go with --seeds")
    first = args.seed or 0
    seeds = range(first, first + args.n_samples) if args.seeds is None else args.seeds
    if seeds[-1] >= SEED_LIMIT:
        parser.error(f"the last seed is {seeds[-1]}; seeds must be less than {SEED_LIMIT}")
    if args.grid and len(seeds) > GRID_LIMIT:
        parser.error(f"--grid shows at most {GRID_LIMIT} images, not {len(seeds)}")
    return seeds


def _seed_list(text: str) -> Sequence[int]:
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        if match is None or (seeds := range(int(match[1]), int(match[2] or match[1]) + 1)).stop <= seeds.start:
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} must be a seed, or a range A-B with A <= B")
        ranges.append(seeds)
    if len(ranges) > 1 and sum(seeds.stop - seeds.start for seeds in ranges) > LIST_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} names more than {LIST_LIMIT:,} seeds; that must be one range")
    return ranges[0] if len(ranges) == 1 else sorted(set().union(*ranges))


def _draw(
    folder: ImageFolder,
    diffusion: GaussianDiffusion,
    seeds: Sequence[int],
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """Draw this process's share of the missing images."""
    show = accelerator.is_main_process
    own = seeds[accelerator.process_index :: accelerator.num_processes]
    recorder, to_animate = None, ()
    if show and args.trajectory is not None:
        borders = diffusion.patch_divider if args.patch_borders else 1
        recorder = animation.Animation(args.trajectory_of or "x_t", borders)
        to_animate = own[: args.batch_size]  # even if their files exist
    with tqdm(total=len(own), desc="images", unit="image", disable=not show, dynamic_ncols=True) as bar:
        missing = _missing(folder, own, to_animate, bar)
        while batch := list(islice(missing, args.batch_size)):
            images = options.draw_batch(diffusion, batch, args, show, recorder)
            if recorder is not None:
                with image_folder.explain_unwritten(args.trajectory):
                    recorder.save(args.trajectory, images)
                recorder = None  # only the first batch is animated
            for seed, image in zip(batch, images.cpu(), strict=True):
                folder.write(seed, image)
            bar.update(len(batch))
    accelerator.wait_for_everyone()
    if show and (left := sum(1 for _ in folder.present(seeds))) < len(seeds):
        raise InputError(
            f"{len(seeds) - left} images in {folder.root} were removed while others were drawn; the same command draws "
            "those that are missing."
        )


def _missing(folder: ImageFolder, seeds: Sequence[int], always: Sequence[int], bar: tqdm) -> Iterator[int]:
    """The seeds in `always` and those without an image; the bar counts the others."""
    for seed in seeds:
        if seed in always or not folder.is_complete(seed):
            yield seed
        else:
            bar.update()


if __name__ == "__main__":
    command_line.run(main)
