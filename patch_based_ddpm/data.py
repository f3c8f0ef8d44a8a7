"""Training data: images of a source -> float32 (c, H, W) in [-1, 1], in an endless shuffled stream; and back to uint8.

Which image comes when, and whether it is mirrored, are functions of (seed, epoch, index), whatever the number of
workers; a stream may start anywhere, so a resumed run sees what the uninterrupted one would have seen.

Shapes: `b` images, `c` channels, `H W` image.
"""

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from multiprocessing.context import BaseContext
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from patch_based_ddpm.randomness import Purpose, generator
from patch_based_ddpm.sources import Source, UnreadableImage

Sample = tuple[Tensor, tuple[int, ...]]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_float(pixels: Tensor) -> Tensor:
    """Turn uint8 values in [0, 255], of any shape, into float32 in [-1, 1]; `to_uint8` is the way back."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Turn floats, of any shape, into the nearest uint8 value; what lies outside [-1, 1] is clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image of any kind to 8 bits of grey, RGB or RGBA.

    16-bit grey is scaled, not cut off. Transparency shows white where the result has none to carry it.

    Args:
        image: any mode that Pillow reads; integers in [0, 65535] in the modes `I...`, floats in [0, 1] in `F`.
        channels: 1 (mode L), 3 (RGB) or 4 (RGBA, opaque where the image has no transparency).

    Returns:
        The image in that mode.

    Raises:
        ValueError: another number of channels, or values outside the ranges above.
    """
    if channels not in _MODES:
        raise ValueError(f"channels is {channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA).")
    image = _to_eight_bits(image)
    if channels != 4 and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(_MODES[channels])


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        values, scale = np.asarray(image), 1
    elif image.mode.startswith("I"):
        values, scale = np.asarray(image), 65535
    else:
        return image
    if not (values.min() >= 0 and values.max() <= scale):
        raise ValueError(f"its values run from {values.min()} to {values.max()}; they must lie in [0, {scale}].")
    return Image.fromarray(np.rint(values * (255 / scale)).astype(np.uint8))


def fit(image: Image.Image, height: int, width: int, flip: bool) -> Image.Image:
    """Resize until the image just covers the target, mirror it if asked, and cut out its centre.

    The published order: shorter side to the target (bilinear, antialiased), flip, centre crop. All of it happens in one
    resampling of the window that is kept, so a very long image costs no more memory than another.

    Args:
        image: mode L, RGB or RGBA; Pillow keeps the colours of transparent pixels from bleeding into the others.
        height: H of the result.
        width: W of the result.
        flip: mirror left and right.

    Returns:
        (H, W) image of the same mode.
    """
    if width * image.height >= height * image.width:
        resized_width, resized_height = width, width * image.height // image.width
    else:
        resized_width, resized_height = height * image.width // image.height, height
    left = round((resized_width - width) / 2)
    top = round((resized_height - height) / 2)
    if flip:
        left = resized_width - width - left  # where the crop of the mirrored image lies in the image as it is
    x, y = image.width / resized_width, image.height / resized_height
    window = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    fitted = image.resize((width, height), Image.Resampling.BILINEAR, box=window)
    return ImageOps.mirror(fitted) if flip else fitted


@dataclass(frozen=True)
class TrainingImages(Dataset):
    """The images of a source as training samples, keyed by (epoch, index).

    Attributes:
        source: where the images come from.
        channels: c, see `to_mode`.
        height: H.
        width: W.
        horizontal_flip: mirror an image in half of the epochs, drawn by (seed, epoch, index).
        seed: 0 or more.
        on_bad_image: what an unreadable image does: `stop` raises, `skip` takes the next readable one.
    """

    source: Source
    channels: int
    height: int
    width: int
    horizontal_flip: bool
    seed: int
    on_bad_image: Literal["stop", "skip"]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Load one sample.

        Args:
            key: the epoch and the image's index in the source.

        Returns:
            (c, H, W) float32 in [-1, 1], and the indexes of the unreadable images that were passed over for it.

        Raises:
            UnreadableImage: the image (`stop`) or every image of the source (`skip`) cannot be used.
        """
        epoch, index = key
        flip = self.horizontal_flip and bool(
            torch.rand((), generator=generator(self.seed, Purpose.FLIP, epoch, index)) < 0.5
        )
        if self.on_bad_image == "stop" or self.source.size is None:
            return self._load(index, flip), ()
        passed_over: list[int] = []
        while len(passed_over) < self.source.size:
            candidate = (index + len(passed_over)) % self.source.size
            try:
                return self._load(candidate, flip), tuple(passed_over)
            except UnreadableImage as error:
                passed_over.append(candidate)
                last = error
        raise UnreadableImage(f"none of the {self.source.size} images can be used; of the last one tried: {last}")

    def _load(self, index: int, flip: bool) -> Tensor:
        image = self.source.read(index)
        try:
            image = fit(to_mode(image, self.channels), self.height, self.width, flip)
        except ValueError as error:
            raise UnreadableImage(f"{self.source.name(index)} cannot be used: {error}") from error
        pixels = np.array(image).reshape(self.height, self.width, self.channels)
        return to_float(rearrange(torch.from_numpy(pixels), "h w c -> c h w")).contiguous()


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
    images: TrainingImages, stream: ShuffledStream, *, batch_size: int, num_workers: int, device: torch.device
) -> DataLoader:
    """Load batches without end, the same ones for every number of workers.

    Workers are forked off a clean server process (where the system has none, spawned), not off the training process:
    that one has threads and a GPU, and forking those may deadlock, which Python 3.12 warns of. A script that uses
    workers therefore needs the usual `if __name__ == "__main__":`.

    Args:
        images: the samples.
        stream: their order.
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
        multiprocessing_context=_worker_context() if num_workers else None,
        generator=torch.Generator(),  # torch draws the workers' unused seeds from it, and not from the global generator
        persistent_workers=num_workers > 0,
    )


def _worker_context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
    return context
