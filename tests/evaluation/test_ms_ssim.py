import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from patch_based_ddpm.evaluation.ms_ssim import WEIGHTS, ms_ssim, separable_filter
from support.face_images import crowd, images


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 24, 17), (4, 40, 64), (3, 128, 128), (3, 16, 300)])
def test_equal_images(shape):
    pictures = torch.rand(2, *shape) * 2 - 1
    torch.testing.assert_close(ms_ssim(pictures, pictures), torch.ones(2))


@pytest.mark.parametrize(("side", "scales"), [(16, 2), (31, 2), (32, 3), (64, 4), (128, 5), (200, 5)])
def test_flat_images_differ_in_luminance_alone(side, scales):
    """(2 a b + C_1) / (a^2 + b^2 + C_1) to the power of the coarsest scale's share."""
    a, b = 0.75, 0.25
    flat = [torch.full((1, 3, side, side), 2 * value - 1) for value in (a, b)]
    share = WEIGHTS[scales - 1] / sum(WEIGHTS[:scales])
    expected = ((2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)) ** share
    assert ms_ssim(*flat).item() == pytest.approx(expected, rel=5e-4)  # float32 variances of flat areas


def by_the_book(a, b):
    """One pair of grey images in [0, 1], 32 x 32: three scales, window by window."""
    total, weights = 1.0, np.array(WEIGHTS[:3]) / sum(WEIGHTS[:3])
    for scale, weight in enumerate(weights):
        size = min(11, a.shape[0] - 1 + a.shape[0] % 2)
        grid = np.arange(size) - size // 2
        window = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * (1.5 * size / 11) ** 2))
        window /= window.sum()
        luminance, structure = [], []
        for i in range(a.shape[0] - size + 1):
            for j in range(a.shape[1] - size + 1):
                p, q = a[i : i + size, j : j + size], b[i : i + size, j : j + size]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                covariance = (window * (p - mean_p) * (q - mean_q)).sum()
                luminance.append((2 * mean_p * mean_q + 1e-4) / (mean_p**2 + mean_q**2 + 1e-4))
                structure.append((2 * covariance + 9e-4) / (var_p + var_q + 9e-4))
        total *= np.mean(structure) ** weight
        if scale == 2:
            total *= np.mean(luminance) ** weight
        a, b = (image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2).mean((1, 3)) for image in (a, b))
    return total


def test_equals_the_published_formula():
    pictures = F.interpolate(torch.rand(2, 1, 10, 10), size=(32, 32), mode="bicubic").clamp(0, 1)
    pictures[1] = (pictures[0] + pictures[1]) / 2
    expected = by_the_book(*pictures[:, 0].double().numpy())
    assert 0.1 < expected < 0.95
    (value,) = ms_ssim(*(pictures * 2 - 1)[:, None])
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_an_inverted_image_counts_as_0():
    stripes = (torch.arange(32) // 2 % 2 * 2.0 - 1).expand(1, 1, 32, 32)
    assert ms_ssim(stripes, -stripes).item() == 0


def test_falls_as_images_drift_apart():
    real, others = (images(crowd(8, seed=seed), 64, 64) for seed in (1, 2))
    noise = torch.randn(real.shape)
    compared = [real, real + 0.02 * noise, real + 0.1 * noise, real + 0.5 * noise]
    values = [ms_ssim(real, other).mean().item() for other in compared]
    assert values == sorted(values, reverse=True)
    assert ms_ssim(real, others).mean() < 0.7
    assert not math.isnan(ms_ssim(real, others).mean().item())


def test_a_separable_filter_equals_a_convolution_with_the_outer_product():
    pictures, taps = torch.randn(2, 3, 9, 12, dtype=torch.float64), [0.2, 0.5, 0.3]
    line = torch.tensor(taps, dtype=torch.float64)
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    torch.testing.assert_close(separable_filter(pictures, taps), F.conv2d(pictures, kernel, groups=3))
