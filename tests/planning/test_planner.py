import contextlib
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import FakeTensorMode

from patch_based_ddpm import Config, GaussianDiffusion, UNet, samplers
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.planning import planner
from patch_based_ddpm.planning.live_memory import KIB, KINDS, MIB, LiveMemory, Peak
from patch_based_ddpm.training.step import TrainingStep


def paper(N, size=128, **trainer):
    """The paper's network."""
    trainer = {"train_dataset_dir": "builtin:faces", "log_dir": "unused", **trainer}
    return Config.from_dict({"trainer": trainer, "model": {"dim": 128, "patch_divider": N, "image_size": size}})


def small(N, halo=0, **trainer):
    trainer = {"train_dataset_dir": "builtin:faces", "log_dir": "unused", "train_batch_size": 2, **trainer}
    model = {"dim": 16, "dim_mults": [1, 2], "patch_divider": N, "image_size": 32, "halo": halo}
    return Config.from_dict({"trainer": trainer, "model": model})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "size", "halo"), [(1, None, 0), (2, 1, 0), (2, 3, 0), (2, 3, 4), (4, 5, 0), (4, 1, 2), (4, None, 0)]
)
def test_sampling_is_predicted(N, size, halo, dtype):
    diffusion = GaussianDiffusion.from_config(small(N, halo)).requires_grad_(False)
    diffusion.unet.to(dtype)
    options = {"sampler": "ddpm", "steps": None, "eta": 0.0, "patch_batch_size": size}
    with LiveMemory(diffusion) as memory, torch.inference_mode():
        samplers.draw(diffusion, [0, 1], progress=lambda steps: steps[:3], **options)
    measured = memory.peak()
    predicted = planner.sampling_peak(small(N, halo), batch_size=2, patch_batch_size=size, dtype=dtype)
    for kind in (*KINDS, "total"):
        assert getattr(predicted, kind) == pytest.approx(getattr(measured, kind), rel=0.05), kind


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddim", {"eta": 1.0}), ("dpm-solver++", {}), ("dpm-solver++", {"order": 3}), ("dpm-solver++", {"eta": 1.0})],
)
def test_what_a_sampler_keeps_is_predicted(sampler, options):
    """With so many images and so small a network, the predictions kept are a good part of what sampling holds."""
    config, options = small(4, 0), {"eta": 0.0, "order": None, **options}
    diffusion = GaussianDiffusion.from_config(config).requires_grad_(False)
    with LiveMemory(diffusion) as memory, torch.inference_mode():
        samplers.draw(diffusion, range(16), sampler=sampler, steps=5, patch_batch_size=16, **options)
    predicted = planner.sampling_peak(
        config, batch_size=16, patch_batch_size=16, sampler=samplers.SamplerConfig(name=sampler, **options)
    )
    assert predicted.activations == pytest.approx(memory.peak().activations, rel=0.05)


def training_step(config, precision="no"):
    """The step that training takes, after its first one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    unet = UNet.from_config(config.model)
    unet.recompute = config.trainer.recompute_activations
    unet, optimizer = accelerator.prepare(unet, torch.optim.Adam(unet.parameters(), fused=True))
    step = TrainingStep(config.trainer, accelerator, GaussianDiffusion(unet, config), optimizer)
    step(0, micro_batches(config))
    return step


def micro_batches(config):
    return [torch.zeros(2, 3, 32, 32)] * config.trainer.gradient_accumulate_every


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "recompute"), [("no", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize(
    ("N", "size", "halo", "accumulate"),
    [
        (1, None, 0, 1),
        (1, None, 0, 3),
        (2, 1, 0, 1),
        (2, 3, 4, 1),
        (4, 5, 0, 2),
        (4, 1, 2, 1),
        (4, None, 0, 1),
    ],
)
def test_training_is_predicted(N, size, halo, accumulate, precision, recompute):
    """Against training's own step, whose averaged weights are added by hand; only losses of later passes are missed."""
    given = {"patch_batch_size": size, "recompute_activations": recompute, "gradient_accumulate_every": accumulate}
    config = small(N, halo, **given)
    step = training_step(config, precision)
    with LiveMemory(step.diffusion, step.optimizer.optimizer) as memory:
        step(1, micro_batches(config))
    measured = memory.peak()
    predicted = planner.training_peak(config, batch_size=2, patch_batch_size=size, precision=precision)
    averaged = sum(p.numel() * 4 for p in step.diffusion.parameters())
    buffers = sum(b.numel() * 4 for b in step.diffusion.buffers())
    assert predicted.weights == measured.weights + averaged
    assert (predicted.gradients, predicted.optimizer) == (measured.gradients, measured.optimizer)
    assert predicted.activations == pytest.approx(measured.activations, abs=KIB)
    assert predicted.total == pytest.approx(measured.total + averaged + buffers, abs=KIB)


def test_training_and_its_prediction_run_the_same_code(monkeypatch):
    """A tensor that the gradient's computation keeps is counted in both."""
    config = small(1)
    accumulate = GaussianDiffusion.accumulate_gradient

    def wasteful(*args, **options):
        kept = torch.zeros(MIB // 4)
        yield from accumulate(*args, **options)
        del kept

    activations = []
    for _ in range(2):
        step = training_step(config)
        with LiveMemory(step.diffusion, step.optimizer.optimizer) as memory:
            step(1, micro_batches(config))
        predicted = planner.training_peak(config, batch_size=2, patch_batch_size=None)
        activations.append([memory.peak().activations, predicted.activations])
        monkeypatch.setattr(GaussianDiffusion, "accumulate_gradient", wasteful)
    assert [more - usual for usual, more in zip(*activations, strict=True)] == [MIB, MIB]


@pytest.mark.parametrize(
    ("N", "size", "sampling", "training"),
    [
        (1, None, 1_335_100, 6_525_672),
        (2, 1, 395_080, 1_722_616),
        (4, 1, 157_048, 513_704),
        (4, None, 1_635_880, 7_654_480),
    ],
)
def test_activations_to_the_byte(N, size, sampling, training):
    """A change of these figures changes the size of model that fits: it must be on purpose."""
    one = {"batch_size": 1, "patch_batch_size": size}
    assert planner.sampling_peak(small(N), **one).activations == sampling
    assert planner.training_peak(small(N), **one).activations == training


@pytest.mark.parametrize("grids", [2, 4])
def test_grids_take_no_memory_but_that_of_their_positions(grids):
    """In training one grid at a time is drawn for an image; in sampling blended grids share the canvas."""
    config, one = paper(4), {"batch_size": 1, "patch_batch_size": 1}
    several = replace(config, model=replace(config.model, grids=grids))
    for peak in (planner.training_peak, planner.sampling_peak):
        before, after = peak(config, **one), peak(several, **one)
        assert before.activations < after.activations < before.activations + 500
        copies = 2 if peak is planner.training_peak else 1
        assert after.weights - before.weights == copies * 4 * 128 * 16 * (grids - 1)


def test_several_processes_keep_their_gradients_for_the_exchange():
    alone, accumulating = small(2), small(2, gradient_accumulate_every=2)
    one = {"batch_size": 2, "patch_batch_size": None}
    several = planner.training_peak(alone, **one, processes=2)
    assert several == planner.training_peak(accumulating, **one)
    assert several.total > planner.training_peak(alone, **one).total + 0.5 * several.gradients


@contextlib.contextmanager
def autocast(device):
    """As torch.autocast does it, which does nothing for a GPU that is not there."""
    before = torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before)
        torch.clear_autocast_cache()


def test_a_gpus_autocast_holds_what_a_cpus_does():
    """It would return float32 from norms and softmaxes. Fake tensors claim to be on a GPU; forward pass of a level."""
    held = {}
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), torch.device(device):
            level = UNet.from_config(small(2).model).encoder[0]
            x, condition = torch.zeros(8, 10, 16, 16).to(memory_format=torch.channels_last), torch.zeros(8, 64)
            with LiveMemory(level) as memory, autocast(device):
                out = level(x, condition)
            assert (out.device.type, out.dtype) == (device, torch.bfloat16)
        held[device] = memory.peak()
    assert held["cuda"].activations == pytest.approx(held["cpu"].activations, rel=0.01)


@pytest.mark.slow
def test_training_activations_fall_as_the_square_of_the_divider():
    held = {n: planner.training_peak(paper(n), batch_size=1, patch_batch_size=1).activations for n in (1, 2, 4, 8)}
    for n in (2, 4, 8):
        assert held[n] <= 1.15 * held[1] / n**2, (n, held)


@pytest.mark.slow
def test_recomputing_holds_less():
    held = [
        planner.training_peak(paper(4, recompute_activations=on), batch_size=1, patch_batch_size=1).activations
        for on in (True, False)
    ]
    assert held[0] < 0.6 * held[1]


@pytest.mark.parametrize(
    ("size", "N", "most"), [(128, 1, 60), (128, 2, 16), (128, 4, 5), (128, 8, 2), (256, 4, 16), (256, 8, 6)]
)
def test_sampling_activations_of_the_papers_network(size, N, most):
    peak = planner.sampling_peak(paper(N, size), batch_size=1, patch_batch_size=1)
    assert peak.activations <= most * MIB
    assert peak.weights == pytest.approx(483.7 * MIB, rel=1e-3)


def test_a_large_picture_on_a_small_card():
    peak = planner.sampling_peak(paper(16, 1024), batch_size=1, patch_batch_size=1, dtype=torch.bfloat16)
    assert peak.total < 340 * MIB
    assert peak.weights == pytest.approx(242 * MIB, rel=1e-2)


def test_with_a_halo_memory_grows_as_the_window_and_falls_as_the_square_of_the_divider():
    held = {}
    for n, halo in ((2, 0), (2, 16), (4, 8)):  # a quarter of the patch on each side: windows of 1.5^2 times its pixels
        config = paper(n).to_dict()
        config["model"]["halo"] = halo
        config = Config.from_dict(config)
        held[n, halo] = planner.sampling_peak(config, batch_size=1, patch_batch_size=1).activations
    assert held[2, 16] <= 1.15 * 1.5**2 * held[2, 0]
    assert held[4, 8] <= 1.15 * held[2, 16] / 4


def peak(total):
    return Peak(weights=100 * MIB, gradients=0, optimizer=0, buffers=0, activations=total - 100 * MIB, total=total)


@pytest.mark.parametrize("slope", [1, 3.3, 7])
@pytest.mark.parametrize("bend", [0, 0.02])
def test_the_largest_patch_batch_is_found(slope, bend):
    """Against trying all, on lines and on curves."""
    totals = {k: int((200 + slope * k + bend * k**2) * MIB) for k in range(1, 65)}
    asked = []

    def peak_of(size):
        asked.append(size)
        return peak(totals[size])

    for room in range(int(202 + slope), 1000, 17):
        asked.clear()
        size, found = planner.largest_patch_batch(peak_of, 64, room * MIB)
        assert size == max(k for k, total in totals.items() if total <= room * MIB)
        assert found.total == totals[size]
        assert len(asked) <= 10


def test_nothing_fits_is_one_sentence_that_says_what_would():
    with pytest.raises(InputError) as error:
        planner.largest_patch_batch(lambda size: peak((200 + size) * MIB), 64, 200 * MIB)
    assert str(error.value) == (
        "--max-memory 200.0 MiB is too little: one patch at a time needs 201.0 MiB, of which weights 100.0 MiB."
    )


def test_arithmetic_of_the_papers_network():
    """72.5 billion multiplications and additions in a prediction of an image, counted independently."""
    config = Config.load("configs/config_patch_divider=4.json")
    assert planner.prediction_flops(config.model) / 2e9 == pytest.approx(72.5, rel=1e-3)
    assert planner.prediction_flops(replace(config.model, grids=4)) == pytest.approx(2 * 72.5e9, rel=1e-3)
    wider = planner.prediction_flops(replace(config.model, halo=8))
    assert wider == pytest.approx((48 / 32) ** 2 * 2 * 72.5e9, rel=0.02)
