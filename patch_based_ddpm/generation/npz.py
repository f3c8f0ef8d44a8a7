"""Drawn images in one NumPy archive, as other evaluators read them: `arr_0`, uint8, (images, H, W, c)."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.files import atomic_write

NAME = "samples.npz"


def write(path: Path, pictures: Sequence[Path]) -> None:
    """Copy pictures into an archive, whole or not at all; one at a time, so memory does not grow with their number.

    Args:
        path: the .npz file; its folder exists.
        pictures: at least one PNG file, all of one size and mode; grey ones get a channel axis.

    Raises:
        InputError: a picture differs from the first one.
    """
    first = _pixels(pictures[0])
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), *first.shape)}
    with (
        atomic_write(path, shared=True) as whole,
        zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive,
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for picture in tqdm(pictures, desc=NAME, unit="image", dynamic_ncols=True):
            pixels = _pixels(picture)
            if pixels.shape != first.shape:
                raise InputError(
                    f"{picture} has the shape {pixels.shape}; it must be {first.shape}, as {pictures[0]}, to be in "
                    f"{path.name} with it."
                )
            file.write(pixels.tobytes())


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
