"""How much the parts of a drawn face contradict one another: what a patch must know of the other patches.

Read from fixed windows of the picture:

    background   same hue left and right, same colour top and bottom
    lighting     one side brighter than the other by the same factor at the top and at the bottom
    skin         same colour left and right, on the forehead and on the cheeks
    hair         same colour left and right
    eyes         same colour left and right
    glasses      the same left and right
    clothes      same colour left and right

Shapes: `b` images, `H W` image. Coordinates u, v: see `faces.py`.
"""

from typing import NamedTuple

import numpy as np
import torch

from patch_based_ddpm.data.faces import coordinates

SMALLEST_READING = 32  # pixels a side: every window then holds at least one pixel


class Window(NamedTuple):
    """A pair of mirrored rectangles: inner < |u| < outer, top < v < bottom."""

    inner: float
    outer: float
    top: float
    bottom: float


# Large enough to hold a pixel's centre at any size from 32. On every face the first five pairs, with half a pixel about
# them, show nothing but what they are named after; the others also show mirror-symmetric surroundings.
WINDOWS = {
    "background top": Window(0.446, np.inf, -np.inf, 0.184),
    "background bottom": Window(0.446, np.inf, 0.516, 0.764),
    "forehead": Window(0.0, 0.0465, 0.316, 0.349),
    "cheeks": Window(0.056, 0.089, 0.571, 0.609),
    "hair": Window(0.046, 0.104, 0.155, 0.187),
    "eyes": Window(0.075, 0.145, 0.435, 0.488),
    "lower rims": Window(0.075, 0.145, 0.522, 0.558),
    "clothes": Window(0.065, 0.145, 0.95, 0.984),
}


def _gap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs().mean(1)  # (b,)


def _brightness(colour: torch.Tensor) -> torch.Tensor:
    return (colour.mean(1, keepdim=True) + 1).clamp(min=1e-3)  # (b, 1), 0 is black


def _ramp(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How much brighter than the centre the right is, as a factor less one."""
    left, right = _brightness(left), _brightness(right)
    return (right - left) / (right + left)


def _equally_bright(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two colours with the light taken off: scaled to the brightness half-way between them."""
    common = (_brightness(left) + _brightness(right)) / 2
    return (left + 1) * common / _brightness(left), (right + 1) * common / _brightness(right)


def disagreement(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Read how much the parts of drawn faces contradict one another.

    It judges consistency alone: a blank picture agrees with itself perfectly.

    Args:
        images: (b, 3, H, W) in [-1, 1], each side 32 pixels or more.

    Returns:
        For each attribute of this module's docstring, (b,): the mean absolute difference between places that must
        agree, in units of the [-1, 1] scale. Up to rounding, 0 for every drawn face and its mirror image.

    Raises:
        ValueError: if the images have another shape, or are too small.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"The images have shape {tuple(images.shape)}; it must be (b, 3, H, W).")
    height, width = images.shape[2:]
    if min(height, width) < SMALLEST_READING:
        raise ValueError(f"The images are {height} x {width} pixels; each side must be {SMALLEST_READING} or more.")
    u, v, _ = coordinates(height, width)

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        inner, outer, top, bottom = WINDOWS[name]
        rows = torch.from_numpy((v > top) & (v < bottom))
        left, right = (torch.from_numpy((side > inner) & (side < outer)) for side in (-u, u))
        band = images[:, :, rows].float()
        return band[..., left].mean((2, 3)), band[..., right].mean((2, 3))  # (b, 3) each

    backdrop = [read(f"background {place}") for place in ("top", "bottom")]
    top, bottom = ((left + right) / 2 for left, right in backdrop)  # the ramp of light cancels
    hues = [_gap(*_equally_bright(left, right)) for left, right in backdrop]
    ramp_top, ramp_bottom = (_ramp(left, right) for left, right in backdrop)
    forehead, cheeks, rims = read("forehead"), read("cheeks"), read("lower rims")
    skin = [_gap(*forehead), _gap(*cheeks), _gap(forehead[0], cheeks[0]), _gap(forehead[1], cheeks[1])]
    return {
        "background": torch.stack([_gap(top, bottom), *hues]).mean(0),
        "lighting": _gap(ramp_top, ramp_bottom) * ((top + bottom) / 2 + 1).mean(1),
        "skin": torch.stack(skin).mean(0),
        "hair": _gap(*read("hair")),
        "eyes": _gap(*read("eyes")),
        "glasses": _gap(rims[0] - cheeks[0], rims[1] - cheeks[1]),
        "clothes": _gap(*read("clothes")),
    }
