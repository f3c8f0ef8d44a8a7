from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from patch_based_ddpm.planning.live_memory import KIB, KINDS, MIB, LiveMemory, peak_memory


def test_the_peak_of_the_process_counts_what_was_held_for_a_moment():
    """The peak never falls, so the block must be larger than all that this process has held before."""
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    size = before + 64 * MIB
    block = torch.ones(size, dtype=torch.uint8)
    del block
    after = peak_memory(cpu)
    assert size < after < before + size + 64 * MIB


def layer(features):
    return nn.Linear(features, features, bias=False)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("fake", [False, True])
def test_a_chain_of_layers_by_hand(fake, inference):
    """Two maps of 4 x 256 float32 (4 KiB) live at a time, and the weights are 256 x 256 (256 KiB) each."""
    with FakeTensorMode() if fake else nullcontext():
        chain = nn.Sequential(layer(256), layer(256), layer(256)).requires_grad_(False)
        chain.register_buffer("table", torch.zeros(1024))
        with LiveMemory(chain) as memory, torch.inference_mode(inference):
            chain(torch.zeros(4, 256))
    peak = memory.peak()
    assert (peak.weights, peak.buffers) == (3 * 256 * KIB, 4 * KIB)
    assert (peak.gradients, peak.optimizer) == (0, 0)
    # The chain's input lives on in its caller.
    assert peak.activations == 3 * 4 * KIB
    assert peak.total == (3 * 256 + 4 + 3 * 4) * KIB


def test_views_and_updates_in_place_cost_nothing():
    with LiveMemory(nn.Identity()) as memory:
        x = torch.zeros(1024)
        x.view(32, 32).t()[3].add_(1).mul_(2)
        x[5:].fill_(1)
    assert memory.peak().activations == 4 * KIB


def test_what_is_freed_makes_room():
    with LiveMemory(nn.Identity()) as memory:
        for _ in range(5):
            torch.zeros(1024)
        x = torch.zeros(256)
        y = torch.zeros(2048)
        del x
        torch.zeros(256)
        del y
    assert memory.peak().activations == (1 + 8) * KIB


def test_what_lives_inside_an_operator_made_of_others_counts_in_every_mode():
    """softplus-like composites arrive whole under inference mode; `einsum` makes a copy on its way."""
    seen = []
    for inference in (False, True):
        with LiveMemory(nn.Identity()) as memory, torch.inference_mode(inference):
            a = torch.zeros(2, 32, 32)
            torch.einsum("nij,njk->ik", a, a)
        seen.append(memory.peak().activations)
    assert seen[0] == seen[1]
    assert seen[0] > (2 * 4 + 4) * KIB


def test_training_is_told_apart():
    model = nn.Sequential(layer(256), nn.Sigmoid(), layer(256))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x = torch.zeros(4, 256)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with LiveMemory(model, optimizer) as memory:
        for _ in range(2):
            model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()  # gradients that are gone when the context closes count as well
    peak = memory.peak()
    assert peak.weights == 2 * 256 * KIB
    assert peak.gradients == 3 * 256 * KIB  # the second backward pass makes one, then adds it to what is there
    assert peak.optimizer == 2 * 2 * 256 * KIB + 2 * 4
    assert 3 * 4 * KIB <= peak.activations <= 5 * 4 * KIB
    assert peak.total <= sum(getattr(peak, kind) for kind in KINDS)


def test_copies_of_weights_in_another_precision_are_weights():
    model = layer(256)
    with LiveMemory(model) as memory, torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(4, 256)).sum().backward()
    peak = memory.peak()
    assert peak.weights == (256 + 128) * KIB
    assert peak.gradients == (256 + 128) * KIB  # in bfloat16 first
    assert peak.activations < 32 * KIB


def test_a_gradient_that_autograd_copies_counts_though_it_is_gone_in_the_end():
    """The gradient of a sum is one number, expanded; `.grad` is a copy with the parameter's strides."""
    model = layer(256)
    with LiveMemory(model) as memory:
        model.weight.sum().backward()
        model.zero_grad()
    assert memory.peak().gradients >= 256 * KIB
