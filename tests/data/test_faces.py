"""The drawn faces: endless, deterministic, smooth at any size; and a measure that is 0 on them, large on mixtures."""

from dataclasses import astuple, fields, replace

import numpy as np
import pytest
import torch
from einops import reduce

from patch_based_ddpm.data.faces import FRINGES, HAIR_STYLES, Face, attributes, draw
from patch_based_ddpm.evaluation.face_consistency import REGIONS, disagreement
from support.face_images import crowd, images, mixed

ROUNDING = 0.005  # what uint8 does to a real face's disagreement; a grey level is 2 / 255 = 0.0078
ATTRIBUTES = {"background", "lighting", "skin", "hair", "eyes", "glasses", "clothes"}
RED, BLUE = (0.75, 0.2, 0.2), (0.2, 0.3, 0.75)
ONE_CHANGE = {
    "background": {"background": (0.2, 0.4, 0.7)},
    "lighting": {"light": 0.2},
    "skin": {"skin": (0.45, 0.3, 0.2)},
    "hair": {"hair": BLUE},
    "eyes": {"eyes": BLUE},
    "glasses": {"glasses": (0.1, 0.1, 0.1)},
    "clothes": {"clothes": BLUE},
}


def plain_face() -> Face:
    return replace(
        attributes(0),
        background=(0.7, 0.6, 0.4),
        light=-0.2,
        skin=(0.95, 0.75, 0.6),
        hair=RED,
        eyes=RED,
        clothes=RED,
        glasses=None,
        hair_style="short",
        beard=False,
    )


def test_same_numbers_same_face():
    assert attributes(7, seed=3) == attributes(7, seed=3)
    np.testing.assert_array_equal(draw(attributes(7, seed=3), 40, 40), draw(attributes(7, seed=3), 40, 40))


def test_the_set_is_pinned_to_its_numbers():
    """Another Python or NumPy must draw the same people."""
    face = attributes(1234, seed=5)
    assert (face.hair_style, face.fringe, face.mouth, face.collar) == ("space buns", "right", "open", "crew")
    assert face.light == pytest.approx(0.04951393119099512, abs=1e-12)
    pixels = [
        [[186, 146, 113], [200, 159, 108], [210, 166, 118]],
        [[186, 146, 113], [89, 110, 131], [156, 130, 105]],
        [[186, 146, 113], [95, 72, 68], [198, 156, 124]],
    ]
    np.testing.assert_allclose(draw(face, 8, 8)[::3, ::3].astype(int), pixels, atol=1)


def test_indexes_and_seeds_give_different_faces():
    assert len({astuple(face) for seed in range(3) for face in crowd(300, seed)}) == 900
    drawn = images(crowd(20), 32, 32)
    apart = torch.pdist(drawn.flatten(1), p=1) / drawn[0].numel()
    assert apart.min() > 0.05


def test_every_kind_of_part_occurs():
    faces = crowd(400)
    assert {face.hair_style for face in faces} == set(HAIR_STYLES)
    assert {face.fringe for face in faces} == set(FRINGES)
    for field in fields(Face):
        assert len({getattr(face, field.name) for face in faces}) > 1, field.name
    assert 0.2 < np.mean([face.glasses is not None for face in faces]) < 0.4
    assert min(face.light for face in faces) < -0.15
    assert max(face.light for face in faces) > 0.15


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 33), (32, 32), (33, 47), (64, 40), (128, 128)])
def test_any_size(height, width):
    for style in HAIR_STYLES:
        picture = draw(replace(attributes(0), hair_style=style, glasses=RED), height, width)
        assert picture.shape == (height, width, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 10


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 64)])
def test_edges_are_smooth(height, width):
    """A picture is close to the average over 2 x 2 blocks of itself drawn twice as large."""
    faces = crowd(30)
    small = images(faces, height, width)
    averaged = reduce(images(faces, 2 * height, 2 * width), "b c (h 2) (w 2) -> b c h w", "mean")
    every_second = images(faces, 2 * height, 2 * width)[..., ::2, ::2]
    assert (small - averaged).abs().mean() < 0.02
    assert (small - averaged).abs().mean() < 0.5 * (small - every_second).abs().mean()


def test_a_face_with_an_even_fringe_and_light_is_its_mirror_image():
    for index in range(30):
        face = replace(attributes(index), fringe="curtain", light=0.0)
        for width in (32, 45):
            picture = draw(face, 45, width).astype(int)
            assert np.abs(picture - picture[:, ::-1]).max() <= 1


def test_a_longer_side_only_adds_surroundings():
    face = attributes(4)
    square, wide, tall = draw(face, 40, 40), draw(face, 40, 60), draw(face, 60, 40)
    np.testing.assert_array_equal(tall[10:50], square)
    np.testing.assert_array_equal(wide[:, 10:50], square)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 33), (37, 41), (64, 64), (72, 48), (128, 128)])
def test_real_faces_agree_with_themselves(height, width):
    real = images(crowd(100 if height > 64 else 200, seed=1), height, width)
    for pictures in (real, real.flip(3)):
        measured = disagreement(pictures)
        assert set(measured) == ATTRIBUTES
        for name, value in measured.items():
            assert value.shape == (len(real),)
            assert value.max() < ROUNDING, name


def test_every_combination_of_parts_agrees_with_itself():
    extremes = [
        replace(
            attributes(index),
            hair_style=style,
            fringe=fringe,
            beard=True,
            glasses=BLUE,
            eye_size=1.08,
            brow_weight=0.016,
            brow_tilt=tilt,
            head_width=0.245,
            jaw=1.0,
            light=0.2,
        )
        for index, (style, fringe, tilt) in enumerate(
            (style, fringe, tilt) for style in HAIR_STYLES for fringe in FRINGES for tilt in (-0.1, 0.25)
        )
    ]
    for name, value in disagreement(images(extremes, 32, 32)).items():
        assert value.max() < ROUNDING, name


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("patches", [2, 4, 8])
def test_mixed_faces_disagree_in_everything(size, patches):
    faces = images(crowd(100, seed=2), size, size)
    mixture = mixed([faces.roll(shift, 0) for shift in range(patches**2)], patches)
    for name, value in disagreement(mixture).items():
        assert value.mean() > 20 * ROUNDING, name


@pytest.mark.parametrize("name", sorted(ONE_CHANGE))
@pytest.mark.parametrize("size", [32, 64])
def test_each_measure_reacts_to_its_own_attribute(name, size):
    before, after = images([plain_face(), replace(plain_face(), **ONE_CHANGE[name])], size, size).split(1)
    # Light is a difference between left and right, so it is top and bottom that must agree.
    parts = [before, before, after, after] if name == "lighting" else [before, after]
    measured = {key: value.item() for key, value in disagreement(mixed(parts, 2)).items()}
    reaction = measured.pop(name)
    assert reaction > 0.05
    assert max(measured.values()) < 0.1 * reaction, measured


def test_top_and_bottom_must_agree_in_background_and_skin():
    other = replace(plain_face(), background=(0.2, 0.4, 0.7), skin=(0.45, 0.3, 0.2))
    top, bottom = images([plain_face(), other], 64, 64).split(1)
    measured = disagreement(mixed([top, top, bottom, bottom], 2))
    assert measured["background"] > 0.1
    assert measured["skin"] > 0.1
    assert max(measured[name] for name in ("lighting", "hair", "eyes", "clothes")) < ROUNDING


def test_skin_by_hand():
    """White forehead on the left, grey elsewhere: two of the four comparisons see a difference of 1."""
    picture = torch.zeros(1, 3, 64, 64)
    _, _, top, bottom = REGIONS["forehead"]
    picture[:, :, int(64 * top) - 1 : int(64 * bottom) + 1, :32] = 1.0
    assert disagreement(picture)["skin"].item() == pytest.approx(0.5)


def test_lighting_by_hand():
    """Lit from the left at the top, from the right at the bottom: +-10 % of mid-grey differ by 0.2."""
    ramp = torch.ones(64).index_fill(0, torch.arange(32), -1.0)
    rows = torch.ones(64).index_fill(0, torch.arange(32), -1.0)
    picture = (0.1 * rows[:, None] * ramp).expand(1, 3, 64, 64)
    assert disagreement(picture)["lighting"].item() == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_a_blank_picture_agrees_with_itself(level):
    for value in disagreement(torch.full((2, 3, 32, 32), level)).values():
        assert value.tolist() == [0.0, 0.0]
