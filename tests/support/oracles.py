"""Denoisers that are known in closed form, for pixels that are N(mean, spread^2)."""

import math

import torch
from torch import nn


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


class Oracle:
    """A diffusion model of its own schedule, unclipped and in float64, whose pixels share one mean."""

    grids = 1

    def __init__(self, alpha_bar, mean, spread, image_shape=(1, 8, 8)):
        self.exact_alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
        self.timesteps, self.mean, self.spread = len(alpha_bar), mean, spread
        self.image_shape = image_shape

    def predict_x_0(self, x_t, t, patch_batch_size, grids):
        a = self.exact_alpha_bar[t[0]]
        return self.mean + self.spread**2 * a.sqrt() / self.variance(a) * (x_t - a.sqrt() * self.mean)

    def variance(self, a):
        """Of x_t."""
        return a * self.spread**2 + 1 - a

    def flow(self, x_T):
        """The last prediction on the probability flow, where (x_t - sqrt(a) mean) / deviation does not change."""
        first, last = self.exact_alpha_bar[-1], self.exact_alpha_bar[0]
        standard = (x_T - first.sqrt() * self.mean) / self.variance(first).sqrt()
        return self.mean + self.spread**2 * last.sqrt() / self.variance(last).sqrt() * standard


class Mixture:
    """A diffusion model in float64 of images that are N(mean, spread^2) around one of several means, (k, c, H, W)."""

    grids = 1

    grids = 1

    def __init__(self, alpha_bar, means, spread):
        self.exact_alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
        self.timesteps, self.means, self.spread = len(alpha_bar), means, spread
        self.image_shape = means.shape[1:]

    def predict_x_0(self, x_t, t, patch_batch_size, grids):
        a = self.exact_alpha_bar[t[0]]
        variance = a * self.spread**2 + 1 - a
        residual = x_t - a.sqrt() * self.means[:, None]  # (k, b, c, H, W)
        weight = (-(residual**2).flatten(2).sum(2) / (2 * variance)).softmax(0)[..., None, None, None]
        x_0 = self.means[:, None] + self.spread**2 * a.sqrt() / variance * residual
        return (weight * x_0).sum(0).clamp(-1, 1)
