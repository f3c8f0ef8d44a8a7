"""An animated picture of images coming out of noise, one frame for a step."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import atomic_write

FORMATS = {".webp": "WEBP", ".gif": "GIF"}
KINDS = ("x_t", "x_0")
MOST_FRAMES = 60
FRAME_MS, LAST_FRAME_MS = 80, 2000


def file_name(text: str) -> Path:
    """The file of an animated picture, for `type=`."""
    if Path(text).suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(FORMATS)}")
    return Path(text)


def make_folder(path: Path) -> None:
    """Make the folder of the file, so that what is wrong with it is said before hours of sampling.

    Raises:
        InputError: there can be no such file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--trajectory {str(path)!r} cannot be used: {error.strerror}.") from None
    if path.is_dir():
        raise InputError(f"--trajectory {str(path)!r} is a folder; it must be a file.")


class Trajectory:
    """Collects what `observe` of a sampler shows it, as pictures of all images side by side.

    They are at most 60, and the images at the end: once there are more, every second one is dropped, and from then on
    half as many are taken.

    Args:
        kind: "x_t", the noisy images, or "x_0", the images predicted from them.
        borders: N to draw the borders of N x N patches; 1: none.
    """

    def __init__(self, kind: str, borders: int) -> None:
        self.kind = kind
        self.borders = borders
        self.frames: list[np.ndarray] = []
        self.seen, self.every = 0, 1

    def __call__(self, step: int, x_t: Tensor, x_0: Tensor) -> None:
        """Take note of a step, see `samplers.Observe`."""
        if self.seen % self.every == 0:
            self.frames.append(self._frame(x_t if self.kind == "x_t" else x_0))
        self.seen += 1
        if len(self.frames) > MOST_FRAMES:
            self.frames = self.frames[::2]
            self.every *= 2

    def save(self, path: Path, images: Tensor) -> None:
        """Write the picture, whole or not at all; its last frame stays for two seconds, then it starts again.

        Args:
            path: ends in .webp or .gif; its folder exists.
            images: (b, c, H, W) in [-1, 1], what came of the steps.

        Raises:
            OSError: the file cannot be written.
        """
        frames = [Image.fromarray(frame) for frame in (*self.frames, self._frame(images))]
        with atomic_write(path) as file:
            frames[0].save(
                file,
                format=FORMATS[path.suffix.lower()],
                save_all=True,
                append_images=frames[1:],
                duration=[FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS],
                loop=0,  # for ever
            )

    def _frame(self, images: Tensor) -> np.ndarray:
        return pictures.tile([_with_borders(pictures.pixels(image), self.borders) for image in images])


def _with_borders(image: np.ndarray, patch_divider: int) -> np.ndarray:
    """Put white lines between the patches; they take no pixel away."""
    for axis in (0, 1):
        side = image.shape[axis]
        image = np.insert(image, range(side // patch_divider, side, side // patch_divider), 255, axis=axis)
    return image
