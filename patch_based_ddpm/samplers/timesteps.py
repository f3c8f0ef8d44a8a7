"""The timesteps that a sampler visits, from T - 1 (pure noise) downwards.

Each spacing takes alpha_bar, (T,) float64, and the number of timesteps to choose, in [1, T].

Symbols: `lambda` = log(alpha_bar / (1 - alpha_bar)) / 2, half the log of the signal-to-noise ratio.
"""

from torch import Tensor

# A third of the cosine schedule's range lies below, but only its last few timesteps, where x_t is almost pure noise.
LEAST_LAMBDA = -5.1


def trailing(alpha_bar: Tensor, steps: int) -> list[int]:
    """Evenly spaced in t: round(T - i T / steps) - 1, i = 0..steps-1.

    Source: Lin et al. 2024, "trailing".
    """
    T = len(alpha_bar)
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def log_snr(alpha_bar: Tensor, steps: int) -> list[int]:
    """Evenly spaced in lambda, from -5.1 to its value at t = 0, each at the nearest free timestep.

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


SPACINGS = {"trailing": trailing, "logsnr": log_snr}
