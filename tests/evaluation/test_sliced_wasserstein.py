import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.evaluation import sliced_wasserstein
from patch_based_ddpm.evaluation.sliced_wasserstein import (
    check_size,
    descriptors,
    distance,
    enlarge,
    laplacian_pyramid,
    normalise,
)
from support import patches
from support.face_images import crowd, images, mixed


def mean_cosine(values):
    """Mean |cosine| of the angle between a fixed and a random direction in `values` dimensions."""
    return math.exp(math.lgamma(values / 2) - math.lgamma((values + 1) / 2)) / math.sqrt(math.pi)


@pytest.mark.parametrize("values", [3, 147])
def test_a_shift_by_a_constant(values):
    """Every projection moves by |shift| |cos|: of 512 directions the mean is a few percent from its expectation."""
    cloud, shift = torch.randn(500, values), torch.randn(values)
    expected = shift.norm().item() * mean_cosine(values)
    assert distance(cloud, cloud + shift) == pytest.approx(expected, rel=0.08)
    assert distance(cloud, cloud + 2 * shift) == pytest.approx(2 * distance(cloud, cloud + shift), rel=1e-4)


def test_one_dimension_is_sorting():
    a, b = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[5.0], [0.0], [2.5]])
    assert distance(a, b) == pytest.approx((1 + 0.5 + 2) / 3)
    assert distance(a, a[[2, 0, 1]]) == 0


def test_of_a_larger_cloud_the_quantiles_are_compared():
    cloud = torch.randn(200, 5)
    assert distance(cloud, cloud.repeat(3, 1)) == pytest.approx(0, abs=1e-7)
    assert distance(cloud.repeat(3, 1) + 1, cloud) == pytest.approx(distance(cloud + 1, cloud), rel=1e-4)


def test_small_images_are_refused():
    check_size(16, 64)
    with pytest.raises(InputError, match="15 x 64 pixels; each side must be 16 or more"):
        check_size(15, 64)


@pytest.mark.parametrize(
    "sizes",
    [
        [(128, 128), (64, 64), (32, 32), (16, 16)],
        [(16, 40)],
        [(30, 64)],
        [(31, 64), (16, 32)],
        [(33, 50), (17, 25)],
    ],
)
def test_a_pyramid_adds_up_to_its_image(sizes):
    pictures = torch.randn(2, 3, *sizes[0])
    pyramid = laplacian_pyramid(pictures)
    assert [tuple(level.shape[2:]) for level in pyramid] == sizes
    total = pyramid[-1]
    for level in pyramid[-2::-1]:
        total = level + enlarge(total, *level.shape[2:])
    torch.testing.assert_close(total, pictures)


def test_only_the_coarsest_level_sees_a_flat_image():
    *fine, coarse = laplacian_pyramid(torch.full((1, 3, 64, 64), 0.3))
    assert all(level[:, :, 2:-2, 2:-2].abs().max() < 1e-6 for level in fine)
    torch.testing.assert_close(coarse, torch.full((1, 3, 16, 16), 0.3))


def test_a_level_by_hand():
    """A single bright pixel: the filter's centre takes (6/16)^2 of it, and gives 4 (6/16)^2 of that back."""
    picture = torch.zeros(1, 1, 32, 32)
    picture[0, 0, 16, 16] = 1
    fine, coarse = laplacian_pyramid(picture)
    assert coarse[0, 0, 8, 8].item() == pytest.approx((6 / 16) ** 2)
    assert coarse[0, 0, 8, 9].item() == pytest.approx(6 / 16 * 1 / 16)
    one_dimension = 2 * ((6 / 16) ** 2 + 2 * (1 / 16) ** 2)
    assert fine[0, 0, 16, 16].item() == pytest.approx(1 - one_dimension**2)


def test_descriptors_are_patches_of_the_image_and_depend_on_its_position_alone(monkeypatch):
    monkeypatch.setattr(sliced_wasserstein, "MOST_PATCHES", 24)
    pictures = torch.randn(6, 2, 16, 20).half().float()
    (cut,) = descriptors(pictures, range(6), 6).values()
    assert cut.shape == (6 * 4, 2 * 49)
    windows = pictures.unfold(2, 7, 1).unfold(3, 7, 1)  # (6, 2, 10, 14, 7, 7)
    for number, patch in enumerate(cut.float().reshape(24, 2, 1, 1, 7, 7)):
        assert (windows[number // 4] == patch).all(dim=(0, 3, 4)).sum() == 1
    shares = descriptors(pictures[:2], range(2), 6), descriptors(pictures[2:], range(2, 6), 6)
    assert torch.equal(torch.cat([share["16 x 20 px"] for share in shares]), cut)


def test_patches_come_from_everywhere():
    pictures = torch.arange(20.0).expand(2, 1, 16, 20)
    (cut,) = descriptors(pictures, range(2), 2).values()
    assert set(cut[:, 0].int().tolist()) == set(range(14))
    assert not torch.equal(*cut.split(128))  # of equal images, at different places


def test_the_number_of_patches_is_bounded():
    pictures = torch.zeros(1, 1, 16, 16)
    cut = [descriptors(pictures, range(1), count)["16 px"] for count in (1, 1024, 2048, 10**4, 10**6)]
    assert [*map(len, cut)] == [128, 128, 64, 13, 1]


def test_each_channel_is_normalised_over_the_whole_set():
    patches_ = torch.randn(50, 3 * 49) * torch.tensor([1.0, 5.0, 0.0]).repeat_interleave(49) + 7
    channels = normalise(patches_.half()).reshape(50, 3, 49)
    np.testing.assert_allclose(channels.mean((0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(channels.std((0, 2), correction=0), [1, 1, 0], atol=1e-4)


def test_degraded_sets_are_told_apart_at_the_right_level(monkeypatch):
    monkeypatch.setattr(sliced_wasserstein, "MOST_PATCHES", 4000)
    monkeypatch.setattr(sliced_wasserstein, "DIRECTIONS", 128)
    real, others = (images(crowd(200, seed=seed), 64, 64) for seed in (1, 2))
    theirs = descriptors(real, range(200), 200)

    def swd(generated):
        ours = descriptors(generated, range(200), 200)
        return [1000 * distance(normalise(ours[size]), normalise(theirs[size])) for size in theirs]

    assert swd(real) == [0, 0, 0]
    floor = swd(others)
    blurred = F.avg_pool2d(F.pad(real, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    tinted = patches.merge(patches.split(real, 4) + torch.randn(16 * 200, 3, 1, 1) * 0.2, 4)
    mixture = mixed([real.roll(shift, 0) for shift in range(16)], 4)
    fine, middle, coarse = swd(blurred)
    assert fine > 2 * floor[0]
    assert fine > middle > coarse
    assert swd(tinted)[0] > 1.5 * floor[0]  # its steps at the borders
    assert all(value > 1.5 * least for value, least in zip(swd(mixture), floor))
