"""DDIM: keeps the noise eps that the predicted x_0 implies, or replaces a share of it (eta) by new noise."""

from torch import Tensor

from patch_based_ddpm.errors import InputError
from patch_based_ddpm.samplers.sampler import Coefficients, Sampler, SamplerConfig, following


def coefficients(alpha_bar: Tensor, config: SamplerConfig) -> Coefficients:
    """x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - c^2) eps + c z, where
    eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t) and
    c = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s).

    Source: DDIM (Song et al. 2021) eq. 12 and 16.
    """
    t, s = alpha_bar, following(alpha_bar)
    noise = config.eta * ((1 - s) / (1 - t) * (1 - t / s)).sqrt()
    # At eta 1 the difference can be 0, and rounding can make it negative.
    x_t = ((1 - s - noise**2).clamp(min=0) / (1 - t)).sqrt()
    return Coefficients(x_t=x_t, x_0=(s.sqrt() - x_t * t.sqrt())[:, None], noise=noise if config.eta > 0 else None)


def _check(config: SamplerConfig) -> None:
    if not 0 <= config.eta <= 1:
        raise InputError(f"eta is {config.eta}; it must lie in [0, 1].")


ddim = Sampler(name="ddim", coefficients=coefficients, check=_check)
