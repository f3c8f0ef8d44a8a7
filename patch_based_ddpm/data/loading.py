"""The training images of one process, batch by batch: resized as they are read, or out of a cache built before."""

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
    path, built = cache_path, None
    if accelerator.is_main_process:
        num_workers = _num_workers(config) * _processes_of_this_machine()  # the others wait, and their workers too
        try:
            built = cache.build(path, images, on_bad_image=trainer.on_bad_image, num_workers=num_workers)
        except InputError as error:
            built = error
    built = processes.from_main(built)
    if isinstance(built, InputError):
        raise built
    return cache.open_cache(path, built)


def micro_batches(
    config: Config,
    accelerator: Accelerator,
    pixels: dataset.Pixels,
    step: int,
    report_bad_images: Callable[[tuple[int, ...]], None],
) -> Generator[Tensor, None, None]:
    """This process's batches, without end.

    Args:
        config: batch, order and flips.
        accelerator: tells this process from the others.
        pixels: the images.
        step: the optimizer step to begin with.
        report_bad_images: is told the indexes of unreadable images that were passed over for a batch.

    Yields:
        (b, c, H, W) float32 in [-1, 1], on the CPU.
    """
    trainer = config.trainer
    images = dataset.TrainingImages(
        pixels=pixels,
        horizontal_flip=trainer.horizontal_flip,
        seed=trainer.seed,
        on_bad_image=trainer.on_bad_image,
    )
    stream = dataset.ShuffledStream(
        size=pixels.size,
        seed=trainer.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start=step * trainer.train_batch_size * trainer.gradient_accumulate_every,
    )
    loader = dataset.loader(
        images,
        stream,
        batch_size=trainer.train_batch_size,
        num_workers=_num_workers(config),
        device=accelerator.device,
    )
    for batch, passed_over in loader:
        report_bad_images(passed_over)
        yield batch


def _num_workers(config: Config) -> int:
    """What the config says, or this process's fair share of the cores of its machine."""
    if config.trainer.num_workers is not None:
        return config.trainer.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // _processes_of_this_machine())


def _processes_of_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
