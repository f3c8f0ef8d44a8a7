import numpy as np
import pytest
import torch

from patch_based_ddpm.randomness import Purpose, generator


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
    with pytest.raises(ValueError, match="must be an integer in") as refusal:
        generator(1, name)
    assert repr(name) in str(refusal.value)
