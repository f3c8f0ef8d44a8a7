import pytest
import torch

from patch_based_ddpm.model import schedule
from patch_based_ddpm.samplers import timesteps


def alpha_bars(T):
    return schedule.alpha_bars(schedule.cosine_betas(T))


def lambdas(alpha_bar):
    return torch.log(alpha_bar.sqrt() / (1 - alpha_bar).sqrt())


@pytest.mark.parametrize(
    ("T", "steps", "wanted"),
    [
        (1000, 4, [999, 749, 499, 249]),
        (1000, 1, [999]),
        (10, 3, [9, 6, 2]),
        (5, 5, [4, 3, 2, 1, 0]),
        (2, 2, [1, 0]),
    ],
)
def test_trailing_by_hand(T, steps, wanted):
    assert timesteps.trailing(alpha_bars(T), steps) == wanted


@pytest.mark.parametrize("spacing", timesteps.SPACINGS)
@pytest.mark.parametrize("T", [2, 7, 100, 1000])
def test_they_start_at_the_end_and_descend(T, spacing):
    alpha_bar = alpha_bars(T)
    for steps in range(1, T + 1, 1 if T <= 100 else 37):
        visited = timesteps.SPACINGS[spacing](alpha_bar, steps)
        assert len(visited) == steps
        assert visited[0] == T - 1
        assert visited[-1] >= 0
        assert all(before > after for before, after in zip(visited, visited[1:]))
    assert timesteps.SPACINGS[spacing](alpha_bar, T) == list(range(T))[::-1]


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_log_snr_is_evenly_spaced_where_timesteps_lie_dense(steps):
    """On a schedule so fine that nearest timesteps are as good as exact; the last of the noisy ones are passed over."""
    alpha_bar = alpha_bars(100_000)
    visited = lambdas(alpha_bar[timesteps.log_snr(alpha_bar, steps)])
    h = (lambdas(alpha_bar)[0] + 5.1) / (steps - 1)
    assert visited[0] < -10
    wanted = -5.1 + h * torch.arange(1, steps)
    dense = wanted < 5
    torch.testing.assert_close(visited[1:][dense], wanted[dense], atol=0.03, rtol=0)
    assert timesteps.log_snr(alpha_bar, steps)[-1] == 0


def test_log_snr_by_hand():
    """lambda = 4, 2, 0, -2, -4 at t = 0..4."""
    alpha_bar = torch.sigmoid(2 * torch.tensor([4.0, 2.0, 0.0, -2.0, -4.0], dtype=torch.float64))
    assert timesteps.log_snr(alpha_bar, 2) == [4, 0]
    assert timesteps.log_snr(alpha_bar, 3) == [4, 2, 0]
    assert timesteps.log_snr(alpha_bar, 1) == [4]
