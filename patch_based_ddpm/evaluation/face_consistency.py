"""The figure "disagreement": how far the parts of a drawn face contradict one another across patches.

Shapes: `b` images, `H W` image. Coordinates u, v: see `data/faces.py`.
"""

import numpy as np
import torch
from torch import Tensor

from patch_based_ddpm.data.faces import coordinates

SMALLEST_SIDE = 32  # pixels; every region then holds the centre of at least one pixel
# Pairs of mirrored rectangles: inner < |u| < outer, top < v < bottom. On every face the first five pairs, enlarged by
# half a pixel, show only the part that they are named after; the others also show surroundings, which are symmetric.
REGIONS = {
    "background top": (0.446, np.inf, -np.inf, 0.184),
    "background bottom": (0.446, np.inf, 0.516, 0.764),
    "forehead": (0.0, 0.0465, 0.316, 0.349),
    "cheeks": (0.056, 0.089, 0.571, 0.609),
    "hair": (0.046, 0.104, 0.155, 0.187),
    "eyes": (0.075, 0.145, 0.435, 0.488),
    "lower rims": (0.075, 0.145, 0.522, 0.558),
    "clothes": (0.065, 0.145, 0.95, 0.984),
}


def disagreement(images: Tensor) -> dict[str, Tensor]:
    """Measure how far the parts of drawn faces contradict one another; a blank image does not contradict itself.

    Args:
        images: (b, 3, H, W) in [-1, 1], each side 32 pixels or more.

    Returns:
        By attribute, (b,): the mean absolute difference between the mean colours of regions that must agree, on the
        scale [-1, 1]. Up to rounding, 0 for every drawn face and its mirror image.
    """
    u, v, _ = coordinates(*images.shape[2:])

    def colours(name: str) -> tuple[Tensor, Tensor]:
        inner, outer, top, bottom = REGIONS[name]
        band = images[:, :, torch.from_numpy((v > top) & (v < bottom))].float()
        sides = (torch.from_numpy((side > inner) & (side < outer)) for side in (-u, u))
        return tuple(band[..., side].mean((2, 3)) for side in sides)  # left and right, (b, 3) each

    background = [colours(f"background {place}") for place in ("top", "bottom")]
    top, bottom = ((left + right) / 2 for left, right in background)  # without the gradient of the lighting
    light_top, light_bottom = (_light(left, right) for left, right in background)
    hues = [_difference(*_equally_bright(left, right)) for left, right in background]
    forehead, cheeks, rims = colours("forehead"), colours("cheeks"), colours("lower rims")
    skin = [forehead, cheeks, (forehead[0], cheeks[0]), (forehead[1], cheeks[1])]
    return {
        "background": torch.stack([_difference(top, bottom), *hues]).mean(0),  # same colour, same hue left and right
        "lighting": _difference(light_top, light_bottom) * ((top + bottom) / 2 + 1).mean(1),
        "skin": torch.stack([_difference(*pair) for pair in skin]).mean(0),
        "hair": _difference(*colours("hair")),
        "eyes": _difference(*colours("eyes")),
        "glasses": _difference(rims[0] - cheeks[0], rims[1] - cheeks[1]),
        "clothes": _difference(*colours("clothes")),
    }


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean(1)  # (b,)


def _brightness(colour: Tensor) -> Tensor:
    return (colour.mean(1, keepdim=True) + 1).clamp(min=1e-3)  # (b, 1), 0 is black


def _light(left: Tensor, right: Tensor) -> Tensor:
    """The gradient of the lighting: brightness on the right over that of the centre, minus 1."""
    left, right = _brightness(left), _brightness(right)
    return (right - left) / (right + left)


def _equally_bright(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both colours, scaled to their mean brightness."""
    mean = (_brightness(left) + _brightness(right)) / 2
    return (left + 1) * mean / _brightness(left), (right + 1) * mean / _brightness(right)
