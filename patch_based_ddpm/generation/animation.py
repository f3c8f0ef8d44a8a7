"""An animation of sampling: a frame for each step, and the final images."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from patch_based_ddpm.data import pictures
from patch_based_ddpm.errors import InputError, explain_os_error
from patch_based_ddpm.files import atomic_write

SUFFIXES = (".webp", ".gif")
KINDS = ("x_t", "x_0")
MOST_FRAMES = 60
FRAME_MS, LAST_FRAME_MS = 80, 2000


def file_name(text: str) -> Path:
    """The file of an animation, for `type=`."""
    if Path(text).suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(SUFFIXES)}")
    return Path(text)


def make_folder(path: Path) -> None:
    """Make the folder of the file before sampling; an `InputError` if there can be no such file."""
    with explain_os_error(f"--trajectory {str(path)!r} cannot be used"):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise InputError(f"--trajectory {str(path)!r} is a folder; it must be a file.")


class Animation:
    """Collects the steps of a sampler, as its `observe`; a frame shows all images side by side.

    Beyond 60 frames, every second one is dropped, and from then on half as many steps are recorded.

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
        if self.seen % self.every == 0:
            self.frames.append(self._frame(x_t if self.kind == "x_t" else x_0))
        self.seen += 1
        if len(self.frames) > MOST_FRAMES:
            self.frames = self.frames[::2]
            self.every *= 2

    def save(self, path: Path, images: Tensor) -> None:
        """Write the file with the final images as its last frame, whole or not at all. Raises OSError.

        Args:
            path: ends in .webp or .gif; its folder exists.
            images: (b, c, H, W) in [-1, 1].
        """
        frames = [Image.fromarray(frame) for frame in (*self.frames, self._frame(images))]
        with atomic_write(path) as file:
            frames[0].save(
                file,
                format=path.suffix[1:].upper(),
                save_all=True,
                append_images=frames[1:],
                duration=[FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS],
                loop=0,  # without end
            )

    def _frame(self, images: Tensor) -> np.ndarray:
        return pictures.tile([_with_borders(pictures.pixels(image), self.borders) for image in images])


def _with_borders(image: np.ndarray, patch_divider: int) -> np.ndarray:
    """Insert white lines between the patches; all pixels stay."""
    for axis in (0, 1):
        side = image.shape[axis]
        image = np.insert(image, range(side // patch_divider, side, side // patch_divider), 255, axis=axis)
    return image
