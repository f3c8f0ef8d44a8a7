import math

import pytest
import torch

from patch_based_ddpm.model import schedule
from patch_based_ddpm.samplers import SAMPLERS, SamplerConfig, ddim, dpm_solver_pp, unipc
from support.oracles import Oracle


def even(steps, bound):
    """alpha_bar of `steps` timesteps evenly spaced in lambda, from `bound` at t = 0 to -`bound`."""
    return torch.sigmoid(2 * torch.linspace(bound, -bound, steps, dtype=torch.float64))


def coefficients(alpha_bar, name, **options):
    return SAMPLERS[name].coefficients(alpha_bar, SamplerConfig(name=name, **options))


def slope(errors, steps):
    """p of an error that falls as steps^-p, fitted."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    return -(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_error_falls_with_the_order(order):
    x_T = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    steps = (40, 80, 160, 320)
    oracles = [Oracle(even(s, 4), mean=0.1, spread=0.2) for s in steps]
    errors = [(dpm_solver_pp(o, x_T, steps=o.timesteps, order=order) - o.flow(x_T)).abs().max() for o in oracles]
    assert order - 0.3 < slope(errors, steps) < order + 0.7, errors
    assert errors[-1] < 0.01**order


def test_ddim_is_of_first_order():
    x_T = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    steps = (40, 80, 160, 320)
    oracles = [Oracle(even(s, 4), mean=0.1, spread=0.2) for s in steps]
    errors = [(ddim(o, x_T, steps=o.timesteps) - o.flow(x_T)).abs().max() for o in oracles]
    assert 0.7 < slope(errors, steps) < 1.3, errors


def test_unipc_is_of_third_order():
    """A corrector raises the order of its predictor by one."""
    x_T = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    steps = (40, 80, 160, 320)
    oracles = [Oracle(even(s, 4), mean=0.1, spread=0.2) for s in steps]
    errors = [(unipc(o, x_T, steps=o.timesteps) - o.flow(x_T)).abs().max() for o in oracles]
    assert 2.7 < slope(errors, steps) < 3.7, errors


def unipc_weights(lambdas, alpha, r, order, known):
    """Weights of x_0 at s, t and r in a step of UniPC with B_2(h), by solving the paper's system R rho = b.

    `known`: the prediction at s is known, so that the step is corrected.
    """
    h = lambdas[1] - lambdas[0]
    B = math.expm1(-h)
    nodes = [(r - lambdas[0]) / h] * (order == 2) + [1.0] * known
    phi, b = math.expm1(-h), []
    for k in range(1, len(nodes) + 1):
        phi = phi / -h - 1 / math.factorial(k)
        b.append(phi * math.factorial(k) / B)
    R = torch.tensor([[node**k for node in nodes] for k in range(len(nodes))], dtype=torch.float64)
    rho = torch.linalg.solve(R, torch.tensor(b, dtype=torch.float64)).tolist() if nodes else []
    if len(nodes) == 1:
        rho = [0.5]  # the paper's choice
    weights = {"s": 0.0, "t": -alpha * B, "r": 0.0}
    for place, node, share in zip(("r",) * (order == 2) + ("s",), nodes, rho):
        weights[place] -= alpha * B * share / node
        weights["t"] += alpha * B * share / node
    return list(weights.values())


def test_unipc_solves_the_papers_system():
    lambdas = [-3.0, -1.7, -1.2, 0.4, 1.1]
    alpha_bar = torch.sigmoid(2 * torch.tensor(lambdas, dtype=torch.float64))
    found = coefficients(alpha_bar, "unipc")
    for i in range(4):
        step = (lambdas[i : i + 2], alpha_bar[i + 1].sqrt().item(), lambdas[max(i - 1, 0)], 1 if i == 0 else 2)
        predicted, corrected = (unipc_weights(*step, known=known) for known in (False, True))
        assert found.x_0[i].tolist() == pytest.approx([*predicted[1:], 0.0])
        assert found.corrector[1][i + 1].tolist() == pytest.approx(corrected)
        ratio = ((1 - alpha_bar[i + 1]) / (1 - alpha_bar[i])).sqrt().item()
        assert found.x_t[i].item() == found.corrector[0][i + 1].item() == pytest.approx(ratio)


def moments(oracle, order, steps):
    """Mean and variance of what the sampler with noise makes, without drawing any.

    Every step is linear. So one image follows zeros, one x_T = 1, and one each z = 1: its response to what is N(0, 1).
    """
    calls, inputs = [], torch.eye(steps + 1, dtype=torch.float64)[:, :, None, None, None]

    def noise():
        calls.append(1)
        return inputs[len(calls) + 1]

    found = dpm_solver_pp(oracle, inputs[1], steps=steps, order=order, eta=1, noise=noise).flatten()
    assert len(calls) == steps - 1
    return found[0].item(), ((found[1:] - found[0]) ** 2).sum().item()


def variance_error(order, count):
    """Of the sampler with noise in `count` steps, relative, but for what the last predicted x_0 smooths away."""
    oracle = Oracle(even(count, 5), mean=0.1, spread=0.2, image_shape=(1, 1, 1))
    mean, variance = moments(oracle, order, count)
    assert mean == pytest.approx(0.1, abs=1e-3)
    last = oracle.exact_alpha_bar[0]
    return abs(variance / (0.2**4 * last / oracle.variance(last)).item() - 1)


@pytest.mark.parametrize("order", [1, 2])
def test_with_noise_the_datas_mean_and_variance_are_found_with_the_order(order):
    steps = (25, 50, 100, 200)
    errors = [variance_error(order, count) for count in steps]
    assert order - 0.3 < slope(errors, steps) < order + 0.7, errors
    assert errors[-1] < (0.06 if order == 1 else 0.002)


def test_third_order_with_noise_is_nearer_than_second():
    steps = (25, 50, 100, 200)
    errors = [variance_error(3, count) for count in steps]
    assert slope(errors, steps) > 1.7, errors
    for count, error in zip(steps, errors, strict=True):
        assert error < 0.8 * variance_error(2, count)


@pytest.mark.parametrize("spread", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("steps", [20, 25, 30])
def test_third_order_with_noise_keeps_the_variance_in_the_fewest_steps_that_it_takes(spread, steps):
    """On the schedule and timesteps of a real model, where 15 steps inflate it 1.5 times and 8 steps 3.8 times."""
    oracle = Oracle(schedule.alpha_bars(schedule.cosine_betas(1000)), mean=0.1, spread=spread, image_shape=(1, 1, 1))
    _, variance = moments(oracle, order=3, steps=steps)
    last = oracle.exact_alpha_bar[0]
    assert variance < 1.2 * (spread**4 * last / oracle.variance(last)).item()


def test_with_noise_samples_are_the_data():
    """The same with noise that is drawn, within five standard errors."""
    count = 20_000
    oracle = Oracle(even(200, 5), mean=0.1, spread=0.2, image_shape=(1, 1, count))
    generator = torch.Generator().manual_seed(3)

    def noise():
        return torch.randn(1, 1, 1, count, generator=generator, dtype=torch.float64)

    found = dpm_solver_pp(oracle, noise(), steps=200, eta=1, noise=noise)
    assert found.mean().item() == pytest.approx(0.1, abs=5 * 0.2 / math.sqrt(count))
    assert found.std().item() == pytest.approx(0.2, rel=5 / math.sqrt(2 * count))


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
def test_ancestral_steps_over_all_timesteps_are_the_posterior(timesteps):
    """To the bit in float32, though one comes from ratios of alpha_bar and the other from beta."""
    beta = schedule.cosine_betas(timesteps)
    posterior, found = schedule.posterior(beta), coefficients(schedule.alpha_bars(beta).flip(0), "ddpm")
    assert torch.equal(found.x_0[:, 0].flip(0).float(), posterior.x_0_coefficient.float())
    assert torch.equal(found.x_t.flip(0).float(), posterior.x_t_coefficient.float())
    torch.testing.assert_close(found.noise.flip(0), posterior.variance.sqrt(), atol=0, rtol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_last_step_is_x_0_itself(count):
    alpha_bar = schedule.alpha_bars(schedule.cosine_betas(1000))[torch.linspace(999, 0, count).long()]
    rows = [coefficients(alpha_bar, "ddpm"), *(coefficients(alpha_bar, "ddim", eta=eta) for eta in (0.0, 1.0))]
    rows += [coefficients(alpha_bar, "dpm-solver++", order=order, eta=eta) for order in (1, 2, 3) for eta in (0, 1)]
    rows.append(coefficients(alpha_bar, "unipc"))
    for found in rows:
        assert len(found.x_t) == len(found.x_0) == count
        assert found.x_t[-1] == 0
        assert found.x_0[-1].tolist() == [1.0, 0.0, 0.0][: found.x_0.shape[1]]
        assert found.noise is None or found.noise[-1] == 0
        assert all(values is None or values.isfinite().all() for values in (*found[:3], *(found.corrector or ())))


@pytest.mark.parametrize("speed", [1, 2])
def test_third_order_integrates_a_parabola_exactly(speed):
    """Against a fine sum, where x_0 is a parabola in lambda and the steps are uneven; twice as fast with noise."""
    least = [-3.0, -1.7, -1.2, 0.4, 1.1]
    alpha_bar = torch.sigmoid(2 * torch.tensor(least, dtype=torch.float64))

    def parabola(x):
        return 0.3 + 0.2 * x - 0.1 * x**2

    found = coefficients(alpha_bar, "dpm-solver++", order=3, eta=speed - 1)
    for i in (2, 3):
        end = torch.linspace(least[i], least[i + 1], 200_001, dtype=torch.float64)
        values = speed * (speed * (end - least[i + 1])).exp() * parabola(end)
        wanted = alpha_bar[i + 1].sqrt() * torch.trapezoid(values, end)
        seen = torch.tensor([parabola(x) for x in (least[i], least[i - 1], least[i - 2])], dtype=torch.float64)
        assert (found.x_0[i] @ seen).item() == pytest.approx(wanted.item(), abs=1e-9)


def test_noisy_ddim_is_finite_where_its_variances_cancel():
    """At eta 1, 1 - alpha_bar_s - c^2 is 0 or nearly, and with many timesteps rounds to less even in float64."""
    alpha_bar = schedule.alpha_bars(schedule.cosine_betas(100_000))
    for s in range(400):
        assert coefficients(alpha_bar[[99_999, s]], "ddim", eta=1.0).x_t.isfinite().all()
