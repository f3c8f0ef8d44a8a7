"""Training data: images of a source -> float32 (c, H, W) in [-1, 1], in an endless shuffled stream; and back to uint8.

The order of the images and their flips depend on (seed, epoch, index) alone, so a resumed run repeats the
uninterrupted one, with any number of workers.

Shapes: `b` images, `c` channels, `H W` image.
"""

import multiprocessing.forkserver
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from patch_based_ddpm.config import Config
from patch_based_ddpm.data.sources import Source, UnreadableImage
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.randomness import Purpose, generator
from patch_based_ddpm.signals import handled_by, outlive_signals

Indexes = tuple[int, ...]
Sample = tuple[Tensor, Indexes]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 values in [0, 255], of any shape, to float32 in [-1, 1]; `to_uint8` is the inverse."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1], of any shape, to the nearest uint8 value; values outside are clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image of any mode to 8-bit grey, RGB or RGBA.

    Args:
        image: any mode that Pillow reads; integers in [0, 65535] in the modes `I...`, floats in [0, 1] in `F`.
        channels: 1 (L) or 3 (RGB), transparency blended onto white; or 4 (RGBA).

    Raises:
        InputError: another number of channels, or values outside the ranges above.
    """
    if channels not in _MODES:
        raise InputError(f"channels is {channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA).")
    if image.mode == "F" or image.mode.startswith("I"):
        values, scale = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= scale):
            raise InputError(f"its values run from {values.min()} to {values.max()}; they must lie in [0, {scale}].")
        image = Image.fromarray(np.rint(values * (255 / scale)).astype(np.uint8))
    if channels != 4 and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(_MODES[channels])


def fit(image: Image.Image, height: int, width: int, flip: bool) -> Image.Image:
    """Resize an L, RGB or RGBA image to just cover (height, width), mirror it if `flip`, and crop the centre.

    The published order: shorter side to the target (bilinear, antialiased), flip, centre crop. Unlike the published
    code, only the crop is resampled, which saves memory on very long images; about one value in 700 differs by one
    level (of 255), because Pillow rounds the corners of the crop to single precision.
    """
    if width * image.height >= height * image.width:
        resized_width, resized_height = width, width * image.height // image.width
    else:
        resized_width, resized_height = height * image.width // image.height, height
    left = round((resized_width - width) / 2)
    top = round((resized_height - height) / 2)
    if flip:
        left = resized_width - width - left  # the crop of the mirrored image, in coordinates of the original
    x, y = image.width / resized_width, image.height / resized_height
    box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    fitted = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(fitted) if flip else fitted


class Pixels(Protocol):
    """Numbered images of one size, such as `FittedImages` or `CachedImages`."""

    @property
    def size(self) -> int | None:
        """Number of images, None for an endless source."""

    def read(self, index: int, flip: bool) -> np.ndarray:
        """A copy of image `index`, mirrored if `flip`: (H, W, c) uint8; raises `UnreadableImage`."""


@dataclass(frozen=True)
class FittedImages:
    """The images of a source, resized and cropped when they are read."""

    source: Source
    channels: int
    height: int
    width: int

    @property
    def size(self) -> int | None:
        return self.source.size

    def read(self, index: int, flip: bool) -> np.ndarray:
        image = self.source.read(index)
        try:
            image = fit(to_mode(image, self.channels), self.height, self.width, flip)
        except ValueError as error:
            raise UnreadableImage(f"{self.source.name(index)} cannot be used: {error}") from error
        return np.array(image).reshape(self.height, self.width, self.channels)


@dataclass(frozen=True)
class TrainingImages(Dataset):
    """Images as training samples, keyed by (epoch, index).

    Attributes:
        horizontal_flip: mirror each image with probability 1/2, drawn by (seed, epoch, index).
        on_bad_image: at an unreadable image, `stop` raises and `skip` takes the next readable one.
    """

    pixels: Pixels
    horizontal_flip: bool
    seed: int
    on_bad_image: Literal["stop", "skip"]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Load the image of (epoch, index).

        Returns:
            (c, H, W) float32 in [-1, 1], and the indexes of the unreadable images that were skipped.

        Raises:
            UnreadableImage: the image (`stop`) or every image (`skip`) cannot be used.
        """
        epoch, index = key
        flip = self.horizontal_flip and bool(
            torch.rand((), generator=generator(self.seed, Purpose.FLIP, epoch, index)) < 0.5
        )
        size = self.pixels.size
        if self.on_bad_image == "stop" or size is None:
            return self._load(index, flip), ()
        skipped: list[int] = []
        while len(skipped) < size:
            candidate = (index + len(skipped)) % size
            try:
                return self._load(candidate, flip), tuple(skipped)
            except UnreadableImage as error:
                skipped.append(candidate)
                last = error
        raise UnreadableImage(f"none of the {size} images can be used; of the last one tried: {last}")

    def _load(self, index: int, flip: bool) -> Tensor:
        pixels = torch.from_numpy(self.pixels.read(index, flip))
        return to_float(rearrange(pixels, "h w c -> c h w")).contiguous()


@dataclass(frozen=True, kw_only=True)
class ShuffledStream(Sampler[tuple[int, int]]):
    """One process's share of the endless stream of (epoch, index).

    Process r of W takes the positions r, r + W, r + 2W, ... of the whole stream, from its `start`-th on. Position p
    lies in epoch p // size, and every epoch is shuffled anew; in an endless source (size None) it is (0, p).
    """

    size: int | None
    seed: int
    process_index: int
    num_processes: int
    start: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shuffled = -1
        for position in count(self.process_index + self.start * self.num_processes, self.num_processes):
            if self.size is None:
                yield 0, position
                continue
            epoch, place = divmod(position, self.size)
            if epoch != shuffled:
                order = torch.randperm(self.size, generator=generator(self.seed, Purpose.SHUFFLE, epoch))
                shuffled = epoch
            yield epoch, int(order[place])


def micro_batches(
    config: Config, accelerator: Accelerator, pixels: Pixels, step: int, report_bad_images: Callable[[Indexes], None]
) -> Generator[Tensor, None, None]:
    """This process's endless training batches from optimizer step `step` on, (b, c, H, W) in [-1, 1], on the CPU.

    `report_bad_images` is called for each batch with the indexes of the unreadable images that it skipped.
    """
    trainer = config.trainer
    images = TrainingImages(pixels, trainer.horizontal_flip, trainer.seed, trainer.on_bad_image)
    stream = ShuffledStream(
        size=pixels.size,
        seed=trainer.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start=step * trainer.train_batch_size * trainer.gradient_accumulate_every,
    )
    options = {"batch_size": trainer.train_batch_size, "num_workers": workers(config), "device": accelerator.device}
    for batch, skipped in loader(images, stream, **options):
        report_bad_images(skipped)
        yield batch


def workers(config: Config) -> int:
    """`trainer.num_workers`, or this process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, cores // local_processes())
    return share if config.trainer.num_workers is None else config.trainer.num_workers


def local_processes() -> int:
    """The number of training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def loader(
    images: TrainingImages, stream: ShuffledStream, *, batch_size: int, num_workers: int, device: torch.device
) -> Iterator[Sample]:
    """Load batches in the order of `stream`, into pinned memory for a GPU; with 0 workers in this process.

    Yields:
        (b, c, H, W) float32 in [-1, 1], and the indexes of all images that were skipped.
    """
    options = {"batch_size": batch_size, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    for batch in load_in_workers(images.__getitem__, stream, num_workers, **options):
        if isinstance(batch, UnreadableImage):
            raise batch
        yield batch


def collate(samples: list[Sample | UnreadableImage]) -> Sample | UnreadableImage:
    """Join samples into a batch, or return the first error among them."""
    for sample in samples:
        if isinstance(sample, UnreadableImage):
            return sample
    images, skipped = zip(*samples, strict=True)
    return torch.stack(images), tuple(chain(*skipped))


def load_in_workers(load: Callable[[Any], Any], keys: Iterable[Any], num_workers: int, **options: Any) -> DataLoader:
    """A DataLoader over `load(key)` of each key, or the `UnreadableImage` that it raises."""
    return DataLoader(
        _ReturnErrors(load),
        sampler=keys,
        num_workers=num_workers,
        multiprocessing_context=_worker_context() if num_workers else None,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # torch draws unused seeds for the workers; not from the global generator
        **options,
    )


@dataclass(frozen=True)
class _ReturnErrors(Dataset):
    """Returns an `UnreadableImage`, as torch would wrap one that a worker raises in a traceback."""

    load: Callable[[Any], Any]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.load(key)
        except UnreadableImage as error:
            return error


def _worker_context() -> multiprocessing.context.BaseContext:
    """Forks workers off a clean server process, or spawns them where the system has none.

    To fork a process that has threads and a GPU may deadlock. Scripts therefore need `if __name__ == "__main__":`.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # torch is imported once, not by every worker
    with handled_by(signal.SIG_IGN):  # the processes that the server forks inherit this
        multiprocessing.forkserver.ensure_running()
    return context
