"""How much memory a model will need: `python -m patch_based_ddpm.memory --config FILE`.

Nothing is trained and no GPU is needed, see `planning/planner.py`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from tqdm.auto import tqdm

from patch_based_ddpm import command_line
from patch_based_ddpm.config import Config
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.planning import planner
from patch_based_ddpm.planning.live_memory import MIB

DIVIDERS = (1, 2, 4, 8)
HEADER = ("N", "patch batch", "training activations", "training in all", "sampling activations", "sampling in all")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or with the process's own."""
    args = _parser().parse_args(argv)
    config = Config.load(args.config)
    images = args.batch_size or config.trainer.train_batch_size
    precision = args.mixed_precision or ("fp16" if config.trainer.use_amp else config.trainer.mixed_precision) or "no"
    size = args.patch_batch_size or config.trainer.patch_batch_size
    rows = [HEADER]
    chosen = list(_settings(config, images, [size] if size else [1, None]))
    for divided, patches, size in tqdm(chosen, desc="planning", leave=False, dynamic_ncols=True):
        shared = {"batch_size": images, "patch_batch_size": size}
        training = planner.training_peak(divided, **shared, precision=precision)
        sampling = planner.sampling_peak(divided, **shared, dtype=command_line.DTYPES[args.dtype])
        figures = (training.activations, training.total, sampling.activations, sampling.total)
        sizes = (f"{figure / MIB:,.1f}" for figure in figures)
        rows.append((str(divided.model.patch_divider), f"{size} of {patches}", *sizes))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"MiB of tensors, {images} image(s) at a time; training in precision {precision}, sampling in {args.dtype}")
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="patch_based_ddpm.memory", description="Predict the peak memory of training and sampling."
    )
    count, add = command_line.positive_int, parser.add_argument
    add("--config", required=True, metavar="FILE", help="JSON configuration")
    add("--batch-size", type=count, metavar="B", help="images at a time (default: the config's)")
    add(
        "--patch-batch-size",
        type=count,
        metavar="K",
        help="patches per pass (default: the config's; if it has none, 1 and all)",
    )
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="of training (default: the config's)")
    add("--dtype", choices=tuple(command_line.DTYPES), default="float32", help="of sampling")
    return parser


def _settings(config: Config, images: int, sizes: list[int | None]) -> Iterator[tuple[Config, int, int]]:
    """The config at each N that its image size allows, its own N among them, with its patches and each patch batch."""
    for divider in sorted({*DIVIDERS, config.model.patch_divider}):
        try:
            divided = dataclasses.replace(config, model=config.model.divided(divider))
        except InputError:
            continue
        patches = divider**2 * images
        for size in dict.fromkeys(min(size or patches, patches) for size in sizes):
            yield divided, patches, size


if __name__ == "__main__":
    command_line.run(main)
