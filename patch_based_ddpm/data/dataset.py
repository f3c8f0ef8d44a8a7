"""Training data: images of a source -> float32 (c, H, W) in [-1, 1], in an endless shuffled stream; and back to uint8.

Which image comes when, and whether it is mirrored, are functions of (seed, epoch, index), whatever the number of
workers; a stream may start anywhere, so a resumed run sees what the uninterrupted one would have seen.

Shapes: `b` images, `c` channels, `H W` image.
"""

import multiprocessing
import multiprocessing.forkserver
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from multiprocessing.context import BaseContext
from typing import Literal, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from patch_based_ddpm.data.decoding import UnreadableImage, fit, to_mode
from patch_based_ddpm.data.sources import Source
from patch_based_ddpm.randomness import Purpose, generator
from patch_based_ddpm.signals import ignored_by_children, outlive_signals

Sample = tuple[Tensor, tuple[int, ...]]


def to_float(pixels: Tensor) -> Tensor:
    """Turn uint8 values in [0, 255], of any shape, into float32 in [-1, 1]; `to_uint8` is the way back."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Turn floats, of any shape, into the nearest uint8 value; what lies outside [-1, 1] is clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Pixels(Protocol):
    """Numbered images of one size, ready to train on: `FittedImages`, or the same ones out of a cache."""

    @property
    def size(self) -> int | None:
        """Number of images, None for an endless source."""

    def read(self, index: int, flip: bool) -> np.ndarray:
        """Image `index`, mirrored if asked: (H, W, c) uint8, the caller's own; raises `UnreadableImage`."""


@dataclass(frozen=True)
class FittedImages:
    """The images of a source, each resized and cropped when it is read.

    Attributes:
        source: where the images come from.
        channels: c, see `to_mode`.
        height: H.
        width: W.
    """

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
        pixels: the images.
        horizontal_flip: mirror an image in half of the epochs, drawn by (seed, epoch, index).
        seed: 0 or more.
        on_bad_image: what an unreadable image does: `stop` raises, `skip` takes the next readable one.
    """

    pixels: Pixels
    horizontal_flip: bool
    seed: int
    on_bad_image: Literal["stop", "skip"]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Load one sample.

        Args:
            key: the epoch and the image's index.

        Returns:
            (c, H, W) float32 in [-1, 1], and the indexes of the unreadable images that were passed over for it.

        Raises:
            UnreadableImage: the image (`stop`) or every image there is (`skip`) cannot be used.
        """
        epoch, index = key
        flip = self.horizontal_flip and bool(
            torch.rand((), generator=generator(self.seed, Purpose.FLIP, epoch, index)) < 0.5
        )
        if self.on_bad_image == "stop" or self.pixels.size is None:
            return self._load(index, flip), ()
        passed_over: list[int] = []
        while len(passed_over) < self.pixels.size:
            candidate = (index + len(passed_over)) % self.pixels.size
            try:
                return self._load(candidate, flip), tuple(passed_over)
            except UnreadableImage as error:
                passed_over.append(candidate)
                last = error
        raise UnreadableImage(f"none of the {self.pixels.size} images can be used; of the last one tried: {last}")

    def _load(self, index: int, flip: bool) -> Tensor:
        pixels = torch.from_numpy(self.pixels.read(index, flip))
        return to_float(rearrange(pixels, "h w c -> c h w")).contiguous()


def collate(samples: list[Sample]) -> Sample:
    """Join b samples into (b, c, H, W) float32 and the indexes of all images that were passed over for them."""
    images, passed_over = zip(*samples, strict=True)
    return torch.stack(images), tuple(chain(*passed_over))


@dataclass(frozen=True, kw_only=True)
class ShuffledStream(Sampler[tuple[int, int]]):
    """One process's share of the endless stream of (epoch, index); each iteration over it begins at `start`.

    Process r of W takes the positions r, r + W, r + 2W, ... of the whole stream. Position p lies in epoch p // size,
    and every epoch has an order of its own. An endless source has one epoch: there position p is (0, p).

    Attributes:
        size: images of the source, None for an endless one.
        seed: of the orders, 0 or more.
        process_index: r.
        num_processes: W.
        start: samples that this process has taken before.
    """

    size: int | None
    seed: int
    process_index: int
    num_processes: int
    start: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        positions = count(self.process_index + self.start * self.num_processes, self.num_processes)
        if self.size is None:
            for position in positions:
                yield 0, position
        shuffled = -1
        for position in positions:
            epoch, place = divmod(position, self.size)
            if epoch != shuffled:
                order = torch.randperm(self.size, generator=generator(self.seed, Purpose.SHUFFLE, epoch))
                shuffled = epoch
            yield epoch, int(order[place])


class _Carried(Dataset):
    """Returns an `UnreadableImage` as a sample: raised in a worker, torch would bury its sentence in a traceback."""

    def __init__(self, images: TrainingImages):
        self.images = images

    def __getitem__(self, key: tuple[int, int]) -> Sample | UnreadableImage:
        try:
            return self.images[key]
        except UnreadableImage as error:
            return error


def _collate_carried(samples: list[Sample | UnreadableImage]) -> Sample | UnreadableImage:
    errors = [sample for sample in samples if isinstance(sample, UnreadableImage)]
    return errors[0] if errors else collate(samples)


class _Batches(DataLoader):
    """Raises in the main process what `_Carried` carried there."""

    def __iter__(self) -> Iterator[Sample]:
        for batch in super().__iter__():
            if isinstance(batch, UnreadableImage):
                raise batch
            yield batch


def loader(
    images: TrainingImages,
    stream: Iterable[tuple[int, int]],
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> DataLoader:
    """Load batches, the same ones for every number of workers.

    Args:
        images: the samples.
        stream: their keys in order, a `ShuffledStream` or a finite list.
        batch_size: b.
        num_workers: processes that load images; 0 loads them in this one.
        device: where the batches will go; for a GPU they are put into pinned memory.

    Returns:
        An iterable of what `collate` returns. Iterating raises `UnreadableImage`, also for images met in a worker.
    """
    return _Batches(
        _Carried(images),
        batch_size=batch_size,
        sampler=stream,
        num_workers=num_workers,
        collate_fn=_collate_carried,
        pin_memory=device.type == "cuda",
        multiprocessing_context=worker_context() if num_workers else None,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # torch draws the workers' unused seeds from it, and not from the global generator
        persistent_workers=num_workers > 0,
    )


def worker_context() -> BaseContext:
    """How worker processes start: forked off a clean server process, or spawned where the system has none.

    Not forked off the training process: that one has threads and a GPU, and forking those may deadlock, which Python
    3.12 warns of. A script that uses workers therefore needs the usual `if __name__ == "__main__":`.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # torch is imported once, not by every worker
    with ignored_by_children():
        multiprocessing.forkserver.ensure_running()
    return context
