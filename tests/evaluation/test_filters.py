import torch
from torch.nn import functional as F

from patch_based_ddpm.evaluation.filters import separable


def test_equals_a_convolution_with_the_outer_product():
    images, taps = torch.randn(2, 3, 9, 12, dtype=torch.float64), [0.2, 0.5, 0.3]
    line = torch.tensor(taps, dtype=torch.float64)
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    torch.testing.assert_close(separable(images, taps), F.conv2d(images, kernel, groups=3))
