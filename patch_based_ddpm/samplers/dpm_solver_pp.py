"""DPM-Solver++, multistep: extrapolates the change of x_0 from its predictions at earlier timesteps.

Symbols: `alpha` = sqrt(alpha_bar), `sigma` = sqrt(1 - alpha_bar), `lambda` = log(alpha / sigma).
"""

import torch
from torch import Tensor

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.samplers.sampler import Coefficients, Sampler, SamplerConfig

# With fewer steps "trailing" has the smaller error: over 180 mixtures of Gaussians in 1, 4 and 16 dimensions, order 2,
# its mean is 0.137 against 0.257 in 4 steps and 0.069 against 0.085 in 7; from 8 on "logsnr" is better for most.
FEWEST_LOGSNR_STEPS = 8
# With fewer, order 3 with noise makes the variance of Gaussian data too large: 4.6 times in 7 steps, 2.6 in 10,
# 1.5 in 15, at most 1.2 in 20 (order 2: at most 1.11 in any number).
FEWEST_NOISY_THIRD_ORDER_STEPS = 20


def coefficients(alpha_bar: Tensor, config: SamplerConfig) -> Coefficients:
    """The exact solution of the reverse equation, if x_0 is the polynomial in lambda through the latest predictions.

    eta 0, the flow:  x_s = sigma_s / sigma_t x_t + alpha_s integral_t^s exp(lambda - lambda_s) x_0 dlambda
    eta 1, with noise: x_s = sigma_s / sigma_t exp(-h) x_t
                             + alpha_s integral_t^s 2 exp(2 (lambda - lambda_s)) x_0 dlambda
                             + sigma_s sqrt(1 - exp(-2h)) z
    with h = lambda_s - lambda_t. Order 1 is DDIM with eta 0 or 1. Order 2 is as published: it replaces the line by its
    value in the middle. Order 3 integrates the parabola exactly; a common formula halves the quadratic term, and its
    error falls only as h^2. The first steps and the last are of lower order. With noise, order 3 has a smaller error
    than order 2 but does not converge with third order, because the extrapolation of x_0 ignores the step's noise.

    Source: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), algorithm 2 and its stochastic form; order 3 derived here.
    """
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    h = (alpha / sigma).log().diff()  # (S-1,)
    x_t, noise = sigma[1:] / sigma[:-1], None
    decay = 2 * h if config.eta == 1 else h
    gain = -(-decay).expm1()
    if config.eta == 1:
        x_t, noise = x_t * (-h).exp(), sigma[1:] * gain.sqrt()
    x_0 = h.new_zeros(len(h), config.order)
    x_0[:, 0] = gain
    if config.order > 1:
        slope = gain[1:] / 2 * h[1:] / h[:-1]
        x_0[1:, 0] += slope
        x_0[1:, 1] -= slope
    if config.order > 2:
        x_0[2:] = _parabola(h, decay)
    last = h.new_zeros(1)
    return Coefficients(
        x_t=torch.cat([x_t, last]),
        x_0=torch.cat([alpha[1:, None] * x_0, torch.eye(1, config.order, dtype=h.dtype)]),
        noise=None if noise is None else torch.cat([noise, last]),
    )


def _parabola(h: Tensor, decay: Tensor) -> Tensor:
    """Weights of the latest three x_0 in the integral of the parabola through them, (S-3, 3), from the third step on.

    With u = (lambda - lambda_t) / h, the x_0 lie at u = 0, -r_0 and -r_0 - r_1, and Newton's form of the parabola is
    x_0 + d_1 u + d_2 u (u + r_0). `gain`, `linear` and `square` are the integrals of 1, u and u^2 over [0, 1], weighted
    by decay exp(decay (u - 1)); `decay` is h, or 2h with noise.
    """
    r_0, r_1, decay = h[1:-1] / h[2:], h[:-2] / h[2:], decay[2:]
    gain = -(-decay).expm1()
    linear = 1 - gain / decay
    square = 1 - 2 * linear / decay
    second = (square + r_0 * linear) / (r_0 + r_1)
    first = linear + second
    return torch.stack([gain + first / r_0, -first / r_0 - second / r_1, second / r_1], dim=1)


def _check(config: SamplerConfig) -> None:
    if config.eta not in (0, 1):
        raise InputError(f"eta is {config.eta}; for dpm-solver++ it must be 0, deterministic, or 1, with noise.")


dpm_solver_pp = Sampler(
    name="dpm-solver++",
    coefficients=coefficients,
    check=_check,
    default_steps=20,
    orders=(1, 2, 3),
    default_order=2,
    fewest_logsnr_steps=FEWEST_LOGSNR_STEPS,
    fewest_noisy_third_order_steps=FEWEST_NOISY_THIRD_ORDER_STEPS,
)
