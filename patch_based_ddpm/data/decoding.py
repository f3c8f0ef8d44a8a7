"""From an image file to a PIL image of the wanted mode and size, upright; what cannot be read is told by one error."""

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
    """Read a whole image or raise `UnreadableImage`; Pillow itself refuses truncated ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oddities of metadata, which leave the picture intact
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except UnidentifiedImageError as error:
            raise UnreadableImage(f"{name} cannot be read: Pillow finds no image in it.") from error
        except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"{name} cannot be read: {reason.rstrip('.')}.") from error


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image of any kind to 8 bits of grey, RGB or RGBA.

    16-bit grey is scaled, not cut off. Transparency shows white where the result has none to carry it.

    Args:
        image: any mode that Pillow reads; integers in [0, 65535] in the modes `I...`, floats in [0, 1] in `F`.
        channels: 1 (mode L), 3 (RGB) or 4 (RGBA, opaque where the image has no transparency).

    Returns:
        The image in that mode.

    Raises:
        InputError: another number of channels, or values outside the ranges above.
    """
    if channels not in _MODES:
        raise InputError(f"channels is {channels}; it must be 1 (grey), 3 (RGB) or 4 (RGBA).")
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
        raise InputError(f"its values run from {values.min()} to {values.max()}; they must lie in [0, {scale}].")
    return Image.fromarray(np.rint(values * (255 / scale)).astype(np.uint8))


def fit(image: Image.Image, height: int, width: int, flip: bool) -> Image.Image:
    """Resize until the image just covers the target, mirror it if asked, and cut out its centre.

    The published order: shorter side to the target (bilinear, antialiased), flip, centre crop. Unlike there, only the
    window that is kept is resampled, so a very long image costs no more memory than another; about one value in 700
    comes out one level (of 255) apart, because Pillow keeps the window's corners in single precision.

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
