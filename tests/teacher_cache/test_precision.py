"""Precision: which operations autocast does not change."""

import torch
from torch import nn

from ray_distill.teacher_cache.precision import convolve_in_groups


def test_grouped_convolutions_on_a_cpu_ignore_autocast() -> None:
    torch.manual_seed(0)
    convolution, x = nn.Conv1d(16, 16, 8, padding=4, groups=2), torch.randn(3, 16, 19)
    expected = convolution(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = convolve_in_groups(convolution, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert convolve_in_groups(nn.Conv1d(16, 16, 9, groups=2).bfloat16(), x).dtype == torch.bfloat16
