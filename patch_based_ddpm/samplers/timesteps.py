"""Which timesteps a sampler visits: always from T - 1, pure noise, downwards.

Symbols: `alpha_bar` (T,), `lambda` = log(alpha_bar / (1 - alpha_bar)) / 2, half the log of the signal-to-noise ratio.
"""

from torch import Tensor

from patch_based_ddpm.errors import InputError

SPACINGS = ("trailing", "logsnr")
# Below it lie a third of the cosine schedule's range and no more than its last few timesteps, where there is hardly
# anything to see in the noise.
LEAST_LAMBDA = -5.1


def visited(alpha_bar: Tensor, steps: int, spacing: str) -> list[int]:
    """Choose the timesteps of a sampler.

    Args:
        alpha_bar: (T,) float64.
        steps: in [1, T]; T gives them all.
        spacing: "trailing" or "logsnr", see `trailing` and `log_snr`.

    Returns:
        `steps` timesteps, T - 1 first, each less than the one before it.

    Raises:
        InputError: `steps` is out of range, or there is no such spacing.
    """
    check(len(alpha_bar), steps)
    if spacing not in SPACINGS:
        raise InputError(f'the spacing is "{spacing}"; it must be one of {", ".join(SPACINGS)}.')
    return trailing(len(alpha_bar), steps) if spacing == "trailing" else log_snr(alpha_bar, steps)


def check(timesteps: int, steps: int) -> None:
    """Refuse a number of steps that a model of T timesteps cannot take.

    Raises:
        InputError: `steps` is not in [1, T].
    """
    if not 1 <= steps <= timesteps:
        raise InputError(
            f"the number of sampling steps is {steps}; it must lie in [1, {timesteps}], the model's timesteps."
        )


def trailing(timesteps: int, steps: int) -> list[int]:
    """Evenly spaced in t: round(T - i T / steps) - 1, i = 0..steps-1.

    Source: Lin et al. 2024, "trailing".
    """
    return [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)]


def log_snr(alpha_bar: Tensor, steps: int) -> list[int]:
    """Evenly spaced in lambda, from -5.1 to its value at t = 0, each at the nearest timestep that is still free.

    Source: DPM-Solver (Lu et al. 2022, arXiv 2206.00927) Sec. 3.3.
    """
    half_log_snr = (alpha_bar.log() - (-alpha_bar).log1p()) / 2  # (T,)
    most = half_log_snr[0]
    least = half_log_snr[-1].clamp(min=LEAST_LAMBDA)
    chosen = [len(alpha_bar) - 1]
    for i in range(1, steps):
        nearest = int((half_log_snr - (least + i / (steps - 1) * (most - least))).abs().argmin())
        chosen.append(max(min(nearest, chosen[-1] - 1), steps - 1 - i))
    return chosen
