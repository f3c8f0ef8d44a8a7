"""The noise schedule and the posterior, in float64; `GaussianDiffusion` casts them once.

Symbols: `beta` (T,), `alpha_bar` (T,) = prod(1 - beta), `alpha_bar_prev` its value at t - 1, and 1 at t = 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

COSINE_OFFSET = 0.008
MAX_BETA = 0.999
MIN_VARIANCE = 1e-20


def cosine_betas(timesteps: int) -> Tensor:
    """The cosine schedule, (T,) float64.

    f(t) = cos^2(((t / T) + s) / (1 + s) * pi / 2), alpha_bar(t) = f(t) / f(0),
    beta(t) = clip(1 - alpha_bar(t) / alpha_bar(t-1), 0, 0.999).

    Source: Nichol & Dhariwal 2021, eq. 17.
    """
    x = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((x + COSINE_OFFSET) / (1 + COSINE_OFFSET) * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(0, MAX_BETA)  # f(0) cancels


def alpha_bars(beta: Tensor) -> Tensor:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s), (T,) -> (T,). Source: DDPM eq. 4."""
    return torch.cumprod(1 - beta, dim=0)


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0) = N(x_0_coefficient x_0 + x_t_coefficient x_t, variance): four (T,) float64 tensors."""

    x_0_coefficient: Tensor
    x_t_coefficient: Tensor
    variance: Tensor
    log_variance: Tensor


def posterior(beta: Tensor) -> Posterior:
    """The posterior of one forward step. The variance is 0 at t = 0; its log is clipped at log(1e-20).

    mean     = sqrt(alpha_bar_prev) beta / (1 - alpha_bar) x_0
               + sqrt(1 - beta) (1 - alpha_bar_prev) / (1 - alpha_bar) x_t
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) beta

    Source: DDPM eq. 6 and 7.
    """
    alpha_bar = alpha_bars(beta)
    alpha_bar_prev = torch.cat([torch.ones_like(beta[:1]), alpha_bar[:-1]])
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    return Posterior(
        x_0_coefficient=alpha_bar_prev.sqrt() * beta / (1 - alpha_bar),
        x_t_coefficient=(1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
        variance=variance,
        log_variance=variance.clamp(min=MIN_VARIANCE).log(),
    )
