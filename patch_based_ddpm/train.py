"""Train a model: `accelerate launch -m patch_based_ddpm.train --config FILE`."""

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator

from patch_based_ddpm import command_line, processes
from patch_based_ddpm.config import Config, TrainerConfig
from patch_based_ddpm.data.sources import Source, open_source
from patch_based_ddpm.errors import InputError, explain_os_error
from patch_based_ddpm.planning import planner
from patch_based_ddpm.signals import REQUEUE_STATUS, Stopped
from patch_based_ddpm.training.run_folder import RunFolder
from patch_based_ddpm.training.trainer import Trainer, preview_sampler

EXCHANGE_TIMEOUT = timedelta(minutes=30)  # of gradients; long enough for a process that compiles, or builds an index
FROM_SCRATCH = (0, 1)  # with which the published implementation's --restart_step starts a new run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or with the process's own."""
    args = _parser().parse_args(argv)
    config = Config.load(args.config)
    preview_sampler(config)  # refuses wrong options before anything is written
    folder = RunFolder(Path(config.trainer.log_dir))
    accelerator = start_accelerator(config.trainer)
    resume = args.resume
    if args.restart_step is not None:
        resume = folder.checkpoint(args.restart_step)
        if args.restart_step in FROM_SCRATCH and not resume.exists():
            resume = None
    candidates = [] if resume is None else folder.candidates(str(resume))
    if resume is None and folder.steps() and not args.dry_run:
        raise InputError(
            f"{folder.checkpoints} already holds checkpoints up to step {folder.steps()[-1]}; continue with --resume "
            "latest, or choose another trainer.log_dir."
        )
    if folder.root.resolve().is_relative_to(Path(config.trainer.train_dataset_dir).resolve()):
        raise InputError(
            f"trainer.log_dir {str(folder.root)!r} lies in train_dataset_dir; its previews would become training "
            "images."
        )
    if not args.dry_run:
        folder.create()
    cache = None if args.dry_run else folder.root
    source = open_source(config.trainer.train_dataset_dir, *config.model.image_shape, config.trainer.seed, cache)
    if config.trainer.cache_images and source.size is None:
        raise InputError(
            f"trainer.cache_images is true, but {config.trainer.train_dataset_dir} draws images without end, which no "
            "file can hold; set it to false."
        )
    limit = None
    if args.max_memory is not None:
        limit, choice = planner.limit_patch_batch(
            planner.training_peak,
            config,
            config.trainer.train_batch_size,
            config.trainer.patch_batch_size,
            args.max_memory,
            precision=accelerator.mixed_precision,
            processes=accelerator.num_processes,
        )
        accelerator.print(choice)
    trainer = Trainer(config, accelerator, source, folder)
    if limit is not None:
        trainer.limit_patch_batch(limit)
    if candidates:
        trainer.resume(*candidates)
    if len(set(processes.gather(trainer.step))) > 1:
        raise InputError(
            f"the processes found different checkpoints; {folder.root} must be one folder for all of them."
        )
    accelerator.print(_plan(config, trainer, source, folder))
    if args.dry_run:
        return
    if accelerator.is_main_process:
        with explain_os_error(f"trainer.log_dir {str(folder.root)!r} cannot be written to"):
            config.save(folder.config)
            folder.discard_after(trainer.step)
    accelerator.wait_for_everyone()
    try:
        trainer.train()
    except Stopped as stop:
        accelerator.print(f"Stopped by {stop} at step {trainer.step}; --resume latest continues it.")
        sys.exit(REQUEUE_STATUS)
    accelerator.print(f"Done: {folder.last_checkpoint} holds step {trainer.step}.")
    accelerator.end_training()


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="patch_based_ddpm.train", description="Train a patch-based diffusion model.")
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="continue from a checkpoint; latest starts a new run if there is no checkpoint",
    )
    start.add_argument(
        "--restart-step",
        type=command_line.non_negative_int,
        metavar="N",
        help="continue from checkpoints/model-N.pt; without that file, 0 and 1 start a new run",
    )
    command_line.add_max_memory(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; writes nothing")
    return parser


def start_accelerator(trainer: TrainerConfig) -> Accelerator:
    """Join the processes of this run, in its precision. Raises InputError if the device does not support it."""
    precision = "fp16" if trainer.use_amp else trainer.mixed_precision  # None: as accelerate was launched
    accelerator = command_line.start_accelerator(timeout=EXCHANGE_TIMEOUT, mixed_precision=precision)
    processes.gather(None)  # makes the group of CPUs while no process is busy with something long
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would silently run in float32.
        raise InputError("mixed precision fp16 does not work on a CPU; it must be bf16 or no there.")
    return accelerator


def _plan(config: Config, trainer: Trainer, source: Source, folder: RunFolder) -> str:
    model, steps, accelerator = config.model, config.trainer.train_num_steps, trainer.accelerator
    images = max(0, steps - trainer.step) * trainer.images_per_step
    size, epochs = "endless", ""
    if source.size is not None:
        size, epochs = f"{source.size:,} images", f", {images / source.size:.1f} epochs"
    sides, patch_sides = (" x ".join(map(str, shape)) for shape in (model.image_shape, model.patch_shape))
    lines = {
        "data": f"{config.trainer.train_dataset_dir}, {size}",
        "images": f"{sides} px in {model.patch_divider}^2 patches of {patch_sides} px",
        "network": f"{sum(p.numel() for p in trainer.unet.parameters()):,} parameters",
        "steps": f"{trainer.step:,} to {steps:,}, {trainer.images_per_step:,} images each on "
        f"{accelerator.num_processes} process(es), {accelerator.mixed_precision} mixed precision",
        "device": f"{accelerator.device}, {torch.get_num_threads()} CPU thread(s) per process",
        "in all": f"{images:,} images{epochs}",
        "folder": str(folder.root),
    }
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


if __name__ == "__main__":
    command_line.run(main)
