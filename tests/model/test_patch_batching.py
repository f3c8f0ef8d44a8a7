"""Patch batching: the size of passes, padded or not."""

import pytest
import torch

from patch_based_ddpm.errors import OnePatchTooMany
from patch_based_ddpm.model.patch_batching import PatchBatching


@pytest.mark.parametrize(
    ("limit", "requested", "size"), [(None, None, 12), (None, 5, 5), (4, 5, 4), (9, 5, 5), (50, 50, 12)]
)
def test_a_pass_is_as_large_as_request_and_limit_allow(limit, requested, size):
    assert PatchBatching(limit=limit).size(12, requested) == size


def test_padded_passes_keep_the_largest_size():
    batching = PatchBatching(padded=True)
    assert [batching.size(total, None) for total in (64, 16, 32)] == [64, 64, 64]
    assert [batching.size(total, 16) for total in (64, 8)] == [16, 16]


def test_a_smaller_request_is_honoured_by_padded_passes():
    batching = PatchBatching(padded=True)
    assert [batching.size(64, requested) for requested in (16, 4, None, 2)] == [16, 4, 64, 2]


def test_a_padded_pass_repeats_the_last_patch():
    assert PatchBatching(padded=True).indices(8, 6, 10, torch.device("cpu")).tolist() == [8, 9, 9, 9, 9, 9]
    assert PatchBatching().indices(8, 6, 10, torch.device("cpu")).tolist() == [8, 9]


def test_running_out_of_memory_halves_padded_passes_too():
    batching = PatchBatching(padded=True)
    batching.size(12, None)
    with pytest.warns(RuntimeWarning, match="with 12 patches in a pass; going on with 6"):
        batching.shrink(12)
    assert [batching.size(total, None) for total in (12, 4)] == [6, 6]
    with pytest.raises(OnePatchTooMany, match="single patch"):
        batching.shrink(1)
