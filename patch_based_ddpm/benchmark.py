"""Measure memory and speed beside baseline networks, on this machine: `python -m patch_based_ddpm.benchmark`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from patch_based_ddpm import command_line
from patch_based_ddpm.benchmarking import measure
from patch_based_ddpm.benchmarking.plot import save_plot
from patch_based_ddpm.benchmarking.report import DEFINITIONS, markdown
from patch_based_ddpm.benchmarking.suite import Suite
from patch_based_ddpm.config import Config
from patch_based_ddpm.data.cache import prepare_pixels
from patch_based_ddpm.data.dataset import micro_batches
from patch_based_ddpm.data.sources import BUILTIN_FACES, Source, open_source
from patch_based_ddpm.errors import explain_os_error
from patch_based_ddpm.files import write_json
from patch_based_ddpm.training.run_folder import RunFolder

PAPER_DIM = 128
DTYPES = ("float32", "bf16")
IMAGES_PER_REPEAT = 256  # of the input pipeline


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or with the process's own."""
    args = _parse(argv)
    device = torch.device(args.device)
    config = _config(args)
    if args.suite:
        _run_suite(config, args)
        return
    configs = {N: dataclasses.replace(config, model=config.model.divided(N)) for N in (1, *args.patch_dividers)}
    source = None
    if not args.memory_only:  # before hours of measuring, as it may be missing
        trainer, shape = config.trainer, config.model.image_shape
        source = open_source(trainer.train_dataset_dir, *shape, trainer.seed, index_cache_dir=None)
    with explain_os_error(f"--out-dir {str(args.out_dir)!r} cannot be used"):
        args.out_dir.mkdir(parents=True, exist_ok=True)
        checkpoint_loading = measure.checkpoint_loading(configs[1], args.out_dir)
    torch.manual_seed(0)
    command_line.allow_tf32()

    chosen = measure.settings(args.patch_dividers, args.patch_batch_sizes, args.dtypes, args.batch_size)
    rows = {setting: {**vars(setting), "memory": {}, "seconds": {}} for setting in chosen}
    benchmarks = [
        measure.Benchmark(kind, configs, args.batch_size, device, compiled=args.compile) for kind in measure.STEPS
    ]
    for benchmark in benchmarks:
        for setting in tqdm(chosen, desc=f"memory of {benchmark.kind}", dynamic_ncols=True):
            rows[setting]["memory"][benchmark.kind] = benchmark.memory(setting)
    for benchmark in () if args.memory_only else benchmarks:
        fitting = [setting for setting in chosen if rows[setting]["memory"][benchmark.kind] is not None]
        seconds = benchmark.seconds(fitting, args.repeats)
        for setting in chosen:
            rows[setting]["seconds"][benchmark.kind] = seconds.get(setting)

    report = {
        "machine": _machine(device),
        "device": device.type,
        "config": configs[1].to_dict(),
        **{name: vars(args)[name] for name in ("patch_dividers", "patch_batch_sizes", "dtypes", "batch_size")},
        "compiled": args.compile,
        "repeats": 0 if args.memory_only else args.repeats,
        "settings": list(rows.values()),
        "checkpoint_loading": checkpoint_loading,
        "data_loading": None if source is None else _data_loading(configs[1], source, args),
        "definitions": DEFINITIONS,
    }
    path = args.out_dir / "benchmark.json"
    write_json(path, report)
    print(markdown(report))
    print(f"\nEvery figure and its definition is in {path}.")
    picture = args.out_dir / "benchmark.png"
    if command_line.can_plot(picture):
        save_plot(report, picture)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="patch_based_ddpm.benchmark", description="Measure memory and speed of training and sampling in patches."
    )
    count = command_line.positive_int
    add = parser.add_argument
    add("--config", metavar="FILE", help="configuration of the model and the data")
    add("--dim", type=count, help=f"or the model's width (default: {PAPER_DIM})")
    add("--dim-mults", type=_list_of(count), metavar="M,M", help="and the width of each level over it")
    add("--image-size", type=count, metavar="S", help="and the side of an image")
    add("--patch-dividers", type=_list_of(count), default=[1, 2, 4, 8], metavar="N,N", help="default: 1,2,4,8")
    add(
        "--patch-batch-sizes",
        type=_list_of(_count_or_all),
        default=[1, None],
        metavar="K,K",
        help="patches per forward pass, counted over the batch (default: 1,all)",
    )
    add("--batch-size", type=count, default=1, metavar="B", help="images in a step (default: 1)")
    add("--dtypes", type=_list_of(_dtype), default=list(DTYPES), help=f"default: {','.join(DTYPES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda where there is one")
    add("--repeats", type=count, default=5, metavar="R", help="rounds of timing (default: 5)")
    add("--out-dir", type=Path, default=Path("benchmark"), metavar="DIR", help="default: benchmark")
    add("--memory-only", action="store_true", help="leave the timing out")
    add("--compile", action="store_true", help="time our network through torch.compile")
    add("--suite", action="store_true", help="measure correctness, speed, memory and a profile in resumable pieces")
    add("--minutes", type=count, default=9, metavar="M", help="after which no piece of the suite starts (default: 9)")
    args = parser.parse_args(argv)
    if args.config is not None and (args.dim, args.dim_mults, args.image_size) != (None, None, None):
        parser.error("--dim, --dim-mults and --image-size describe a model; they do not go with --config")
    unused = ("patch_dividers", "patch_batch_sizes", "dtypes", "repeats", "memory_only", "compile")
    given = [name for name in unused if getattr(args, name) != parser.get_default(name)]
    if args.suite and given:
        parser.error(f"--{given[0].replace('_', '-')} does not go with --suite, which chooses its settings itself")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds no CUDA GPU here")
    return args


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """For `type=`: distinct values with commas between them."""
    return lambda text: list(dict.fromkeys(kind(part) for part in text.split(",")))


def _count_or_all(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return command_line.positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(DTYPES)}")
    return text


def _config(args: argparse.Namespace) -> Config:
    if args.config is not None:
        return Config.load(args.config)
    given = {"dim": args.dim or PAPER_DIM, "dim_mults": args.dim_mults, "image_size": args.image_size}
    model = {name: value for name, value in given.items() if value is not None}
    trainer = {"train_dataset_dir": BUILTIN_FACES, "log_dir": str(args.out_dir), "train_batch_size": args.batch_size}
    return Config.from_dict({"trainer": trainer, "model": {**model, "patch_divider": 1}})


def _run_suite(config: Config, args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    suite = Suite(config, args.batch_size, device, args.out_dir)
    complete = suite.run(args.minutes)
    write_json(args.out_dir / "machine.json", _machine(device))
    (args.out_dir / "suite.md").write_text(suite.markdown(), encoding="utf-8")
    print(suite.markdown())
    if not complete:
        print("The same command measures the other pieces.")


def _machine(device: torch.device) -> dict[str, Any]:
    listed = Path("/proc/cpuinfo")  # `platform` knows the processor's name on some systems only
    named = re.search(r"model name\s*: (.*)", listed.read_text()) if listed.exists() else None
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _data_loading(config: Config, source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """The speed of the input pipeline of a training run, with its cache if the config has one."""
    trainer = config.trainer
    accelerator = command_line.start_accelerator(cpu=args.device == "cpu")
    pixels = prepare_pixels(config, source, RunFolder(args.out_dir).image_cache)
    batches = micro_batches(config, accelerator, pixels, step=0, report_bad_images=lambda indexes: None)
    speeds = measure.loading_speed(batches, args.repeats, math.ceil(IMAGES_PER_REPEAT / trainer.train_batch_size))
    batches.close()  # ends its workers
    return {
        "data": trainer.train_dataset_dir,
        "cached": trainer.cache_images and source.size is not None,
        "num_workers": trainer.num_workers,
        "batch_size": trainer.train_batch_size,
        "images_per_second": speeds,
    }


if __name__ == "__main__":
    command_line.run(main)
