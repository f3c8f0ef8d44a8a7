import torch

from patch_based_ddpm.memory import peak_memory

MIB = 2**20


def test_the_peak_counts_what_was_held_for_a_moment():
    """The peak never falls, so the block must be larger than all that this process has held before."""
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    size = before + 64 * MIB
    block = torch.ones(size, dtype=torch.uint8)
    del block
    after = peak_memory(cpu)
    assert size < after < before + size + 64 * MIB
