import argparse
import dataclasses
import itertools
import math
import weakref

import pytest
import torch

from patch_based_ddpm import GaussianDiffusion
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.generation.options import add_flags, sampler_config
from patch_based_ddpm.randomness import ImageNoise
from patch_based_ddpm.samplers import SAMPLERS, SamplerConfig, ddim, ddpm, dpm_solver_pp, draw, timesteps, unipc
from patch_based_ddpm.samplers.sampler import Coefficients, Sampler
from support.oracles import Mixture, Oracle, PerfectDenoiser, alpha_bars

each_objective = pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])


@pytest.fixture
def make_diffusion(make_config):
    def make(**sections):
        return GaussianDiffusion.from_config(make_config(**sections)).eval().requires_grad_(False)

    return make


@pytest.fixture
def make_perfect(make_config):
    def make(mean, spread=0.0, **sections):
        config = make_config(**sections)
        return GaussianDiffusion(PerfectDenoiser(config, mean, spread), config).requires_grad_(False)

    return make


def noises(b=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(b, 3, 8, 8, generator=generator)


def test_ddim_over_all_steps_with_eta_1_is_ddpm(make_diffusion):
    diffusion = make_diffusion(diffusion={"timesteps": 20})
    x_T = torch.randn(2, 3, 8, 8)
    ancestral = ddpm(diffusion, x_T, noise=noises())
    torch.testing.assert_close(ddim(diffusion, x_T, steps=20, eta=1.0, noise=noises()), ancestral, atol=1e-4, rtol=1e-4)
    assert (ddim(diffusion, x_T, steps=20) - ancestral).abs().max() > 1e-2


@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_solvers_of_first_order_are_ddim_and_ddpm(make_diffusion, steps, spacing):
    diffusion, options = make_diffusion(diffusion={"timesteps": 20}), {"steps": steps, "spacing": spacing}
    x_T = torch.randn(2, 3, 8, 8)
    found = dpm_solver_pp(diffusion, x_T, order=1, **options)
    torch.testing.assert_close(found, ddim(diffusion, x_T, **options), atol=1e-4, rtol=1e-4)
    found = dpm_solver_pp(diffusion, x_T, order=1, eta=1, noise=noises(), **options)
    ancestral = ddpm(diffusion, x_T, noise=noises(), **options)
    torch.testing.assert_close(found, ancestral, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ddim(diffusion, x_T, eta=1, noise=noises(), **options), ancestral, atol=1e-4, rtol=1e-4)


def test_ddpm_is_algorithm_2(make_diffusion):
    """Against a loop over p_mean_variance and the variance, not its log."""
    diffusion, noise = make_diffusion(), noises()
    x_t = x_T = torch.randn(2, 3, 8, 8)
    for step in reversed(range(10)):
        mean, variance, _ = diffusion.p_mean_variance(x_t, torch.tensor([step, step]))
        x_t = mean + variance.sqrt() * noise() if step else mean
    torch.testing.assert_close(ddpm(diffusion, x_T, noise=noises()), x_t, atol=1e-5, rtol=1e-5)


@each_objective
def test_all_samplers_find_the_only_image_there_is(make_perfect, objective):
    image = torch.rand(3, 8, 8) * 2 - 1
    diffusion = make_perfect(image, diffusion={"objective": objective, "timesteps": 20})
    x_T, wanted = torch.randn(2, 3, 8, 8), image.expand(2, 3, 8, 8)
    for size in (None, 3):
        found = ddpm(diffusion, x_T, noise=noises(), patch_batch_size=size)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        for steps in (2, 3, 7, 20):
            found = ddim(diffusion, x_T, steps=steps, patch_batch_size=size)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
            found = ddim(diffusion, x_T, steps=steps, eta=0.7, noise=noises(), patch_batch_size=size)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
            found = ddpm(diffusion, x_T, steps=steps, noise=noises(), patch_batch_size=size)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
            for order, eta in ((2, 0), (2, 1), (3, 0), *([(3, 1)] if steps == 20 else [])):
                options = {"steps": steps, "order": order, "eta": eta, "patch_batch_size": size}
                found = dpm_solver_pp(diffusion, x_T, noise=noises(), **options)
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_one_step_is_the_first_guess(make_diffusion):
    diffusion, x_T = make_diffusion(), torch.randn(2, 3, 8, 8)
    guess = diffusion.predict_x_0(x_T, torch.tensor([9, 9]))
    assert torch.equal(ddim(diffusion, x_T, steps=1), guess)
    assert torch.equal(ddpm(diffusion, x_T, steps=1, noise=noises()), guess)
    for order in (1, 2, 3):
        assert torch.equal(dpm_solver_pp(diffusion, x_T, steps=1, order=order), guess)


@each_objective
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_ddim_is_its_formula_pixel_by_pixel(make_perfect, objective, steps):
    """Pixels of Gaussian data do not depend on each other, so one is followed in plain floats."""
    mean, spread, T = 0.3, 0.2, 50
    diffusion = make_perfect(torch.full((3, 8, 8), mean), spread, diffusion={"timesteps": T, "objective": objective})
    x_T = torch.randn(1, 3, 8, 8)
    a = alpha_bars(T)
    visited = [round(T - i * T / steps) - 1 for i in range(steps)]
    got = ddim(diffusion, x_T, steps=steps)
    for channel, y, x in [(0, 0, 0), (1, 3, 4), (2, 7, 5)]:
        value = x_T[0, channel, y, x].item()
        for t, s in zip(visited, [*visited[1:], None], strict=True):
            gain = spread**2 * math.sqrt(a[t]) / (a[t] * spread**2 + 1 - a[t])
            x_0 = min(max(mean + gain * (value - math.sqrt(a[t]) * mean), -1), 1)
            eps = (value - math.sqrt(a[t]) * x_0) / math.sqrt(1 - a[t])
            value = x_0 if s is None else math.sqrt(a[s]) * x_0 + math.sqrt(1 - a[s]) * eps
        assert got[0, channel, y, x].item() == pytest.approx(value, abs=1e-4)


def test_ddim_follows_the_exact_flow_of_gaussian_data(make_perfect):
    """With many steps, and a = alpha_bar_T, x_0 = mean + spread / sqrt(a spread^2 + 1 - a) (x_T - sqrt(a) mean)."""
    diffusion = make_perfect(torch.full((3, 8, 8), 0.1), 0.2, diffusion={"timesteps": 400})
    x_T = torch.randn(1, 3, 8, 8)
    a = alpha_bars(400)[-1]
    exact = 0.1 + 0.2 / math.sqrt(a * 0.2**2 + 1 - a) * (x_T - math.sqrt(a) * 0.1)
    torch.testing.assert_close(ddim(diffusion, x_T, steps=400), exact, atol=0.02, rtol=0)
    assert (ddim(diffusion, x_T, steps=4) - exact).abs().max() > 0.05


@each_objective
@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize(("T", "steps"), [(50, 5), (50, 12), (1000, 20)])
def test_dpm_solver_pp_is_its_algorithm_pixel_by_pixel(make_perfect, objective, T, steps, eta):
    """The published algorithm 2, and its form with noise, in plain floats; some x_0 are clipped on the way."""
    mean, spread = 0.6, 0.5
    diffusion = make_perfect(torch.full((3, 8, 8), mean), spread, diffusion={"timesteps": T, "objective": objective})
    x_T, noise, drawn = torch.randn(1, 3, 8, 8), noises(1), []

    def recorded():
        drawn.append(noise())
        return drawn[-1]

    visited, shown = [], []
    got = dpm_solver_pp(
        diffusion,
        x_T,
        steps=steps,
        eta=eta,
        noise=recorded,
        observe=lambda t, x_t, x_0: (visited.append(t), shown.append(x_0)),
    )
    a = alpha_bars(T)
    clipped = [tuple(place.tolist()) for x_0 in shown[:-1] for place in (x_0[0] == 1).nonzero()[:1]]
    assert clipped
    for channel, y, x in [(0, 0, 0), (1, 3, 4), *clipped]:
        value, before, h_before = x_T[0, channel, y, x].item(), None, None
        for i, (t, s) in enumerate(zip(visited, [*visited[1:], None], strict=True)):
            gain = spread**2 * math.sqrt(a[t]) / (a[t] * spread**2 + 1 - a[t])
            x_0 = min(max(mean + gain * (value - math.sqrt(a[t]) * mean), -1), 1)
            if s is None:
                break
            h = (math.log(a[s] / (1 - a[s])) - math.log(a[t] / (1 - a[t]))) / 2
            r = None if before is None else h_before / h
            D = x_0 if before is None else (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * before
            shrink = math.sqrt((1 - a[s]) / (1 - a[t]))
            if eta == 0:
                value = shrink * value - math.sqrt(a[s]) * math.expm1(-h) * D
            else:
                value = shrink * math.exp(-h) * value + math.sqrt(a[s]) * (1 - math.exp(-2 * h)) * D
                value += math.sqrt(1 - a[s]) * math.sqrt(1 - math.exp(-2 * h)) * drawn[i][0, channel, y, x].item()
            before, h_before = x_0, h
        assert got[0, channel, y, x].item() == pytest.approx(x_0, abs=2e-4)


@each_objective
@pytest.mark.parametrize(
    ("sampler", "eta", "steps"), [("ddpm", 0, 50), ("ddpm", 0, 13), ("ddim", 1.0, 25), ("ddim", 0.5, 50)]
)
def test_noisy_sampling_of_gaussian_data_has_the_right_moments(make_perfect, objective, sampler, eta, steps):
    """Every step is linear in x_t and in its noise, so mean and variance of the samples are known exactly."""
    mean, spread, T = 0.2, 0.15, 50
    diffusion = make_perfect(torch.full((3, 8, 8), mean), spread, diffusion={"timesteps": T, "objective": objective})
    a = alpha_bars(T)
    visited = [round(T - i * T / steps) - 1 for i in range(steps)]
    m, v = 0.0, 1.0
    for t, s in zip(visited, visited[1:]):
        gain = spread**2 * math.sqrt(a[t]) / (a[t] * spread**2 + 1 - a[t])
        offset = mean * (1 - gain * math.sqrt(a[t]))  # x_0 = gain x_t + offset
        share = 1.0 if sampler == "ddpm" else eta
        sigma = share * math.sqrt((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s]))
        turn = math.sqrt((1 - a[s] - sigma**2) / (1 - a[t]))  # x_s = sqrt(a_s) x_0 + turn (x_t - sqrt(a_t) x_0)
        x_0_share = math.sqrt(a[s]) - turn * math.sqrt(a[t])
        m = x_0_share * (gain * m + offset) + turn * m
        v = (x_0_share * gain + turn) ** 2 * v + sigma**2
    last = a[visited[-1]]
    gain = spread**2 * math.sqrt(last) / (last * spread**2 + 1 - last)
    m, v = gain * m + mean * (1 - gain * math.sqrt(last)), gain**2 * v

    x_T, noise = torch.randn(40, 3, 8, 8), noises(40)
    if sampler == "ddpm":
        found = ddpm(diffusion, x_T, steps=steps, noise=noise)
    else:
        found = ddim(diffusion, x_T, steps=steps, eta=eta, noise=noise)
    assert found.mean().item() == pytest.approx(m, abs=5 * math.sqrt(v / found.numel()))
    assert found.std().item() == pytest.approx(math.sqrt(v), rel=5 / math.sqrt(2 * found.numel()))


def test_no_noise_is_drawn_for_the_last_step(make_diffusion):
    calls = []

    def noise():
        calls.append(1)
        return torch.randn(2, 3, 8, 8)

    diffusion, x_T = make_diffusion(), torch.randn(2, 3, 8, 8)
    ddpm(diffusion, x_T, noise=noise)
    assert len(calls) == 9
    ddim(diffusion, x_T, steps=4, eta=1.0, noise=noise)
    assert len(calls) == 9 + 3
    ddim(diffusion, x_T, steps=4, noise=noise)
    dpm_solver_pp(diffusion, x_T, steps=4, noise=noise)
    assert len(calls) == 9 + 3
    dpm_solver_pp(diffusion, x_T, steps=4, eta=1, noise=noise)
    ddpm(diffusion, x_T, steps=5, noise=noise)
    assert len(calls) == 9 + 3 + 3 + 4


def test_progress_sees_every_timestep(make_diffusion):
    diffusion, x_T, seen = make_diffusion(), torch.randn(1, 3, 8, 8), []

    def progress(steps):
        seen.append(list(steps))
        return steps

    ddpm(diffusion, x_T, noise=noises(1), progress=progress)
    ddim(diffusion, x_T, steps=4, progress=progress)
    dpm_solver_pp(diffusion, x_T, progress=progress)
    assert seen == [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [9, 7, 4, 1], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_observe_is_shown_every_step_and_changes_nothing(make_diffusion, order):
    diffusion, x_T, seen, alive = make_diffusion(), torch.randn(2, 3, 8, 8), [], []

    def observe(t, x_t, x_0):
        alive.append(weakref.ref(x_0))
        assert sum(reference() is not None for reference in alive) <= order  # what is no longer needed is let go
        assert torch.equal(x_0, diffusion.predict_x_0(x_t, torch.tensor([t, t])))
        seen.append((t, x_t))

    got = dpm_solver_pp(diffusion, x_T, steps=5, order=order, spacing="trailing", observe=observe)
    assert [t for t, _ in seen] == [9, 7, 5, 3, 1]
    assert torch.equal(seen[0][1], x_T)
    assert torch.equal(got, dpm_solver_pp(diffusion, x_T, steps=5, order=order, spacing="trailing"))


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_refuses_impossible_steps(make_diffusion, steps):
    with pytest.raises(InputError, match=rf"sampling steps is {steps}; it must lie in \[1, 10\]"):
        ddim(make_diffusion(), torch.zeros(1, 3, 8, 8), steps=steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_refuses_impossible_eta(make_diffusion, eta):
    with pytest.raises(InputError, match=rf"eta is {eta}; it must lie in \[0, 1\]"):
        ddim(make_diffusion(), torch.zeros(1, 3, 8, 8), steps=2, eta=eta, noise=noises(1))


def test_without_noise_it_is_drawn_from_the_generator(make_diffusion):
    diffusion, x_T = make_diffusion(), torch.randn(2, 3, 8, 8)
    wanted = ddim(diffusion, x_T, eta=0.5, noise=noises())
    assert torch.equal(ddim(diffusion, x_T, eta=0.5, generator=torch.Generator().manual_seed(5)), wanted)
    torch.manual_seed(5)
    assert torch.equal(ddim(diffusion, x_T, eta=0.5, noise=None), wanted)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 1)])
def test_refuses_noise_of_another_shape(make_diffusion, shape):
    """It would be broadcast: every image would get the same."""
    with pytest.raises(InputError, match=r"noise\(\) has the shape \(.*\); it must be that of x_T, \(2, 3, 8, 8\)\.$"):
        ddpm(make_diffusion(), torch.zeros(2, 3, 8, 8), noise=lambda: torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 16, 16), (2, 1, 8, 8)])
def test_refuses_a_start_of_another_shape(make_diffusion, shape):
    with pytest.raises(InputError, match=r"x_T has the shape \(.*\); for this model it must be \(b, 3, 8, 8\)\.$"):
        ddim(make_diffusion(), torch.zeros(shape))


def test_no_gradients_are_recorded_and_the_images_take_part_in_new_ones(make_config):
    diffusion, x_T = GaussianDiffusion.from_config(make_config()), torch.randn(1, 3, 8, 8, requires_grad=True)
    images = ddim(diffusion, x_T, steps=2)
    assert not images.requires_grad
    assert not images.is_inference()
    weight = torch.ones((), requires_grad=True)
    (weight * images).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_noise_is_denoised_in_float32(make_perfect, dtype):
    mean, spread = 0.1, 0.5
    diffusion = make_perfect(torch.full((3, 8, 8), mean), spread, diffusion={"timesteps": 1000})
    x_T = torch.randn(1, 3, 8, 8).to(dtype)
    for sampler in (ddim, dpm_solver_pp):
        images = sampler(diffusion, x_T)
        assert images.dtype == torch.float32
        assert torch.equal(images, sampler(diffusion, x_T.float()))


def test_refuses_patches_of_none(make_diffusion):
    with pytest.raises(InputError, match="patch_batch_size is 0"):
        ddim(make_diffusion(), torch.zeros(1, 3, 8, 8), steps=2, patch_batch_size=0)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "ddpm"},
        {"name": "ddpm", "steps": 4},
        {"name": "ddim", "steps": 4},
        {"name": "ddim", "eta": 0.5},
        {"name": "dpm-solver++", "steps": 4},
        {"name": "dpm-solver++", "steps": 4, "eta": 1},
    ],
)
def test_a_drawn_image_depends_on_its_seed_alone(make_diffusion, options):
    diffusion = make_diffusion()

    def drawn(seeds, size=None):
        return draw(diffusion, seeds, sampler=SamplerConfig(**options), patch_batch_size=size)

    together = drawn([4, 7, 9])
    assert together.shape == (3, 3, 8, 8)
    torch.testing.assert_close(drawn([7]), together[1:2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn([9, 7, 1])[:2], together[[2, 1]], atol=1e-4, rtol=1e-4)
    for size in (1, 5):
        torch.testing.assert_close(drawn([4, 7, 9], size), together, atol=1e-4, rtol=1e-4)
    assert torch.equal(drawn([4, 7, 9]), together)
    assert torch.pdist(together.flatten(1)).min() > 0.1
    assert together.abs().max() <= 1


def test_draw_is_its_sampler(make_diffusion):
    diffusion = make_diffusion()
    noise = ImageNoise([4, 7], (3, 8, 8), "cpu")
    ancestral = ddpm(diffusion, noise(), noise=noise)
    assert torch.equal(draw(diffusion, [4, 7]), ancestral)
    assert torch.equal(draw(diffusion, [4, 7], sampler="ddpm", steps=None, eta=0.0, order=None), ancestral)
    x_T = ImageNoise([4, 7], (3, 8, 8), "cpu")()
    assert torch.equal(draw(diffusion, [4, 7], sampler="ddim"), ddim(diffusion, x_T, steps=10))
    solved = dpm_solver_pp(diffusion, x_T, steps=10, order=2)
    assert torch.equal(draw(diffusion, [4, 7], sampler="dpm-solver++"), solved)
    options = {"steps": 5, "order": 3, "spacing": "trailing"}
    solved = dpm_solver_pp(diffusion, x_T, **options)
    assert torch.equal(draw(diffusion, [4, 7], sampler="dpm-solver++", **options), solved)
    config = SamplerConfig(name="dpm-solver++", **options)
    assert torch.equal(draw(diffusion, [4, 7], sampler=config), solved)
    second = dpm_solver_pp(diffusion, x_T, steps=5, spacing="trailing")
    assert torch.equal(draw(diffusion, [4, 7], sampler=config, order=None), second)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([], r"there are no seeds; an image needs one\.$"),
        ([3, -1], r"the seed is -1; it must lie in \[0, 4294967296\)\.$"),
        ([2**32 + 5], r"the seed is 4294967301; it must lie in \[0, 4294967296\)\.$"),
    ],
)
def test_draw_refuses_seeds_that_name_no_image(make_diffusion, seeds, words):
    """PyTorch's CPU generator would take 2^32 + 5 for 5."""
    with pytest.raises(InputError, match=words):
        draw(make_diffusion(), seeds)


def test_default_steps(make_diffusion):
    """All of ddpm and ddim; 20 of dpm-solver++, evenly spaced in log-SNR."""
    diffusion, seen = make_diffusion(diffusion={"timesteps": 40}), {}

    def progress(steps):
        seen[sampler] = list(steps)
        return steps[:1]

    for sampler in ("ddpm", "ddim", "dpm-solver++"):
        draw(diffusion, [1], sampler=sampler, progress=progress)
    assert seen["ddpm"] == seen["ddim"] == list(range(40))[::-1]
    assert seen["dpm-solver++"] == timesteps.log_snr(diffusion.exact_alpha_bar, 20)


@pytest.mark.parametrize(
    ("sampler", "options", "words"),
    [
        ("unknown", {}, 'the sampler is "unknown"; it must be one of ddpm, ddim, dpm-solver\\+\\+, unipc'),
        ("ddim", {"steps": 0}, "the number of sampling steps is 0"),
        ("ddpm", {"steps": 11}, r"the number of sampling steps is 11; it must lie in \[1, 10\]"),
        ("ddpm", {"spacing": "karras"}, 'the spacing is "karras"; it must be one of trailing, logsnr'),
        ("ddpm", {"eta": 0.5}, "eta is 0.5, but ddpm always draws all its noise"),
        ("ddpm", {"order": 2}, "order is 2, but ddpm has only one"),
        ("ddim", {"order": 1}, "order is 1, but ddim has only one"),
        ("unipc", {"eta": 1.0}, "eta is 1.0, but unipc draws no noise"),
        ("unipc", {"order": 2}, "order is 2, but unipc has only one; order goes with dpm-solver"),
        ("dpm-solver++", {"order": 0}, "order is 0; it must be one of 1, 2, 3"),
        ("dpm-solver++", {"order": 4}, "order is 4; it must be one of 1, 2, 3"),
        ("dpm-solver++", {"eta": 0.5}, "eta is 0.5; for dpm-solver.* it must be 0, deterministic, or 1, with noise"),
    ],
)
def test_draw_refuses_what_it_cannot_do(make_perfect, sampler, options, words):
    with pytest.raises(InputError, match=words):
        draw(make_perfect(torch.zeros(3, 8, 8)), [1], sampler=sampler, **options)


@pytest.mark.parametrize(("steps", "T", "order"), [(19, 1000, 2), (20, 1000, 3), (None, 1000, 3), (None, 10, 2)])
def test_third_order_with_noise_becomes_second_in_few_steps(steps, T, order):
    config = SamplerConfig(name="dpm-solver++", eta=1.0, order=3, steps=steps)
    assert config.resolve(T).order == order
    assert dataclasses.replace(config, eta=0.0).resolve(T).order == 3


def test_a_new_sampler_is_an_entry_in_the_registry(make_diffusion, monkeypatch):
    """This one takes each predicted image for the next noisy one."""
    jump = Sampler(
        name="jump",
        coefficients=lambda alpha_bar, config: Coefficients(
            x_t=torch.zeros_like(alpha_bar), x_0=torch.ones_like(alpha_bar)[:, None], noise=None
        ),
        check=lambda config: None,
        default_steps=3,
    )
    monkeypatch.setitem(SAMPLERS, "jump", jump)
    parser, diffusion, shown = argparse.ArgumentParser(), make_diffusion(), []
    add_flags(parser)
    args = parser.parse_args(["--sampler", "jump"])
    drawn = draw(diffusion, [1], sampler=sampler_config(args), observe=lambda t, x_t, x_0: shown.append((x_t, x_0)))
    assert [torch.equal(x_t, x_0) for (x_t, _), (_, x_0) in zip(shown[1:], shown)] == [True, True]
    assert torch.equal(drawn, shown[-1][1])
    assert "jump 3" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("steps", "spacing"), [(1, "trailing"), (7, "trailing"), (8, "logsnr"), (50, "logsnr")])
def test_default_spacing_of_dpm_solver_pp(order, steps, spacing):
    assert SamplerConfig(name="dpm-solver++", steps=steps, order=order).resolve(1000).spacing == spacing
    for given in timesteps.SPACINGS:
        assert SamplerConfig(name="dpm-solver++", steps=steps, spacing=given).resolve(1000).spacing == given


@pytest.mark.parametrize(
    ("sampler", "steps"), [*((dpm_solver_pp, steps) for steps in (3, 4, 5, 6, 7)), (unipc, 5), (unipc, 10)]
)
def test_few_steps_are_spaced_as_errs_less(sampler, steps):
    """Over mixtures of 4 and 32 Gaussians in 4 and 16 dimensions, beside a solution in many steps."""
    generator = torch.Generator().manual_seed(1)
    errors = {None: 0.0, "logsnr": 0.0}
    for count, side, spread in itertools.product((4, 32), (2, 4), (0.02, 0.05, 0.1, 0.2)):
        means = torch.randn(count, 1, side, side, generator=generator, dtype=torch.float64) / 2
        mixture = Mixture(alpha_bars(1000), means.clamp(-0.9, 0.9), spread)
        x_T = torch.randn(64, 1, side, side, generator=generator, dtype=torch.float64)
        exact = dpm_solver_pp(mixture, x_T, steps=200)
        for spacing in errors:
            found = sampler(mixture, x_T, steps=steps, spacing=spacing)
            errors[spacing] += (found - exact).square().mean().sqrt().item()
    assert errors[None] < 0.95 * errors["logsnr"], errors


@pytest.mark.parametrize("steps", [10, 15, 20])
def test_a_corrector_errs_less(steps):
    generator = torch.Generator().manual_seed(1)
    errors = {dpm_solver_pp: 0.0, unipc: 0.0}
    for count, side, spread in itertools.product((4, 32), (2, 4), (0.02, 0.05, 0.1, 0.2)):
        means = torch.randn(count, 1, side, side, generator=generator, dtype=torch.float64) / 2
        mixture = Mixture(alpha_bars(1000), means.clamp(-0.9, 0.9), spread)
        x_T = torch.randn(64, 1, side, side, generator=generator, dtype=torch.float64)
        exact = dpm_solver_pp(mixture, x_T, steps=200)
        for sampler in errors:
            errors[sampler] += (sampler(mixture, x_T, steps=steps) - exact).square().mean().sqrt().item()
    assert errors[unipc] < 0.9 * errors[dpm_solver_pp], errors


@each_objective
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_noisy_end_of_a_long_schedule_does_no_harm(make_perfect, objective, spacing, order):
    """At t = T - 1, sqrt(alpha_bar) is 5e-5: float32 errors of a predicted noise come 20,000 times as large in x_0."""
    mean, spread = 0.1, 0.25
    diffusion = make_perfect(torch.full((3, 8, 8), mean), spread, diffusion={"timesteps": 1000, "objective": objective})
    x_T = torch.randn(1, 3, 8, 8)
    options = {"steps": 20, "order": order, "spacing": spacing}
    exact = dpm_solver_pp(Oracle(alpha_bars(1000), mean, spread, diffusion.image_shape), x_T.double(), **options)
    torch.testing.assert_close(dpm_solver_pp(diffusion, x_T, **options).double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("steps", "blend", "wanted"),
    [
        (4, 0.0, [(0,), (1,), (0,), (1,)]),
        (4, None, [(0,), (1,), (0,), (0, 1)]),
        (5, 0.4, [(0,), (1,), (0,), (0, 1), (0, 1)]),
        (2, 1.0, [(0, 1), (0, 1)]),
    ],
)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_grids_take_turns_and_are_blended_in_the_last_steps(make_diffusion, monkeypatch, sampler, steps, blend, wanted):
    diffusion, seen = make_diffusion(model={"grids": 2}), []
    predict = diffusion.predict_x_0
    monkeypatch.setattr(diffusion, "predict_x_0", lambda *args: seen.append(tuple(args[3])) or predict(*args))
    sampler(diffusion, torch.randn(1, 3, 8, 8), steps=steps, blend=blend)
    assert seen == wanted


def test_a_model_of_one_grid_has_nothing_to_blend(make_diffusion):
    with pytest.raises(ValueError, match=r"blend is 0\.5; it goes with models of several grids, and this one has 1"):
        draw(make_diffusion(), [1], blend=0.5)
    assert SamplerConfig(steps=4).resolve(10).blend is None
    assert SamplerConfig(steps=4).resolve(10, grids=2).blend == 0.1
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"blend is {wrong}; it must lie in \[0, 1\]"):
            SamplerConfig(blend=wrong)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_model_of_several_grids_draws_the_same_in_any_number_of_patches_a_pass(make_diffusion, size):
    diffusion = make_diffusion(model={"grids": 4})
    wanted = draw(diffusion, [3, 8], steps=5)
    torch.testing.assert_close(draw(diffusion, [3, 8], steps=5, patch_batch_size=size), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(draw(diffusion, [8], steps=5), wanted[1:], atol=1e-4, rtol=0)
