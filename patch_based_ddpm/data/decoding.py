"""Image file -> PIL image, upright, of the model's mode and size. Every failure is an `UnreadableImage`."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patch_based_ddpm.errors import InputError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class UnreadableImage(InputError):  # noqa: N818 - it is caught for what it is, and part of the public API
    """An image that cannot be used; its one argument is a sentence that names the image and the reason."""


def decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """Read a whole image and turn it upright by its EXIF orientation, or raise `UnreadableImage`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata leaves the picture intact
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except UnidentifiedImageError as error:
            raise UnreadableImage(f"{name} cannot be read: Pillow finds no image in it.") from error
        except Exception as error:  # on damaged bytes, Pillow's decoders raise any kind of exception
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"{name} cannot be read: {reason.rstrip('.')}.") from error


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
    """Resize an image until it just covers (height, width), mirror it if asked, and crop the centre.

    The published order: shorter side to the target (bilinear, antialiased), flip, centre crop. Unlike the published
    code, only the part that is kept is resampled, so that a very long image takes no more memory than another; about
    one value in 700 differs by one level (of 255), because Pillow rounds the corners of the crop to single precision.

    The mode is L, RGB or RGBA; Pillow keeps the colours of transparent pixels from bleeding into the others.
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
