import math

import numpy as np
import pytest
import torch

from patch_based_ddpm.randomness import ImageNoise, Purpose, generator


def draw(*names):
    return torch.randint(2**62, (4,), generator=generator(*names)).tolist()


def test_same_names_same_numbers():
    assert draw(1, 2, 3) == draw(1, 2, 3) == draw(np.int64(1), Purpose(2), 3)


def test_every_other_list_of_names_draws_other_numbers():
    # among them pairs that numpy's SeedSequence alone takes for the same: trailing zeros, and words of long integers
    lists = [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (1, 2, 0, 0), (12,), (2**32,), (0, 1), (2**32 + 5,), (5,)]
    assert len({tuple(draw(*names)) for names in lists}) == len(lists)


def test_largest_name():
    assert draw(2**64 - 1) != draw(2**63 - 1)


def test_numbers_are_what_they_were():
    """Runs that were started with an earlier version resume on the same stream."""
    assert torch.randint(1000, (4,), generator=generator(1234, Purpose.SHUFFLE, 7)).tolist() == [492, 844, 789, 521]


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [-1, 2**64, 1.0, "1", None])
def test_refuses_what_is_no_name(name):
    with pytest.raises(AssertionError):
        generator(1, name)


def test_image_noise_depends_on_the_seed_alone():
    shape = (3, 4, 5)
    first, second = ImageNoise([3, 8], shape, "cpu"), ImageNoise(iter([8, 5, 3]), shape, "cpu")
    alone = torch.Generator().manual_seed(8)
    for _ in range(3):
        a, b = first(), second()
        assert torch.equal(a[1], b[0])
        assert torch.equal(a[0], b[2])
        assert torch.equal(a[1], torch.randn(shape, generator=alone))
        assert not torch.equal(a[0], a[1])


def test_image_noise_is_standard_normal_and_new_each_time():
    noise = ImageNoise([0, 1], (3, 100, 100), "cpu")
    first, second = noise(), noise()
    for values in (first, second, (first + second) / math.sqrt(2)):
        assert values.mean().item() == pytest.approx(0, abs=0.02)
        assert values.std().item() == pytest.approx(1, abs=0.015)
