"""The built-in data set: an endless sequence of drawn faces. `attributes` chooses a face, `draw` draws it.

Colours and shapes vary, but every part except the fringe is mirror-symmetric about the centre line. Some attributes
span the picture, so patches denoised independently of each other would differ: `evaluation.face_consistency`.

Face coordinates, in units of the picture's shorter side: u in [-1/2, 1/2] from the centre line, v in [0, 1] from the
top of the central square, which holds the face. Shapes: `H W` picture.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from einops import rearrange

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

STRONGEST_LIGHT = 0.2
SMALLEST_DRAWING = 8  # pixels a side


def _palette(codes: str) -> tuple[Colour, ...]:
    return tuple(tuple(byte / 255 for byte in bytes.fromhex(code)) for code in codes.split())


# No channel exceeds 0xc7, so that the background does not saturate under the strongest light, which is measured on it.
BACKGROUNDS = _palette("6ba3c7 7abaa3 c7a34d c77566 998ac7 c78a9e c79c75 526b99 94ab73 c7baa1 388c8f 855780")
SKINS = _palette("fcd6bd f7c7a3 ebb38a d4996b b37852 8c5c3d 6b4530")
NATURAL_HAIRS = _palette("211c24 45291c 6e4024 994024 de732b edbf66 ebe0c7 999ca8")
DYED_HAIRS = _palette("eb7399 2e8c94 7a54a8 385cb3")
EYES = _palette("66381a 3d2417 99611f 388f4d 2975cc 6b8a9e 1a8f94 7052ad")
CLOTHES = _palette("d13d40 29386b f5c23d 338561 f0ede3 754d99 f08038 248794 eb8aa3 3d404d 527ab3")
FRAMES = _palette("1f1c21 6b3b1a bf2933 26387a 145c57 f0ede3 edb83d")
METALS = _palette("f5cc52 e6e8f0 e65c61")


class HairStyle(NamedTuple):
    """The shape of the hair, in face coordinates."""

    lift: float  # height above the skull
    length: float = 0.0  # v of the lower end; 0: it ends above the ears
    curl: float = 0.0  # amplitude of its waves
    spike: float = 0.0  # height of its spikes
    knot: tuple[float, float, float] | None = None  # |u|, v and radius of a bun or of two tails


HAIR_STYLES = {
    "buzz": HairStyle(lift=0.016),
    "short": HairStyle(lift=0.04),
    "spiky": HairStyle(lift=0.04, spike=0.045),
    "curly": HairStyle(lift=0.05, curl=0.013),
    "afro": HairStyle(lift=0.095, curl=0.011),
    "bob": HairStyle(lift=0.045, length=0.72),
    "long": HairStyle(lift=0.045, length=1.10),
    "wavy": HairStyle(lift=0.05, length=0.92, curl=0.012),
    "bun": HairStyle(lift=0.035, knot=(0.0, 0.07, 0.085)),
    "space buns": HairStyle(lift=0.035, knot=(0.205, 0.105, 0.08)),
    "pigtails": HairStyle(lift=0.035, knot=(0.315, 0.58, 0.072)),
}
FRINGES = ("round", "straight", "curtain", "peak", "left", "right")
MOUTHS = ("smile", "small", "open", "grin")
COLLARS = ("crew", "v-neck", "stripes", "roll neck")


@dataclass(frozen=True)
class Face:
    """The attributes of one face; lengths in face coordinates."""

    background: Colour
    light: float  # how much brighter the right edge is than the centre, in [-0.2, 0.2]; negative: lit from the left
    skin: Colour
    hair: Colour
    eyes: Colour
    clothes: Colour
    glasses: Colour | None
    square_glasses: bool
    earrings: Colour | None
    hair_style: str
    fringe: str
    mouth: str
    collar: str
    beard: bool
    head_width: float  # half of it
    jaw: float  # 0: broad, 1: pointed
    chin: float  # v of its lowest point
    eye_size: float  # factor
    brow_tilt: float  # slope, outer end lower when positive
    brow_weight: float  # half thickness
    blush: float  # opacity


def attributes(index: int, seed: int = 0) -> Face:
    """Choose the attributes of face `index` of the endless sequence `seed`, the same on every machine."""
    rng = random.Random(f"{seed}/{index}")

    def colour(palette: tuple[Colour, ...], *neighbours: Colour) -> Colour:
        def contrast(candidate: Colour) -> float:
            r, g, b = candidate
            return min(abs(r - other[0]) + abs(g - other[1]) + abs(b - other[2]) for other in neighbours)

        if neighbours:
            palette = sorted(palette, key=contrast)[len(palette) // 3 :]
        return tuple(min(1.0, max(0.0, channel + rng.uniform(-0.02, 0.02))) for channel in rng.choices(palette)[0])

    skin = colour(SKINS)
    hair = colour(NATURAL_HAIRS if rng.random() < 0.88 else DYED_HAIRS, skin)
    clothes = colour(CLOTHES, skin)
    style = rng.choices(tuple(HAIR_STYLES))[0]
    return Face(
        background=colour(BACKGROUNDS, skin, hair, clothes),
        light=rng.uniform(-STRONGEST_LIGHT, STRONGEST_LIGHT),
        skin=skin,
        hair=hair,
        eyes=colour(EYES),
        clothes=clothes,
        glasses=colour(FRAMES, skin) if rng.random() < 0.3 else None,
        square_glasses=rng.random() < 0.5,
        earrings=colour(METALS) if rng.random() < 0.3 else None,
        hair_style=style,
        fringe=rng.choices(FRINGES)[0],
        mouth=rng.choices(MOUTHS)[0],
        collar=rng.choices(COLLARS)[0],
        beard=style in ("buzz", "short", "spiky", "curly", "afro") and rng.random() < 0.4,
        head_width=rng.uniform(0.245, 0.275),
        jaw=rng.random(),
        chin=rng.uniform(0.79, 0.82),
        eye_size=rng.uniform(0.9, 1.08),
        brow_tilt=rng.uniform(-0.1, 0.25),
        brow_weight=rng.uniform(0.009, 0.016),
        blush=rng.uniform(0.0, 0.5),
    )


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The face coordinates of a picture: u (W,) and v (H,) of the pixel centres, and the side of a pixel."""
    side = min(height, width)
    u = (2 * np.arange(width, dtype=np.float32) + 1 - width) / (2 * side)  # exactly odd about the centre line
    v = (2 * np.arange(height, dtype=np.float32) + 1 - height) / (2 * side) + np.float32(0.5)
    return u, v, 1 / side


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


def _head(canvas: _Canvas, face: Face) -> np.ndarray:
    below = np.maximum(canvas.v - 0.45, 0) / (face.chin - 0.45)
    above = np.maximum(0.45 - canvas.v, 0) / (0.45 - 0.12)
    narrowing = 1 + (0.10 + 0.35 * face.jaw) * below**2
    across = (canvas.u / face.head_width) ** 2 * narrowing
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


def _waves(canvas: _Canvas, amplitude: float) -> np.ndarray | float:
    return amplitude * np.cos(46 * canvas.u) * np.cos(46 * canvas.v) if amplitude else 0.0


def _locks(canvas: _Canvas, face: Face, style: HairStyle) -> np.ndarray:
    u, v = canvas.u, canvas.v - style.length / 2 - 0.15
    return _box(u, v, face.head_width + 0.06, style.length / 2 - 0.15, 0.12) + _waves(canvas, style.curl)


def _paint_hair_behind(canvas: _Canvas, face: Face, style: HairStyle) -> None:
    if style.length:
        canvas.paint(_locks(canvas, face, style), _shade(face.hair, 0.78))
    if style.knot:
        u, v, radius = style.knot
        crop = canvas.crop(u + radius, v - radius, v + radius)
        crop.paint(_ellipse(np.abs(crop.u) - u, crop.v - v, radius, radius), face.hair)


def _paint_body(canvas: _Canvas, face: Face) -> None:
    crop = canvas.crop(0.1, 0.65, 0.95)
    crop.paint(np.abs(crop.u) - 0.085 + 0 * crop.v, _shade(face.skin, 0.82))
    crop = canvas.crop(0.42, 0.85, np.inf)
    shoulders = _box(crop.u, np.minimum(crop.v - 1.2, 0), 0.41, 0.335, 0.15)
    crop.paint(shoulders, face.clothes)
    dark = _shade(face.clothes, 0.75)
    if face.collar == "stripes":
        crop.paint(np.maximum(shoulders, np.abs(crop.v - 0.955) - 0.016), dark)
    collar = crop.crop(0.15, 0.85, 0.98)
    if face.collar == "v-neck":
        collar.paint(1.2 * np.abs(collar.u) + collar.v - 0.985, dark)
        collar.paint(1.2 * np.abs(collar.u) + collar.v - 0.96, _shade(face.skin, 0.9))
    elif face.collar == "roll neck":
        collar.paint(np.maximum(np.abs(collar.u) + 0.9 * collar.v - 0.93, collar.v - 0.95), dark)
    else:
        collar.paint(_ellipse(collar.u, collar.v - 0.85, 0.125, 0.07), dark)
        collar.paint(_ellipse(collar.u, collar.v - 0.85, 0.1, 0.05), _shade(face.skin, 0.9))


def _paint_head(canvas: _Canvas, face: Face) -> None:
    crop = canvas.crop(face.head_width + 0.05, 0.4, 0.62)
    crop.paint(_ellipse(np.abs(crop.u) - face.head_width - 0.003, crop.v - 0.48, 0.035, 0.052), _shade(face.skin, 0.92))
    if face.earrings:
        crop.paint(_ellipse(np.abs(crop.u) - face.head_width - 0.012, crop.v - 0.555, 0.02, 0.02), face.earrings)
    crop = canvas.crop(face.head_width + 0.02, 0.1, 0.84)
    head = _head(crop, face)
    crop.paint(head, face.skin)
    if face.beard:
        edge = 0.64 - 9 * np.maximum(np.abs(crop.u) - 0.115, 0) ** 2
        crop.paint(np.maximum(head, edge - crop.v), face.hair)
    crop = canvas.crop(0.28, 0.5, 0.68)
    crop.paint(_ellipse(np.abs(crop.u) - 0.185, crop.v - 0.6, 0.045, 0.035), (0.95, 0.35, 0.35), face.blush, blur=0.03)
    crop = canvas.crop(0.04, 0.52, 0.6)
    crop.paint(_ellipse(crop.u, crop.v - 0.56, 0.03, 0.021), _shade(face.skin, 0.80))


def _paint_mouth(canvas: _Canvas, face: Face) -> None:
    crop = canvas.crop(0.12, 0.62, 0.78)
    lip = (0.60, 0.11, 0.15)
    half, top, depth = {"smile": (0.1, 0.66, 0.04), "small": (0.06, 0.675, 0.025)}.get(face.mouth, (0.1, 0.65, 0.085))
    curve = top + depth * (1 - (crop.u / half) ** 2)
    steep = np.sqrt(1 + (2 * depth * crop.u / half**2) ** 2)
    if face.mouth in ("smile", "small"):
        crop.paint(np.maximum(np.abs(crop.v - curve) / steep - 0.012, np.abs(crop.u) - half), lip)
        return
    inside = np.maximum((crop.v - curve) / steep, top - crop.v)
    crop.paint(inside, lip)
    if face.mouth == "grin":
        crop.paint(inside + 0.012, (0.98, 0.98, 0.96))
    else:
        crop.paint(np.maximum(inside + 0.008, crop.v - top - 0.024), (0.98, 0.98, 0.96))
        crop.paint(np.maximum(inside + 0.008, _ellipse(crop.u, crop.v - top - 0.085, 0.05, 0.03)), (0.90, 0.42, 0.42))


def _paint_eyes(canvas: _Canvas, face: Face) -> None:
    crop = canvas.crop(0.2, 0.36, 0.54)
    size = face.eye_size
    u, v = np.abs(crop.u) - 0.115, crop.v - 0.45
    crop.paint(_ellipse(u, v + 0.010, 0.066 * size, 0.068 * size), (0.14, 0.09, 0.10))
    crop.paint(_ellipse(u, v - 0.004, 0.061 * size, 0.058 * size), (0.98, 0.98, 0.97))
    crop = canvas.crop(0.17, 0.40, 0.50)
    u, v = np.abs(crop.u) - 0.115, crop.v - 0.452
    centre = np.sqrt(u**2 + v**2)
    crop.paint(centre - 0.051 * size, face.eyes)
    crop.paint(centre - 0.026 * size, (0.06, 0.05, 0.07))
    crop.paint(_ellipse(u, v + 0.021, 0.015, 0.015), (1.0, 1.0, 1.0))
    crop = canvas.crop(0.19, 0.31, 0.41)
    u = np.abs(crop.u)
    arch = 0.347 + face.brow_tilt * (u - 0.12) + 6 * (u - 0.12) ** 2
    crop.paint(np.maximum(np.abs(crop.v - arch) - face.brow_weight, np.abs(u - 0.12) - 0.05), _shade(face.hair, 0.7))


def _paint_glasses(canvas: _Canvas, face: Face) -> None:
    crop = canvas.crop(face.head_width + 0.01, 0.34, 0.56)
    u, v = np.abs(crop.u), crop.v - 0.455
    half_height, corner = (0.08, 0.03) if face.square_glasses else (0.087, 0.087)
    rims = np.abs(_box(u - 0.115, v, 0.087, half_height, corner))
    bridge_and_arms = np.where(np.abs(u - 0.115) > 0.087, np.abs(v), 1)
    crop.paint(np.minimum(rims, bridge_and_arms) - 0.010, face.glasses)


def _paint_hair(canvas: _Canvas, face: Face, style: HairStyle) -> None:
    crop = canvas.crop(face.head_width + 0.13, 0, 0.6)
    tall = np.where(crop.v < 0.42, 0.30, 0.17) + style.lift
    cap = _ellipse(crop.u, (crop.v - 0.42) / tall, face.head_width + style.lift, 1) + _waves(crop, style.curl)
    if style.spike:
        cap += style.spike * np.abs((crop.u / 0.09) % 1 - 0.5) - style.spike / 2
    line = _hairline(crop.u, face.fringe)
    steep = np.sqrt(1 + np.gradient(line[0], crop.pixel) ** 2)
    fringe = (crop.v - line) / steep
    hair = np.maximum(cap, fringe)
    crop.paint(hair, face.hair)
    shine = np.maximum(np.abs(cap + 0.055) - 0.010, np.maximum(np.abs(np.abs(crop.u) - 0.14) - 0.05, crop.v - 0.28))
    crop.paint(np.maximum(shine, hair + 0.008), _shade(face.hair, 1.3), opacity=0.6)
    if style.length:
        inner = face.head_width - 0.015 - 0.5 * (canvas.v - 0.62) ** 2
        locks = np.maximum(_locks(canvas, face, style), inner - np.abs(canvas.u))
        canvas.paint(np.maximum(locks, 0.3 - canvas.v), face.hair)


def draw(face: Face, height: int, width: int) -> np.ndarray:
    """Draw a face, anti-aliased, with sides of at least `SMALLEST_DRAWING`: (H, W, 3) uint8."""
    u, v, pixel = coordinates(height, width)
    canvas = _Canvas(np.empty((3, height, width), np.float32), u[None, :], v[:, None], pixel)
    style = HAIR_STYLES[face.hair_style]
    # Light on a face: 1 for |u| < 0.16, where colours are measured, then rising on one side and falling on the other.
    ramp = np.clip((np.abs(canvas.u) - 0.16) / 0.27, 0, 1)
    light = 1 + face.light * np.sign(canvas.u) * ramp**2 * (3 - 2 * ramp)
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
