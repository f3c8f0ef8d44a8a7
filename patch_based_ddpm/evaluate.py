"""Compare samples with real images: `accelerate launch -m patch_based_ddpm.evaluate --samples DIR --data DIR`."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from patch_based_ddpm import command_line, processes
from patch_based_ddpm.config import Config
from patch_based_ddpm.data.sources import BUILTIN_FACES
from patch_based_ddpm.errors import InputError, explain_os_error
from patch_based_ddpm.evaluation import fid, image_sets, metrics, sliced_wasserstein
from patch_based_ddpm.evaluation.metrics import ImageStatistics
from patch_based_ddpm.files import write_json
from patch_based_ddpm.generation import options as sampling
from patch_based_ddpm.generation.image_folder import GRID_NAME
from patch_based_ddpm.model.diffusion import GaussianDiffusion
from patch_based_ddpm.training import tracking

COUNT = 10_000
OVERLAP_IMAGES = 64
CACHE_DIR = Path("logs") / "evaluation"

Batches = Callable[[range], Iterable[Tensor]]  # the images at some positions of a set, (b, c, H, W) at a time


class _Samples(NamedTuple):
    """The generated images; with the count None there are none, and the data set alone is described."""

    shape: tuple[int, int, int]
    patch_divider: int
    count: int | None = None
    batches: Batches | None = None
    config: Config | None = None
    diffusion: GaussianDiffusion | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or with the process's own."""
    args = _parse(argv)
    accelerator = command_line.start_accelerator()
    samples = _samples(args, accelerator)
    height, width = samples.shape[1:]
    sliced_wasserstein.check_size(height, width)
    N = samples.patch_divider
    if height % N or width % N:
        raise InputError(f"--patch-divider is {N}; it must divide both sides, {height} and {width}.")
    with explain_os_error(f"--cache-dir {str(args.cache_dir)!r} cannot be used"):
        args.cache_dir.mkdir(parents=True, exist_ok=True)
    on_bad_image = "stop" if samples.config is None else samples.config.trainer.on_bad_image
    data = image_sets.open_data(args.data, samples.shape, args.data_count, args.cache_dir, on_bad_image)
    extractor = None
    if args.fidelity:
        _check_fidelity(samples, len(data.indexes))
        with accelerator.local_main_process_first():  # one download serves all
            extractor = fid.Extractor(args.inception_weights, accelerator.device)

    def collect(label: str, count: int, batches: Batches) -> ImageStatistics:
        share = metrics.share_of(count, accelerator.process_index, accelerator.num_processes)
        options = {"label": label, "faces": args.data == BUILTIN_FACES, "extractor": extractor}
        options |= {"device": accelerator.device, "show": accelerator.is_main_process}
        return metrics.join(processes.gather(metrics.collect(batches(share), share, count, **options)))

    key = json.dumps([data.stamp(), extractor and extractor.stamp])
    cache = args.cache_dir / f"statistics-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    real = ImageStatistics.load(cache) if accelerator.is_main_process else None
    if not processes.from_main(real is not None):
        real = collect("data", len(data.indexes), partial(data.batches, batch_size=args.batch_size))
        if accelerator.is_main_process:
            with explain_os_error(f"{cache} cannot be written"):
                real.save(cache)
    generated = None if samples.count is None else collect("samples", samples.count, samples.batches)
    if accelerator.is_main_process:
        rows = metrics.figures(generated, real, N)
        if samples.diffusion is not None and samples.diffusion.grids > 1:
            images = data.batches(range(min(OVERLAP_IMAGES, len(data.indexes))), args.batch_size)
            rows += metrics.overlap_figures(samples.diffusion, images, args.patch_batch_size)
        drawing = {} if args.ckpt is None else _sampling(args)
        print(metrics.table(rows, (samples.count, real.count)))
        report = {
            "samples": samples.count and {"source": str(args.samples or args.ckpt), "count": samples.count, **drawing},
            "data": {"source": args.data, "count": real.count, "statistics": str(cache)},
            "image_shape": samples.shape,
            "patch_divider": N,
            "figures": metrics.as_json(rows),
            "definitions": metrics.DEFINITIONS,
        }
        if args.out is not None:
            with explain_os_error(f"{args.out} cannot be written"):
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(args.out, report)
            print(f"\nEvery figure and what it means is in {args.out}.")
        if args.wandb:
            scalars = {row.name: row.data if row.samples is None else row.samples for row in rows}
            project = samples.config and samples.config.trainer.wandb_project
            tracking.record(report, scalars, project=project, folder=args.cache_dir)
    accelerator.end_training()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="patch_based_ddpm.evaluate",
        description="Compare samples with real images; with neither --samples nor --ckpt, describe the real images.",
    )
    judged = parser.add_mutually_exclusive_group()
    judged.add_argument("--samples", type=Path, metavar="DIR", help="folder of samples, all of one size")
    judged.add_argument("--ckpt", metavar="FILE", help="or the checkpoint to draw them from, seeds 0 to n - 1")
    parser.add_argument("--data", required=True, metavar="DIR", help="real images: a folder, LSUN's, or builtin:faces")
    parser.add_argument(
        "--config", metavar="FILE", help="configuration: of a published checkpoint, or of --data without samples"
    )
    count = {"type": command_line.positive_int, "metavar": "N"}
    parser.add_argument("--n-samples", default=COUNT, **count, help=f"to draw from --ckpt (default: {COUNT})")
    parser.add_argument(
        "--data-count", default=COUNT, **count, help=f"real images, chosen at random (default: {COUNT} or all)"
    )
    parser.add_argument(
        "--patch-divider", **count, help="look for seams on the borders of N x N patches (default: the model's)"
    )
    parser.add_argument("--fidelity", action="store_true", help="also FID, KID, precision, recall (torch-fidelity)")
    parser.add_argument(
        "--inception-weights", type=Path, metavar="FILE", help="of torch-fidelity's Inception (default: download them)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--wandb", action="store_true", help="also report them to wandb")
    parser.add_argument(
        "--cache-dir", type=Path, default=CACHE_DIR, metavar="DIR", help=f"statistics of --data (default: {CACHE_DIR})"
    )
    sampling.add_flags(parser)
    args = parser.parse_args(argv)
    if args.samples is not None and args.config is not None:
        parser.error("--config does not go with --samples, which have a size of their own")
    if args.samples is None and args.ckpt is None and args.config is None:
        parser.error("--data alone needs --config, which says how large its images are")
    if args.inception_weights is not None and not args.fidelity:
        parser.error("--inception-weights goes with --fidelity")
    unused = [name for name in ("n_samples", *_sampling(args)) if getattr(args, name) != parser.get_default(name)]
    if args.ckpt is None and unused:
        parser.error(f"--{unused[0].replace('_', '-')} goes with --ckpt")
    sampling.check_flags(args)
    return args


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags of sampling, without --batch-size, which is for reading files, too."""
    flags = argparse.ArgumentParser()
    sampling.add_flags(flags)
    return {name: getattr(args, name) for name in vars(flags.parse_args([])) if name != "batch_size"}


def _samples(args: argparse.Namespace, accelerator: Accelerator) -> _Samples:
    if args.samples is not None:
        images = image_sets.open_samples(args.samples, leave_out=GRID_NAME)
        batches = partial(images.batches, batch_size=args.batch_size)
        return _Samples(images.shape, args.patch_divider or 1, len(images.indexes), batches)
    if args.ckpt is None:
        config = Config.load(args.config)
        count = batches = diffusion = None
    else:
        diffusion = sampling.load_model(args, accelerator, args.n_samples)
        config, count = diffusion.config, args.n_samples
        batches = partial(_draw, diffusion, args, accelerator.is_main_process)
    model = config.model
    shape = (model.channels, *model.image_shape)
    return _Samples(shape, args.patch_divider or model.patch_divider, count, batches, config, diffusion)


def _draw(diffusion: GaussianDiffusion, args: argparse.Namespace, show: bool, positions: range) -> Iterator[Tensor]:
    seeds = image_sets.shuffled(args.n_samples, args.n_samples)  # the order in which a folder's files are read
    for start in positions[:: args.batch_size]:
        batch = seeds[start : min(start + args.batch_size, positions.stop)]
        yield sampling.draw_batch(diffusion, batch, args, show)


def _check_fidelity(samples: _Samples, real: int) -> None:
    if samples.shape[0] == 4:
        raise InputError("--fidelity takes grey or RGB images; these have 4 channels.")
    for name, count in (("samples", samples.count), ("real images", real)):
        if count is not None and count < fid.FEWEST_IMAGES:
            raise InputError(f"--fidelity needs at least {fid.FEWEST_IMAGES} {name}; there are {count}.")


if __name__ == "__main__":
    command_line.run(main)
