import math

import pytest
import torch

from patch_based_ddpm.evaluation.seams import contrast, profiles, worst_ratio
from support import patches
from support.face_images import crowd, images, mixed


def mean_profile(pictures):
    rows, columns = profiles(pictures)
    return rows.mean(0), columns.mean(0)


def seam_ratio(generated, real, patch_divider, **options):
    return contrast(mean_profile(generated), patch_divider, **options) / contrast(
        mean_profile(real), patch_divider, **options
    )


def test_profile_by_hand():
    picture = torch.tensor([[[[0.0, 1.0, 1.0], [0.5, 0.5, -0.5]]]])
    rows, columns = profiles(picture)
    assert rows.tolist() == [pytest.approx([(0.5 + 0.5 + 1.5) / 3])]
    assert columns.tolist() == [pytest.approx([0.5, 0.5])]
    assert rows.dtype == torch.float64


@pytest.mark.parametrize(("height", "width", "patch_divider"), [(8, 12, 2), (12, 12, 3), (16, 8, 4)])
def test_contrast_by_hand(height, width, patch_divider):
    """A ramp of 0.01 a pixel down and right, and a step of 0.05 more at each border: 6 to 1, not square or square."""
    h, w = height // patch_divider, width // patch_divider
    y, x = torch.arange(height)[:, None], torch.arange(width)
    picture = (0.01 * (y + x) + 0.05 * (y // h + x // w))[None, None].expand(2, 3, height, width)
    profile = mean_profile(picture)
    assert contrast(profile, patch_divider) == pytest.approx(6, rel=1e-4)
    assert contrast(profile, patch_divider, offset=1 / 2) < 1
    smooth = (0.01 * (y + x))[None, None].expand(2, 3, height, width)
    assert seam_ratio(picture, smooth, patch_divider) == pytest.approx(6, rel=1e-4)


def test_pairs_count_alike_whichever_side_is_longer():
    """Steps of 3 between rows, 1 between columns: the mean weighs each by its number of pixel pairs."""
    y, x = torch.arange(4)[:, None], torch.arange(8)
    profile = mean_profile((3.0 * (y // 2) + 1.0 * (x // 4) + 0.5 * x)[None, None])
    # 8 pairs of 3 and 4 of 1.5 across; elsewhere 16 of 0 and 24 of 0.5
    assert contrast(profile, 2) == pytest.approx(((8 * 3 + 4 * 1.5) / 12) / (24 * 0.5 / 40))


def test_the_shifted_grid_lies_between_the_borders():
    step = (torch.arange(8) >= 2).float()  # between columns 1 and 2: half a patch of 4 pixels
    picture = (step + 0.1 * torch.arange(8))[None, None, None].expand(1, 1, 8, 8)
    assert contrast(mean_profile(picture), 2, offset=1 / 2) > 2
    assert contrast(mean_profile(picture), 2) < 1


def test_faces_are_seamless_and_mixtures_are_not():
    real, others = (images(crowd(200, seed=seed), 64, 64) for seed in (1, 2))
    assert seam_ratio(others, real, 4) == pytest.approx(1, abs=0.05)
    assert seam_ratio(real, real, 4) == 1
    tints = torch.randn(16 * 200, 3, 1, 1) * 0.1
    tinted = patches.merge(patches.split(real, 4) + tints, 4)
    mixture = mixed([real.roll(shift, 0) for shift in range(16)], 4)
    ratios = [seam_ratio(generated, real, 4) for generated in (real, tinted, mixture)]
    assert ratios == sorted(ratios)
    assert ratios[1] > 1.5
    for generated in (tinted, mixture):  # away from the borders nothing stands out
        assert seam_ratio(generated, real, 4, offset=1 / 2) < 1


def test_nothing_to_compare_is_not_a_number():
    assert math.isnan(contrast(mean_profile(torch.zeros(1, 3, 8, 8)), 2))
    assert math.isnan(contrast(mean_profile(torch.randn(1, 3, 4, 4)), 4))  # every pair straddles a border
    assert math.isnan(contrast(mean_profile(torch.randn(1, 3, 4, 4)), 1))  # none does


def test_a_seam_counts_wherever_it_is():
    real, others = (images(crowd(200, seed=seed), 32, 32) for seed in (1, 2))
    assert worst_ratio(mean_profile(real), mean_profile(real), 4) == 1
    assert worst_ratio(mean_profile(others), mean_profile(real), 4) == pytest.approx(1, abs=0.1)
    tints = torch.randn(16 * 200, 3, 1, 1) * 0.1
    for shift in (0, 1, 4, 7):  # the borders are moved, not the faces
        tinted = patches.merge(patches.split(others.roll((-shift, -shift), (2, 3)), 4) + tints, 4)
        tinted = tinted.roll((shift, shift), (2, 3))
        worst = worst_ratio(mean_profile(tinted), mean_profile(real), 4)
        assert worst > 1.5
        assert seam_ratio(tinted, real, 4) == (worst if shift == 0 else pytest.approx(0.9, abs=0.1))


def test_phases_of_patches_that_are_not_square():
    y, x = torch.arange(16)[:, None], torch.arange(8)
    smooth = (0.01 * (y + x))[None, None].expand(1, 3, 16, 8)
    seams = smooth + 0.05 * (((y + 4) // 8) + ((x + 2) // 4))
    assert worst_ratio(mean_profile(seams), mean_profile(smooth), 2) == pytest.approx(6, rel=1e-4)
    assert seam_ratio(seams, smooth, 2) < 1


def test_a_phase_that_cannot_be_compared_is_not_a_number():
    assert math.isnan(worst_ratio(mean_profile(torch.zeros(1, 3, 8, 8)), mean_profile(torch.randn(1, 3, 8, 8)), 2))
    assert math.isnan(worst_ratio(mean_profile(torch.randn(1, 3, 8, 8)), mean_profile(torch.zeros(1, 3, 8, 8)), 2))
