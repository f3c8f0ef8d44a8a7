"""Ancestral sampling: x_s is drawn from the posterior q(x_s | x_t, x_0) at the predicted, clipped x_0."""

from torch import Tensor

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.samplers.sampler import Coefficients, Sampler, SamplerConfig, following


def coefficients(alpha_bar: Tensor, config: SamplerConfig) -> Coefficients:
    """The posterior, where beta = 1 - alpha_bar_t / alpha_bar_s combines all forward steps from s to t:

    mean     = sqrt(alpha_bar_s) beta / (1 - alpha_bar_t) x_0
               + sqrt(alpha_bar_t / alpha_bar_s) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta

    Source: DDPM eq. 6 and 7. Over all timesteps it is DDPM algorithm 2.
    """
    t, s = alpha_bar, following(alpha_bar)
    beta = 1 - t / s
    return Coefficients(
        x_t=(t / s).sqrt() * (1 - s) / (1 - t),
        x_0=(s.sqrt() * beta / (1 - t))[:, None],
        noise=((1 - s) / (1 - t) * beta).sqrt(),
    )


def _check(config: SamplerConfig) -> None:
    if config.eta != 0:
        raise InputError(
            f"eta is {config.eta}, but ddpm always draws all its noise; eta goes with ddim and dpm-solver++."
        )


ddpm = Sampler(name="ddpm", coefficients=coefficients, check=_check)
