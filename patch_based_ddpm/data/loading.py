"""The training batches of one process, of images that are resized as they are read or that come out of a cache."""

import os
from collections.abc import Callable, Generator
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from patch_based_ddpm import processes
from patch_based_ddpm.config import Config
from patch_based_ddpm.data import cache, dataset
from patch_based_ddpm.data.sources import Source
from patch_based_ddpm.errors import InputError


def prepare_pixels(config: Config, accelerator: Accelerator, source: Source, cache_path: Path) -> dataset.Pixels:
    """The images, resized as they are read, or out of the cache that the main process builds here for all.

    Raises:
        InputError: an image cannot be read or the cache not be built; in every process, so that none is left waiting.
    """
    trainer, model = config.trainer, config.model
    images = dataset.FittedImages(source, model.channels, *model.image_shape)
    if not trainer.cache_images:
        return images
    built = None
    if accelerator.is_main_process:
        num_workers = _num_workers(config) * _local_processes()  # while it builds, the others and their workers idle
        try:
            built = cache.build(cache_path, images, on_bad_image=trainer.on_bad_image, num_workers=num_workers)
        except InputError as error:
            built = error
    built = processes.from_main(built)
    if isinstance(built, InputError):
        raise built
    if cache.open_cache(cache_path, built.stamp) != built:
        raise InputError(
            f"the image cache {str(cache_path)!r} is not the one that the main process built; trainer.log_dir must be "
            "one folder for all processes."
        )
    return built


def micro_batches(
    config: Config,
    accelerator: Accelerator,
    pixels: dataset.Pixels,
    step: int,
    report_bad_images: Callable[[tuple[int, ...]], None],
) -> Generator[Tensor, None, None]:
    """This process's batches, without end, beginning with those of optimizer step `step`.

    `report_bad_images` is called with the indexes of the unreadable images that were skipped for a batch.

    Yields:
        (b, c, H, W) float32 in [-1, 1], on the CPU.
    """
    trainer = config.trainer
    images = dataset.TrainingImages(pixels, trainer.horizontal_flip, trainer.seed, trainer.on_bad_image)
    stream = dataset.ShuffledStream(
        size=pixels.size,
        seed=trainer.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start=step * trainer.train_batch_size * trainer.gradient_accumulate_every,
    )
    batch_size, num_workers, device = trainer.train_batch_size, _num_workers(config), accelerator.device
    for batch, skipped in dataset.loader(images, stream, batch_size=batch_size, num_workers=num_workers, device=device):
        report_bad_images(skipped)
        yield batch


def _num_workers(config: Config) -> int:
    """`trainer.num_workers`, or this process's share of the cores of its machine."""
    if config.trainer.num_workers is not None:
        return config.trainer.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // _local_processes())


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
