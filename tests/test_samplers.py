import math

import pytest
import torch
from torch import nn

from patch_based_ddpm import GaussianDiffusion
from patch_based_ddpm.errors import InputError
from patch_based_ddpm.samplers import ImageNoise, ddim, ddpm, draw
from patch_based_ddpm.timesteps import trailing as strided_timesteps

each_objective = pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])


def alpha_bars(T):
    """The cosine schedule in plain floats."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    return [
        math.prod(1 - min(1 - after / before, 0.999) for before, after in zip(f[:t], f[1:])) for t in range(1, T + 1)
    ]


class PerfectDenoiser(nn.Module):
    """The best answer where each pixel of the data is N(mean, spread^2), `mean` an image: known in closed form."""

    def __init__(self, config, mean, spread=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.objective, self.N = config.diffusion.objective, config.model.patch_divider
        self.mean, self.spread = mean, spread
        self.alpha_bar = torch.tensor(alpha_bars(config.diffusion.timesteps), dtype=torch.float64)

    def forward(self, patches, content, position, t):
        h, w = patches.shape[2:]
        corners = [divmod(place, self.N) for place in position.argmax(1).tolist()]
        mean = torch.stack([self.mean[:, i * h : (i + 1) * h, j * w : (j + 1) * w] for i, j in corners]).double()
        a = self.alpha_bar[t][:, None, None, None]
        x_t = patches.double()
        x_0 = mean + self.spread**2 * a.sqrt() / (a * self.spread**2 + 1 - a) * (x_t - a.sqrt() * mean)
        eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        answers = {"pred_noise": eps, "pred_x0": x_0, "pred_v": a.sqrt() * eps - (1 - a).sqrt() * x_0}
        return self.scale * answers[self.objective].float()


@pytest.fixture
def make_diffusion(make_config):
    def make(**sections):
        return GaussianDiffusion.from_config(make_config(**sections)).eval().requires_grad_(False)

    return make


@pytest.fixture
def make_perfect(make_config):
    def make(mean, spread=0.0, **sections):
        config = make_config(**sections)
        return GaussianDiffusion(PerfectDenoiser(config, mean, spread), config).requires_grad_(False)

    return make


def noises(b=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(b, 3, 8, 8, generator=generator)


def test_ddim_over_all_steps_with_eta_1_is_ddpm(make_diffusion):
    diffusion = make_diffusion(diffusion={"timesteps": 20})
    x_T = torch.randn(2, 3, 8, 8)
    ancestral = ddpm(diffusion, x_T, noise=noises())
    torch.testing.assert_close(ddim(diffusion, x_T, steps=20, eta=1.0, noise=noises()), ancestral, atol=1e-4, rtol=1e-4)
    assert (ddim(diffusion, x_T, steps=20) - ancestral).abs().max() > 1e-2


def test_ddpm_is_algorithm_2(make_diffusion):
    """Against a loop over p_mean_variance and the variance, not its log."""
    diffusion, noise = make_diffusion(), noises()
    x_t = x_T = torch.randn(2, 3, 8, 8)
    for step in reversed(range(10)):
        mean, variance, _ = diffusion.p_mean_variance(x_t, torch.tensor([step, step]))
        x_t = mean + variance.sqrt() * noise() if step else mean
    torch.testing.assert_close(ddpm(diffusion, x_T, noise=noises()), x_t, atol=1e-5, rtol=1e-5)


@each_objective
def test_both_samplers_find_the_only_image_there_is(make_perfect, objective):
    image = torch.rand(3, 8, 8) * 2 - 1
    diffusion = make_perfect(image, diffusion={"objective": objective})
    x_T, wanted = torch.randn(2, 3, 8, 8), image.expand(2, 3, 8, 8)
    for size in (None, 3):
        found = ddpm(diffusion, x_T, noise=noises(), patch_batch_size=size)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        for steps in (2, 3, 7, 10):
            found = ddim(diffusion, x_T, steps=steps, patch_batch_size=size)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
            found = ddim(diffusion, x_T, steps=steps, eta=0.7, noise=noises(), patch_batch_size=size)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_one_ddim_step_is_the_first_guess(make_diffusion):
    diffusion, x_T = make_diffusion(), torch.randn(2, 3, 8, 8)
    assert torch.equal(ddim(diffusion, x_T, steps=1), diffusion.predict_x_0(x_T, torch.tensor([9, 9])))


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_ddim_is_its_formula_pixel_by_pixel(make_perfect, steps):
    """Pixels of Gaussian data do not depend on each other, so one is followed in plain floats."""
    mean, spread, T = 0.3, 0.2, 50
    diffusion = make_perfect(torch.full((3, 8, 8), mean), spread, diffusion={"timesteps": T})
    x_T = torch.randn(1, 3, 8, 8)
    a = alpha_bars(T)
    visited = [round(T - i * T / steps) - 1 for i in range(steps)]
    got = ddim(diffusion, x_T, steps=steps)
    for channel, y, x in [(0, 0, 0), (1, 3, 4), (2, 7, 5)]:
        value = x_T[0, channel, y, x].item()
        for t, s in zip(visited, [*visited[1:], None], strict=True):
            gain = spread**2 * math.sqrt(a[t]) / (a[t] * spread**2 + 1 - a[t])
            x_0 = min(max(mean + gain * (value - math.sqrt(a[t]) * mean), -1), 1)
            eps = (value - math.sqrt(a[t]) * x_0) / math.sqrt(1 - a[t])
            value = x_0 if s is None else math.sqrt(a[s]) * x_0 + math.sqrt(1 - a[s]) * eps
        assert got[0, channel, y, x].item() == pytest.approx(value, abs=1e-4)


def test_ddim_follows_the_exact_flow_of_gaussian_data(make_perfect):
    """With many steps, and a = alpha_bar_T, x_0 = mean + spread / sqrt(a spread^2 + 1 - a) (x_T - sqrt(a) mean)."""
    diffusion = make_perfect(torch.full((3, 8, 8), 0.1), 0.2, diffusion={"timesteps": 400})
    x_T = torch.randn(1, 3, 8, 8)
    a = alpha_bars(400)[-1]
    exact = 0.1 + 0.2 / math.sqrt(a * 0.2**2 + 1 - a) * (x_T - math.sqrt(a) * 0.1)
    torch.testing.assert_close(ddim(diffusion, x_T, steps=400), exact, atol=0.02, rtol=0)
    assert (ddim(diffusion, x_T, steps=4) - exact).abs().max() > 0.05


@pytest.mark.parametrize(("sampler", "eta", "steps"), [("ddpm", 0, 50), ("ddim", 1.0, 25), ("ddim", 0.5, 50)])
def test_noisy_sampling_of_gaussian_data_has_the_right_moments(make_perfect, sampler, eta, steps):
    """Every step is linear in x_t and in its noise, so mean and variance of the samples are known exactly."""
    mean, spread, T = 0.2, 0.15, 50
    diffusion = make_perfect(torch.full((3, 8, 8), mean), spread, diffusion={"timesteps": T})
    a = alpha_bars(T)
    visited = [round(T - i * T / steps) - 1 for i in range(steps)]
    m, v = 0.0, 1.0
    for t, s in zip(visited, visited[1:]):
        gain = spread**2 * math.sqrt(a[t]) / (a[t] * spread**2 + 1 - a[t])
        offset = mean * (1 - gain * math.sqrt(a[t]))  # x_0 = gain x_t + offset
        share = 1.0 if sampler == "ddpm" else eta
        sigma = share * math.sqrt((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s]))
        turn = math.sqrt((1 - a[s] - sigma**2) / (1 - a[t]))  # x_s = sqrt(a_s) x_0 + turn (x_t - sqrt(a_t) x_0)
        x_0_share = math.sqrt(a[s]) - turn * math.sqrt(a[t])
        m = x_0_share * (gain * m + offset) + turn * m
        v = (x_0_share * gain + turn) ** 2 * v + sigma**2
    last = a[visited[-1]]
    gain = spread**2 * math.sqrt(last) / (last * spread**2 + 1 - last)
    m, v = gain * m + mean * (1 - gain * math.sqrt(last)), gain**2 * v

    x_T, noise = torch.randn(40, 3, 8, 8), noises(40)
    if sampler == "ddpm":
        found = ddpm(diffusion, x_T, noise=noise)
    else:
        found = ddim(diffusion, x_T, steps=steps, eta=eta, noise=noise)
    assert found.mean().item() == pytest.approx(m, abs=5 * math.sqrt(v / found.numel()))
    assert found.std().item() == pytest.approx(math.sqrt(v), rel=5 / math.sqrt(2 * found.numel()))


def test_no_noise_is_drawn_for_the_last_step(make_diffusion):
    calls = []

    def noise():
        calls.append(1)
        return torch.randn(2, 3, 8, 8)

    diffusion, x_T = make_diffusion(), torch.randn(2, 3, 8, 8)
    ddpm(diffusion, x_T, noise=noise)
    assert len(calls) == 9
    ddim(diffusion, x_T, steps=4, eta=1.0, noise=noise)
    assert len(calls) == 9 + 3
    ddim(diffusion, x_T, steps=4, noise=noise)
    assert len(calls) == 9 + 3


def test_progress_sees_every_timestep(make_diffusion):
    diffusion, x_T, seen = make_diffusion(), torch.randn(1, 3, 8, 8), []

    def progress(steps):
        seen.append(list(steps))
        return steps

    ddpm(diffusion, x_T, noise=noises(1), progress=progress)
    ddim(diffusion, x_T, steps=4, progress=progress)
    assert seen == [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [9, 7, 4, 1]]


@pytest.mark.parametrize(
    ("timesteps", "steps", "wanted"),
    [
        (1000, 4, [999, 749, 499, 249]),
        (1000, 1, [999]),
        (10, 3, [9, 6, 2]),
        (5, 5, [4, 3, 2, 1, 0]),
        (2, 2, [1, 0]),
    ],
)
def test_strided_timesteps_by_hand(timesteps, steps, wanted):
    assert strided_timesteps(timesteps, steps) == wanted


@pytest.mark.parametrize("timesteps", [2, 7, 100, 1000])
def test_strided_timesteps_start_at_the_end_and_descend(timesteps):
    for steps in range(1, timesteps + 1):
        visited = strided_timesteps(timesteps, steps)
        assert len(visited) == steps
        assert visited[0] == timesteps - 1
        assert visited[-1] >= 0
        assert all(before > after for before, after in zip(visited, visited[1:]))
    assert visited == list(range(timesteps))[::-1]


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_refuses_impossible_steps(make_diffusion, steps):
    with pytest.raises(InputError, match=rf"sampling steps is {steps}; it must lie in \[1, 10\]"):
        ddim(make_diffusion(), torch.zeros(1, 3, 8, 8), steps=steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_refuses_impossible_eta(make_diffusion, eta):
    with pytest.raises(InputError, match=rf"eta is {eta}; it must lie in \[0, 1\]"):
        ddim(make_diffusion(), torch.zeros(1, 3, 8, 8), steps=2, eta=eta, noise=noises(1))


def test_refuses_eta_without_noise(make_diffusion):
    with pytest.raises(InputError, match=r"eta is 0\.5 but no noise was given"):
        ddim(make_diffusion(), torch.zeros(1, 3, 8, 8), steps=2, eta=0.5)


def test_refuses_patches_of_none(make_diffusion):
    with pytest.raises(InputError, match="patch_batch_size is 0"):
        ddim(make_diffusion(), torch.zeros(1, 3, 8, 8), steps=2, patch_batch_size=0)


def test_image_noise_depends_on_the_seed_alone():
    shape = (3, 4, 5)
    first, second = ImageNoise([3, 8], shape, "cpu"), ImageNoise(iter([8, 5, 3]), shape, "cpu")
    alone = torch.Generator().manual_seed(8)
    for _ in range(3):
        a, b = first(), second()
        assert torch.equal(a[1], b[0])
        assert torch.equal(a[0], b[2])
        assert torch.equal(a[1], torch.randn(shape, generator=alone))
        assert not torch.equal(a[0], a[1])


def test_image_noise_is_standard_normal_and_new_each_time():
    noise = ImageNoise([0, 1], (3, 100, 100), "cpu")
    first, second = noise(), noise()
    for values in (first, second, (first + second) / math.sqrt(2)):
        assert values.mean().item() == pytest.approx(0, abs=0.02)
        assert values.std().item() == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize(("sampler", "steps", "eta"), [("ddpm", None, 0), ("ddim", 4, 0), ("ddim", None, 0.5)])
def test_a_drawn_image_depends_on_its_seed_alone(make_diffusion, sampler, steps, eta):
    diffusion = make_diffusion()

    def drawn(seeds, size=None):
        return draw(diffusion, seeds, sampler=sampler, steps=steps, eta=eta, patch_batch_size=size)

    together = drawn([4, 7, 9])
    assert together.shape == (3, 3, 8, 8)
    torch.testing.assert_close(drawn([7]), together[1:2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn([9, 7, 1])[:2], together[[2, 1]], atol=1e-4, rtol=1e-4)
    for size in (1, 5):
        torch.testing.assert_close(drawn([4, 7, 9], size), together, atol=1e-4, rtol=1e-4)
    assert torch.equal(drawn([4, 7, 9]), together)
    assert torch.pdist(together.flatten(1)).min() > 0.1
    assert together.abs().max() <= 1


def test_draw_is_its_sampler(make_diffusion):
    diffusion = make_diffusion()
    options = {"steps": None, "eta": 0.0, "patch_batch_size": None}
    noise = ImageNoise([4, 7], (3, 8, 8), "cpu")
    assert torch.equal(draw(diffusion, [4, 7], sampler="ddpm", **options), ddpm(diffusion, noise(), noise=noise))
    x_T = ImageNoise([4, 7], (3, 8, 8), "cpu")()
    assert torch.equal(draw(diffusion, [4, 7], sampler="ddim", **options), ddim(diffusion, x_T, steps=10))


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 8, 50])
def test_noisy_ddim_is_finite_where_its_variances_cancel(make_perfect, steps):
    """At eta 1, 1 - alpha_bar_s - sigma^2 is 0 in the first step, and may round to less."""
    diffusion = make_perfect(torch.zeros(3, 8, 8), 0.2, diffusion={"timesteps": 1000})
    assert draw(diffusion, [1], sampler="ddim", steps=steps, eta=1.0, patch_batch_size=None).isfinite().all()


def test_draw_refuses_what_it_cannot_do(make_perfect):
    diffusion = make_perfect(torch.zeros(3, 8, 8))
    with pytest.raises(InputError, match='the sampler is "euler"; it must be one of ddpm, ddim'):
        draw(diffusion, [1], sampler="euler", steps=None, eta=0.0, patch_batch_size=None)
    with pytest.raises(InputError, match="the number of sampling steps is 0"):
        draw(diffusion, [1], sampler="ddim", steps=0, eta=0.0, patch_batch_size=None)
