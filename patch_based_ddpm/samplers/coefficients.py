"""What a sampler does to x_t between two timesteps, as coefficients: pure float64 functions of the schedule.

Every sampler makes x_s, at the timestep s that it visits after t, from x_t, its latest predictions of x_0, and noise z:
x_s = a x_t + sum_k b_k x_0(k steps ago) + c z. The eps that a clipped x_0 leaves in x_t is part of a and b.

Symbols: `alpha_bar` at the timesteps visited; after the last of them comes the image itself, alpha_bar = 1.
`alpha` = sqrt(alpha_bar), `sigma` = sqrt(1 - alpha_bar), `lambda` = log(alpha / sigma). Shapes: `S` steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Updates(NamedTuple):
    """The coefficients of each step; the last one is 1 times the latest x_0, and nothing else.

    Attributes:
        x_t: (S,).
        x_0: (S, order), the latest prediction first; 0 for those that the first steps do not have.
        noise: (S,), or None where a sampler draws none.
    """

    x_t: Tensor
    x_0: Tensor
    noise: Tensor | None

    def to(self, like: Tensor) -> Updates:
        """The same in the dtype and on the device of `like`."""
        return Updates(*(None if values is None else values.to(like) for values in self))


def ancestral(alpha_bar: Tensor) -> Updates:
    """The posterior q(x_s | x_t, x_0), with beta = 1 - alpha_bar_t / alpha_bar_s, of all forward steps from s to t.

    mean     = sqrt(alpha_bar_s) beta / (1 - alpha_bar_t) x_0
               + sqrt(alpha_bar_t / alpha_bar_s) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta

    Args:
        alpha_bar: (S,) float64 at the timesteps visited.

    Source: DDPM eq. 6 and 7, for the forward steps from s to t taken as one.
    """
    t, s = alpha_bar, _following(alpha_bar)
    beta = 1 - t / s
    return Updates(
        x_t=(t / s).sqrt() * (1 - s) / (1 - t),
        x_0=(s.sqrt() * beta / (1 - t))[:, None],
        noise=((1 - s) / (1 - t) * beta).sqrt(),
    )


def ddim(alpha_bar: Tensor, eta: float) -> Updates:
    """x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - c^2) eps + c z, with the eps that x_0 leaves in x_t and
    c = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s).

    Args:
        alpha_bar: (S,) float64 at the timesteps visited.
        eta: in [0, 1].

    Source: DDIM (Song et al. 2021) eq. 12 and 16.
    """
    t, s = alpha_bar, _following(alpha_bar)
    noise = eta * ((1 - s) / (1 - t) * (1 - t / s)).sqrt()
    # At eta 1 the difference can be 0, and round to less.
    x_t = ((1 - s - noise**2).clamp(min=0) / (1 - t)).sqrt()
    return Updates(x_t=x_t, x_0=(s.sqrt() - x_t * t.sqrt())[:, None], noise=noise if eta > 0 else None)


def dpm_solver_pp(alpha_bar: Tensor, order: int, stochastic: bool) -> Updates:
    """Solve the reverse equation exactly but for x_0, a polynomial in lambda through its latest predictions.

    The flow:    x_s = sigma_s / sigma_t x_t + alpha_s integral_t^s exp(lambda - lambda_s) x_0 dlambda
    With noise:  x_s = sigma_s / sigma_t exp(-h) x_t + alpha_s integral_t^s 2 exp(2 (lambda - lambda_s)) x_0 dlambda
                       + sigma_s sqrt(1 - exp(-2h)) z
    with h = lambda_s - lambda_t. Order 1 is DDIM with eta 0 or 1. Order 2 is as published: a line through x_0 counts
    as its middle. In order 3 the parabola is integrated exactly; a formula in circulation halves its quadratic term,
    and then the error falls as the square of h only. With noise, x_0 is foreseen without that of the step, so there
    order 3 makes the variance's error smaller than order 2 does, but not of third order.

    Args:
        alpha_bar: (S,) float64 at the timesteps visited.
        order: 1, 2 or 3. The first steps and the last are of lower order.
        stochastic: whether noise is drawn.

    Source: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), algorithm 2 and its stochastic form; order 3 derived here.
    """
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    h = (alpha / sigma).log().diff()  # (S-1,)
    x_t, noise = sigma[1:] / sigma[:-1], None
    decay = 2 * h if stochastic else h
    gain = -(-decay).expm1()
    if stochastic:
        x_t, noise = x_t * (-h).exp(), sigma[1:] * gain.sqrt()
    x_0 = h.new_zeros(len(h), order)
    x_0[:, 0] = gain
    if order > 1:
        slope = gain[1:] / 2 * h[1:] / h[:-1]
        x_0[1:, 0] += slope
        x_0[1:, 1] -= slope
    if order > 2:
        x_0[2:] = _parabola(h, decay)
    last = h.new_zeros(1)
    return Updates(
        x_t=torch.cat([x_t, last]),
        x_0=torch.cat([alpha[1:, None] * x_0, torch.eye(1, order, dtype=h.dtype)]),
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


def _following(alpha_bar: Tensor) -> Tensor:
    return torch.cat([alpha_bar[1:], torch.ones_like(alpha_bar[:1])])
