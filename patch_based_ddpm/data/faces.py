"""The people of the built-in data set: endless, deterministic by index. `portraits.py` draws them.

Everybody shares one layout - the centre line at x = 1/2, every part but the fringe mirror-symmetric - while colours and
shapes vary. Several attributes span the picture, so that patches which are denoised without knowing of each other
contradict one another; `agreement.py` says which, and measures it.

Portrait coordinates: u in [-1/2, 1/2] from the centre line, v in [0, 1] from the top, both in units of the shorter side
of the picture, whose central square holds the portrait.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

STRONGEST_LIGHT = 0.2


def _palette(codes: str) -> tuple[Colour, ...]:
    return tuple(tuple(byte / 255 for byte in bytes.fromhex(code)) for code in codes.split())


# No channel above 0xc7: the strongest light must not saturate the background, or it could not be read back.
BACKGROUNDS = _palette("6ba3c7 7abaa3 c7a34d c77566 998ac7 c78a9e c79c75 526b99 94ab73 c7baa1 388c8f 855780")
SKINS = _palette("fcd6bd f7c7a3 ebb38a d4996b b37852 8c5c3d 6b4530")
NATURAL_HAIRS = _palette("211c24 45291c 6e4024 994024 de732b edbf66 ebe0c7 999ca8")
DYED_HAIRS = _palette("eb7399 2e8c94 7a54a8 385cb3")
EYES = _palette("66381a 3d2417 99611f 388f4d 2975cc 6b8a9e 1a8f94 7052ad")
CLOTHES = _palette("d13d40 29386b f5c23d 338561 f0ede3 754d99 f08038 248794 eb8aa3 3d404d 527ab3")
FRAMES = _palette("1f1c21 6b3b1a bf2933 26387a 145c57 f0ede3 edb83d")
METALS = _palette("f5cc52 e6e8f0 e65c61")


class HairStyle(NamedTuple):
    """How hair stands off the skull, falls down the back, and what is tied to it; in portrait coordinates."""

    lift: float  # above the skull
    length: float = 0.0  # v of the ends; 0: above the ears
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
    """The attributes of one portrait; lengths in portrait coordinates."""

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
    """Invent person number `index` of the endless set `seed`: the same for the same numbers, on any machine.

    Args:
        index: which person, 0 or more.
        seed: which set, 0 or more.

    Returns:
        The attributes to hand to `portraits.draw`.

    Raises:
        ValueError: if a number is negative.
    """
    for name, value in (("index", index), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} is {value}; the {name} of a drawn face must be 0 or more.")
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
    """The portrait coordinates of a picture: u (W,) and v (H,) of the pixel centres, and the side of a pixel."""
    side = min(height, width)
    u = (2 * np.arange(width, dtype=np.float32) + 1 - width) / (2 * side)  # exactly odd about the centre line
    v = (2 * np.arange(height, dtype=np.float32) + 1 - height) / (2 * side) + np.float32(0.5)
    return u, v, 1 / side
