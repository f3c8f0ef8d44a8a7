import math

import pytest
import torch

from patch_based_ddpm.model.schedule import alpha_bars, cosine_betas, posterior

each_length = pytest.mark.parametrize("T", [2, 10, 1000])


def cosine(T):
    """f(0), ..., f(T) of the cosine schedule, in plain floats."""
    return [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]


@each_length
def test_betas(T):
    f = cosine(T)
    betas = [min(1 - after / before, 0.999) for before, after in zip(f, f[1:])]
    assert cosine_betas(T).dtype == torch.float64
    assert cosine_betas(T).tolist() == pytest.approx(betas, rel=1e-9, abs=1e-14)


@each_length
def test_alpha_bar_follows_the_cosine_until_beta_is_clipped(T):
    f = cosine(T)
    alpha_bar = alpha_bars(cosine_betas(T)).tolist()
    assert alpha_bar[:-1] == pytest.approx([value / f[0] for value in f[1:-1]], rel=1e-10)
    assert alpha_bar[-1] == pytest.approx(alpha_bar[-2] * 0.001, rel=1e-12)


def test_alpha_bar_by_hand():
    assert alpha_bars(torch.tensor([0.5, 0.2, 0.9])).tolist() == pytest.approx([0.5, 0.4, 0.04])


def test_ends_of_the_published_schedule():
    beta = cosine_betas(1000)
    assert beta[0].item() == pytest.approx(4.128422482e-5, rel=1e-8)
    assert beta[-1].item() == 0.999
    assert (beta.diff() > 0).all()
    assert alpha_bars(beta)[-1].item() == pytest.approx(2.4288e-9, rel=1e-3)


def density(x, mean, variance):
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("t", range(1, 10))
def test_posterior_is_bayes_rule_on_a_grid(t):
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised."""
    x_0, x_t, step = 0.7, -0.4, 0.001
    beta = cosine_betas(10).tolist()
    alpha_bar_prev = math.prod(1 - value for value in beta[:t])
    grid = [i * step for i in range(-6000, 6001)]
    weights = [
        density(x_t, math.sqrt(1 - beta[t]) * x, beta[t])
        * density(x, math.sqrt(alpha_bar_prev) * x_0, 1 - alpha_bar_prev)
        for x in grid
    ]
    mean = sum(w * x for w, x in zip(weights, grid)) / sum(weights)
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, grid)) / sum(weights)
    a, b, posterior_variance, log_variance = (values[t].item() for values in posterior(cosine_betas(10)))
    assert a * x_0 + b * x_t == pytest.approx(mean, abs=1e-7)
    assert posterior_variance == pytest.approx(variance, rel=1e-5)
    assert log_variance == pytest.approx(math.log(variance), abs=1e-5)


@pytest.mark.parametrize("t", [1, 2, 250, 500, 900, 998, 999])
def test_posterior_is_the_product_of_two_gaussians(t):
    """Precisions add, and the mean is the precision-weighted one, of x_t / sqrt(alpha) and sqrt(alpha_bar_prev) x_0."""
    beta = cosine_betas(1000).tolist()
    alpha_bar_prev = math.prod(1 - value for value in beta[:t])
    from_x_t, from_x_0 = (1 - beta[t]) / beta[t], 1 / (1 - alpha_bar_prev)
    variance = 1 / (from_x_t + from_x_0)
    got = [values[t].item() for values in posterior(cosine_betas(1000))]
    assert got == pytest.approx(
        [
            variance * from_x_0 * math.sqrt(alpha_bar_prev),
            variance * from_x_t / math.sqrt(1 - beta[t]),
            variance,
            math.log(variance),
        ],
        rel=1e-9,
    )


@each_length
def test_posterior_at_the_last_step_is_x_0_itself(T):
    a, b, variance, log_variance = (values[0].item() for values in posterior(cosine_betas(T)))
    assert (a, b, variance) == (pytest.approx(1, abs=1e-14), 0, 0)
    assert log_variance == pytest.approx(math.log(1e-20))
