import numpy as np
import pytest
import torch

from ray_distill.teacher_cache.build.host_copy import copy_to_host


def test_a_tensor_on_the_cpu_is_not_copied() -> None:
    codes = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    copy = copy_to_host(codes)()
    assert copy.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert np.shares_memory(copy, codes.numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_later_work_on_the_gpu_does_not_change_a_copy() -> None:
    waits, expected = [], []
    for number in range(20):
        values = torch.full((1 << 22,), number, dtype=torch.uint8, device="cuda")
        waits.append(copy_to_host(values * 2))  # The product's memory is free for the next round at once.
        expected.append(2 * number)
    assert [(int(wait().min()), int(wait().max())) for wait in waits] == [(value, value) for value in expected]
