"""Drawing the people of `faces.py`: flat, anti-aliased portraits at any size.

Shapes: `H W` picture. Coordinates u, v: see `faces.py`.
"""

import numpy as np
from einops import rearrange

from patch_based_ddpm.data.faces import HAIR_STYLES, Colour, Face, HairStyle, coordinates

SMALLEST_DRAWING = 8  # pixels a side


class _Canvas:
    """A picture, or a crop of one that shares its pixels, with the coordinates of its pixel centres."""

    def __init__(self, rgb: np.ndarray, u: np.ndarray, v: np.ndarray, pixel: float):
        self.rgb, self.u, self.v, self.pixel = rgb, u, v, pixel  # (3, H, W), (1, W), (H, 1), one pixel's side

    def crop(self, half_width: float, top: float, bottom: float) -> "_Canvas":
        left, right = self.u[0].searchsorted((-half_width - self.pixel, half_width + self.pixel))
        first, last = self.v[:, 0].searchsorted((top - self.pixel, bottom + self.pixel))
        rows, columns = slice(first, last), slice(left, right)
        return _Canvas(self.rgb[:, rows, columns], self.u[:, columns], self.v[rows], self.pixel)

    def paint(self, distance: np.ndarray, colour: Colour, opacity: float = 1.0, blur: float = 0.0) -> None:
        """Cover the pixels whose signed distance to a shape is negative; the edge is one pixel wide, plus `blur`."""
        cover = distance * (-1 / (self.pixel + blur))
        cover += 0.5
        np.maximum(cover, 0, out=cover)
        np.minimum(cover, 1, out=cover)
        if opacity < 1:
            cover *= opacity
        self.rgb += cover * (np.array(colour, np.float32)[:, None, None] - self.rgb)


def _ellipse(u: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
    return (np.sqrt((u / a) ** 2 + (v / b) ** 2) - 1) * min(a, b)


def _box(u: np.ndarray, v: np.ndarray, a: float, b: float, radius: float) -> np.ndarray:
    return np.sqrt(np.maximum(np.abs(u) - a + radius, 0) ** 2 + np.maximum(np.abs(v) - b + radius, 0) ** 2) - radius


def _shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(1.0, channel * factor) for channel in colour)


def _head(at: _Canvas, face: Face) -> np.ndarray:
    below = np.maximum(at.v - 0.45, 0) / (face.chin - 0.45)
    above = np.maximum(0.45 - at.v, 0) / (0.45 - 0.12)
    narrowing = 1 + (0.10 + 0.35 * face.jaw) * below**2
    across = (at.u / face.head_width) ** 2 * narrowing
    return (np.sqrt(across + (below ** (2.9 - 0.7 * face.jaw) + above**2)) - 1) * face.head_width


def _hairline(u: np.ndarray, fringe: str) -> np.ndarray:
    side = np.abs(u)
    temple = 14 * np.maximum(side - 0.18, 0) ** 1.5
    if fringe == "straight":
        return 0.288 + temple
    if fringe == "curtain":
        return 0.238 + 0.9 * side + temple
    if fringe == "peak":
        return 0.25 + 0.04 * np.cos(np.minimum(side, 0.16) * 28) + temple
    if fringe == "round":
        return 0.245 + 1.8 * u**2 + temple
    across = u if fringe == "right" else -u
    return 0.255 + 2.4 * np.maximum(across + 0.06, 0) ** 2 + 0.5 * np.maximum(-0.06 - across, 0) + temple


def _waves(at: _Canvas, amplitude: float) -> np.ndarray | float:
    return amplitude * np.cos(46 * at.u) * np.cos(46 * at.v) if amplitude else 0.0


def _locks(at: _Canvas, face: Face, style: HairStyle) -> np.ndarray:
    half = face.head_width + 0.06
    return _box(at.u, at.v - style.length / 2 - 0.15, half, style.length / 2 - 0.15, 0.12) + _waves(at, style.curl)


def _paint_hair_behind(canvas: _Canvas, face: Face, style: HairStyle) -> None:
    if style.length:
        canvas.paint(_locks(canvas, face, style), _shade(face.hair, 0.78))
    if style.knot:
        u, v, radius = style.knot
        at = canvas.crop(u + radius, v - radius, v + radius)
        at.paint(_ellipse(np.abs(at.u) - u, at.v - v, radius, radius), face.hair)


def _paint_body(canvas: _Canvas, face: Face) -> None:
    at = canvas.crop(0.1, 0.65, 0.95)
    at.paint(np.abs(at.u) - 0.085 + 0 * at.v, _shade(face.skin, 0.82))
    at = canvas.crop(0.42, 0.85, np.inf)
    shoulders = _box(at.u, np.minimum(at.v - 1.2, 0), 0.41, 0.335, 0.15)
    at.paint(shoulders, face.clothes)
    dark = _shade(face.clothes, 0.75)
    if face.collar == "stripes":
        at.paint(np.maximum(shoulders, np.abs(at.v - 0.955) - 0.016), dark)
    at = at.crop(0.15, 0.85, 0.98)
    if face.collar == "v-neck":
        at.paint(1.2 * np.abs(at.u) + at.v - 0.985, dark)
        at.paint(1.2 * np.abs(at.u) + at.v - 0.96, _shade(face.skin, 0.9))
    elif face.collar == "roll neck":
        at.paint(np.maximum(np.abs(at.u) + 0.9 * at.v - 0.93, at.v - 0.95), dark)
    else:
        at.paint(_ellipse(at.u, at.v - 0.85, 0.125, 0.07), dark)
        at.paint(_ellipse(at.u, at.v - 0.85, 0.1, 0.05), _shade(face.skin, 0.9))


def _paint_head(canvas: _Canvas, face: Face) -> None:
    at = canvas.crop(face.head_width + 0.05, 0.4, 0.62)
    at.paint(_ellipse(np.abs(at.u) - face.head_width - 0.003, at.v - 0.48, 0.035, 0.052), _shade(face.skin, 0.92))
    if face.earrings:
        at.paint(_ellipse(np.abs(at.u) - face.head_width - 0.012, at.v - 0.555, 0.02, 0.02), face.earrings)
    at = canvas.crop(face.head_width + 0.02, 0.1, 0.84)
    head = _head(at, face)
    at.paint(head, face.skin)
    if face.beard:
        edge = 0.64 - 9 * np.maximum(np.abs(at.u) - 0.115, 0) ** 2
        at.paint(np.maximum(head, edge - at.v), face.hair)
    at = canvas.crop(0.28, 0.5, 0.68)
    at.paint(_ellipse(np.abs(at.u) - 0.185, at.v - 0.6, 0.045, 0.035), (0.95, 0.35, 0.35), face.blush, blur=0.03)
    at = canvas.crop(0.04, 0.52, 0.6)
    at.paint(_ellipse(at.u, at.v - 0.56, 0.03, 0.021), _shade(face.skin, 0.80))


def _paint_mouth(canvas: _Canvas, face: Face) -> None:
    at = canvas.crop(0.12, 0.62, 0.78)
    lip = (0.60, 0.11, 0.15)
    half, top, depth = {"smile": (0.1, 0.66, 0.04), "small": (0.06, 0.675, 0.025)}.get(face.mouth, (0.1, 0.65, 0.085))
    curve = top + depth * (1 - (at.u / half) ** 2)
    steep = np.sqrt(1 + (2 * depth * at.u / half**2) ** 2)
    if face.mouth in ("smile", "small"):
        at.paint(np.maximum(np.abs(at.v - curve) / steep - 0.012, np.abs(at.u) - half), lip)
        return
    inside = np.maximum((at.v - curve) / steep, top - at.v)
    at.paint(inside, lip)
    if face.mouth == "grin":
        at.paint(inside + 0.012, (0.98, 0.98, 0.96))
    else:
        at.paint(np.maximum(inside + 0.008, at.v - top - 0.024), (0.98, 0.98, 0.96))
        at.paint(np.maximum(inside + 0.008, _ellipse(at.u, at.v - top - 0.085, 0.05, 0.03)), (0.90, 0.42, 0.42))


def _paint_eyes(canvas: _Canvas, face: Face) -> None:
    at = canvas.crop(0.2, 0.36, 0.54)
    size = face.eye_size
    u, v = np.abs(at.u) - 0.115, at.v - 0.45
    at.paint(_ellipse(u, v + 0.010, 0.066 * size, 0.068 * size), (0.14, 0.09, 0.10))
    at.paint(_ellipse(u, v - 0.004, 0.061 * size, 0.058 * size), (0.98, 0.98, 0.97))
    at = canvas.crop(0.17, 0.40, 0.50)
    u, v = np.abs(at.u) - 0.115, at.v - 0.452
    centre = np.sqrt(u**2 + v**2)
    at.paint(centre - 0.051 * size, face.eyes)
    at.paint(centre - 0.026 * size, (0.06, 0.05, 0.07))
    at.paint(_ellipse(u, v + 0.021, 0.015, 0.015), (1.0, 1.0, 1.0))
    at = canvas.crop(0.19, 0.31, 0.41)
    u = np.abs(at.u)
    arch = 0.347 + face.brow_tilt * (u - 0.12) + 6 * (u - 0.12) ** 2
    at.paint(np.maximum(np.abs(at.v - arch) - face.brow_weight, np.abs(u - 0.12) - 0.05), _shade(face.hair, 0.7))


def _paint_glasses(canvas: _Canvas, face: Face) -> None:
    at = canvas.crop(face.head_width + 0.01, 0.34, 0.56)
    u, v = np.abs(at.u), at.v - 0.455
    half_height, corner = (0.08, 0.03) if face.square_glasses else (0.087, 0.087)
    rims = np.abs(_box(u - 0.115, v, 0.087, half_height, corner))
    bridge_and_arms = np.where(np.abs(u - 0.115) > 0.087, np.abs(v), 1)
    at.paint(np.minimum(rims, bridge_and_arms) - 0.010, face.glasses)


def _paint_hair(canvas: _Canvas, face: Face, style: HairStyle) -> None:
    at = canvas.crop(face.head_width + 0.13, 0, 0.6)
    tall = np.where(at.v < 0.42, 0.30, 0.17) + style.lift
    cap = _ellipse(at.u, (at.v - 0.42) / tall, face.head_width + style.lift, 1) + _waves(at, style.curl)
    if style.spike:
        cap += style.spike * np.abs((at.u / 0.09) % 1 - 0.5) - style.spike / 2
    line = _hairline(at.u, face.fringe)
    steep = np.sqrt(1 + np.gradient(line[0], at.pixel) ** 2)
    fringe = (at.v - line) / steep
    hair = np.maximum(cap, fringe)
    at.paint(hair, face.hair)
    shine = np.maximum(np.abs(cap + 0.055) - 0.010, np.maximum(np.abs(np.abs(at.u) - 0.14) - 0.05, at.v - 0.28))
    at.paint(np.maximum(shine, hair + 0.008), _shade(face.hair, 1.3), opacity=0.6)
    if style.length:
        inner = face.head_width - 0.015 - 0.5 * (canvas.v - 0.62) ** 2
        locks = np.maximum(_locks(canvas, face, style), inner - np.abs(canvas.u))
        canvas.paint(np.maximum(locks, 0.3 - canvas.v), face.hair)


def _light(u: np.ndarray, light: float) -> np.ndarray:
    """Light on a person: 1 for |u| < 0.16, where the windows lie, then brighter on one side as it darkens opposite."""
    ramp = np.clip((np.abs(u) - 0.16) / 0.27, 0, 1)
    return 1 + light * np.sign(u) * ramp**2 * (3 - 2 * ramp)


def draw(face: Face, height: int, width: int) -> np.ndarray:
    """Paint a portrait, anti-aliased; the longer side shows more background, or more of the clothes.

    Args:
        face: whom to paint.
        height: in pixels, 8 or more.
        width: in pixels, 8 or more.

    Returns:
        The picture, (H, W, 3) uint8.

    Raises:
        ValueError: if a side is shorter than 8 pixels.
    """
    if min(height, width) < SMALLEST_DRAWING:
        raise ValueError(f"A face cannot be {height} x {width} pixels; each side must be {SMALLEST_DRAWING} or more.")
    u, v, pixel = coordinates(height, width)
    canvas = _Canvas(np.empty((3, height, width), np.float32), u[None, :], v[:, None], pixel)
    style = HAIR_STYLES[face.hair_style]
    light = _light(canvas.u, face.light)
    # The background is lit by a ramp over the whole width instead.
    backdrop = (1 + 2 * face.light * np.clip(canvas.u, -0.5, 0.5)) / light
    canvas.rgb[:] = np.array(face.background, np.float32)[:, None, None] * backdrop
    _paint_hair_behind(canvas, face, style)
    _paint_body(canvas, face)
    _paint_head(canvas, face)
    _paint_mouth(canvas, face)
    _paint_eyes(canvas, face)
    if face.glasses:
        _paint_glasses(canvas, face)
    _paint_hair(canvas, face, style)
    canvas.rgb *= light
    return np.rint(rearrange(np.minimum(canvas.rgb, 1), "c h w -> h w c") * 255).astype(np.uint8)
