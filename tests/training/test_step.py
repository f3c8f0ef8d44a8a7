import copy
import math

import pytest
import torch
from accelerate import Accelerator

from patch_based_ddpm import Config, GaussianDiffusion, UNet
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.randomness import Purpose, generator
from patch_based_ddpm.training.step import TrainingStep
from support.commands import launch

SEED = 7


def build(patch_batch_size=None, grids=1, **trainer):
    config = Config.from_dict(
        {
            "trainer": {
                "train_dataset_dir": "builtin:faces",
                "log_dir": "unused",
                "train_batch_size": 2,
                "seed": SEED,
                "patch_batch_size": patch_batch_size,
                **trainer,
            },
            "model": {
                "dim": 8,
                "dim_mults": [1, 2],
                "image_size": 8,
                "patch_divider": 2,
                "grids": grids,
                "resnet_block_groups": 4,
            },
        }
    )
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    unet = UNet.from_config(config.model)
    unet, optimizer = accelerator.prepare(
        unet, torch.optim.Adam(unet.parameters(), lr=config.trainer.train_lr, fused=True)
    )
    return TrainingStep(config.trainer, accelerator, GaussianDiffusion(unet, config), optimizer)


def images(count, seed=0):
    return torch.rand(count, 2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draws(step, micro_step):
    """The timesteps and noise that the step names by (seed, step, micro-step, process)."""
    random = generator(SEED, Purpose.DIFFUSE, step, micro_step, 0)
    t = torch.randint(1000, (2,), generator=random)
    return t, torch.randn(2, 3, 8, 8, generator=random)


def weights(training_step):
    return {name: values.clone() for name, values in training_step.diffusion.unet.state_dict().items()}


@pytest.mark.parametrize("patch_batch_size", [1, 3, None])
def test_one_step_is_adam_on_the_whole_image_gradient(patch_batch_size):
    step = build(patch_batch_size, gradient_accumulate_every=2)
    twin = build()
    batches = images(2)
    losses = [twin.diffusion.loss(x_0, *draws(5, i)) for i, x_0 in enumerate(batches)]
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = [p.grad.clone() for p in twin.diffusion.parameters()]

    applied = []
    step.optimizer.optimizer.register_step_pre_hook(
        lambda *_: applied.extend(p.grad.clone() for p in step.diffusion.parameters())
    )
    result = step(5, batches)

    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.patch_loss.mean(), loss.detach())
    torch.testing.assert_close(result.grad_norm, torch.cat([g.flatten() for g in gradients]).norm())
    for got, wanted in zip(applied, gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in step.diffusion.parameters())


def test_patch_loss_lies_where_the_patch_lies():
    step = build()
    (x_0,) = images(1)
    t, noise = draws(0, 0)
    with torch.no_grad():
        error = (step.diffusion.predict(step.diffusion.q_sample(x_0, t, noise), t) - noise).abs()
    by_hand = torch.stack([error[:, :, i : i + 4, j : j + 4].mean() for i in (0, 4) for j in (0, 4)])
    torch.testing.assert_close(step(0, [x_0]).patch_loss, by_hand)


def test_draws_differ_between_steps():
    step = build()
    assert step(0, images(1)).loss != step(1, images(1)).loss


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(poison):
    step = build()
    step(0, images(1))
    before, moments = weights(step), step.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    bad = images(1)
    bad[0, 0, 0, 0, 0] = poison
    result = step(1, bad)
    assert not result.applied
    assert all(torch.equal(values, before[name]) for name, values in weights(step).items())
    assert torch.equal(step.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert step(2, images(1)).applied
    assert not torch.equal(weights(step)["conv_in.weight"], before["conv_in.weight"])


class Cramped(torch.nn.Module):
    """Has room for a few patches; runs out of it in the middle of a step, when some gradients are there already."""

    def __init__(self, unet, room, passes_before):
        super().__init__()
        self.unet, self.room, self.passes_left = unet, room, passes_before

    def forward(self, patches, content, position, t):
        self.passes_left -= 1
        if self.passes_left < 0 and len(patches) > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.unet(patches, content, position, t)


def test_out_of_memory_begins_the_step_anew_with_smaller_passes():
    wanted, step = build(4, gradient_accumulate_every=2), build(4, gradient_accumulate_every=2)
    gradients = []
    for taker in (wanted, step):
        taker.optimizer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        )
    step.diffusion.unet = Cramped(step.diffusion.unet, room=1, passes_before=3)
    expected = wanted(5, images(2))
    with (
        pytest.warns(RuntimeWarning, match="with 4 patches in a pass; going on with 2"),
        pytest.warns(RuntimeWarning, match="with 2 patches in a pass; going on with 1"),
    ):
        got = step(5, images(2))
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.grad_norm, expected.grad_norm)
    for whole, halved in zip(*gradients, strict=True):
        torch.testing.assert_close(halved, whole, atol=1e-6, rtol=1e-4)


def test_a_single_patch_that_does_not_fit_is_one_sentence():
    step = build()
    step.diffusion.unet = Cramped(step.diffusion.unet, room=0, passes_before=0)
    with (
        pytest.warns(RuntimeWarning, match="with 8 patches in a pass; going on with 4"),
        pytest.warns(RuntimeWarning, match="going on with 2"),
        pytest.warns(RuntimeWarning, match="going on with 1"),
        pytest.raises(InputError, match="with a single patch in a pass"),
    ):
        step(0, images(1))


def test_loaded_moments_lie_as_their_parameters_do():
    """Fused Adam would mix the values up otherwise; older and published checkpoints hold them in another layout."""
    step, other = build(), build()
    for taker in (step, other):
        taker(0, images(1))
    state = copy.deepcopy(step.optimizer.state_dict())
    for values in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            values[name] = values[name].contiguous()
    strides = [
        [moments["state"][i]["exp_avg"].stride() for i in state["state"]]
        for moments in (state, other.optimizer.state_dict())
    ]
    assert strides[0] != strides[1]
    other.load_optimizer(state)
    for taker in (step, other):
        taker(1, images(1, seed=1))
    for name, values in weights(step).items():
        assert torch.equal(weights(other)[name], values), name


def test_clipping_scales_the_gradient_to_the_limit():
    limit = 0.01
    step = build(max_grad_norm=limit)
    norms = []
    step.optimizer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in step.diffusion.parameters()]).norm().item())
    )
    result = step(0, images(1))
    assert result.grad_norm > limit
    assert norms == [pytest.approx(limit, rel=1e-3)]


def test_learning_rate_warms_up_linearly():
    step = build(lr_warmup_steps=4, train_lr=1.0e-3)
    rates = []
    for i in (0, 1, 3, 9):
        step(i, images(1))
        rates.append(step.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3])


TWO_PROCESSES = '''
import sys
from pathlib import Path

import torch
from training.test_step import build, images, SEED
from patch_based_ddpm.randomness import Purpose, generator

step = build(patch_batch_size=3, grids=2, gradient_accumulate_every=2)
rank, world = step.accelerator.process_index, step.accelerator.num_processes
assert world == 2, world

unet = step.accelerator.unwrap_model(step.diffusion.unet)
alone = build(grids=2).diffusion
alone.unet = unet

def mean_gradient(number):
    """What each process alone would compute, without the wrapper; their mean is what an exchange must give."""
    wanted = [torch.zeros_like(p) for p in unet.parameters()]
    for process in range(2):
        for micro_step in range(2):
            random = generator(SEED, Purpose.DIFFUSE, number, micro_step, process)
            t = torch.randint(1000, (2,), generator=random)
            noise = torch.randn(2, 3, 8, 8, generator=random)
            grid = torch.randint(2, (2,), generator=random)
            loss = alone.loss(images(2, seed=process)[micro_step], t, noise, grid) / 4
            for total, part in zip(wanted, torch.autograd.grad(loss, list(unet.parameters()))):
                total += part
    return wanted

wanted = mean_gradient(4)
exchanges, applied = [], []
def all_reduce_mean(state, bucket):
    exchanges.append(bucket.index())
    work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
    return work.get_future().then(lambda f: f.value()[0])
step.diffusion.unet.register_comm_hook(None, all_reduce_mean)
step.optimizer.optimizer.register_step_pre_hook(lambda *_: applied.extend(p.grad.clone() for p in unet.parameters()))
result = step(4, images(2, seed=rank))

assert len(exchanges) == len(set(exchanges)), exchanges  # each bucket of gradients once, not once per chunk
for got, want in zip(applied, wanted, strict=True):
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
poisoned = images(2, seed=rank)
if rank == 1:
    poisoned[1, 0, 0, 0, 0] = float("nan")
before = unet.conv_in.weight.detach().clone()
assert not step(5, poisoned).applied  # both processes skip what one of them found not finite
assert torch.equal(unet.conv_in.weight, before)
places = [p.grad.data_ptr() for p in unet.parameters()]
assert step(6, images(2, seed=rank)).applied
assert places == [p.grad.data_ptr() for p in unet.parameters()]  # in the buckets, which stay

wanted = mean_gradient(7)
exchanges.clear()
applied.clear()
refused = []
if rank == 1:  # runs out of memory when the other process is about to exchange

    def cramped(_, inputs):
        if step.diffusion.unet.require_backward_grad_sync and len(inputs[0]) > 1:
            refused.append(len(inputs[0]))
            raise torch.OutOfMemoryError

    unet.register_forward_pre_hook(cramped)
step(7, images(2, seed=rank))
assert refused == [2] * rank, refused
assert len(exchanges) == len(set(exchanges)), exchanges
for got, want in zip(applied, wanted, strict=True):
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
Path(sys.argv[1], f"process {rank} of {world} agrees").touch()  # lines printed at once may run into each other
'''


@pytest.mark.parametrize("exchanging", [True, False])
def test_out_of_memory_in_the_exchange_of_several_processes_is_one_sentence(monkeypatch, exchanging):
    """In any other backward pass, the step is repeated with smaller passes."""
    step, left = build(4), [1]
    backward = step.accelerator.backward

    def cramped(loss):
        if left and left.pop():
            raise torch.OutOfMemoryError
        backward(loss)

    monkeypatch.setattr(step.accelerator, "backward", cramped)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    step.diffusion.unet.require_backward_grad_sync = exchanging
    if exchanging:
        with pytest.raises(InputError, match="memory while gradients were exchanged, with 4 patches in a pass"):
            step(0, images(1))
    else:
        with pytest.warns(RuntimeWarning, match="with 4 patches in a pass; going on with 2"):
            assert step(0, images(1)).applied


@pytest.mark.slow
def test_two_processes_exchange_the_mean_gradient_once(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(TWO_PROCESSES)
    agreed = tmp_path / "agreed"
    agreed.mkdir()
    done = launch(script, agreed, processes=2)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in agreed.iterdir()) == ["process 0 of 2 agrees", "process 1 of 2 agrees"]
