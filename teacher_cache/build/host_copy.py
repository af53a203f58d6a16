"""Copies of tensors from a GPU to the host, which the teacher does not wait for."""

from collections.abc import Callable

import numpy as np
from torch import Tensor, cuda, empty_like


def copy_to_host(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy a tensor to the host, and return a function that waits for the copy and returns it.

    From a GPU the copy goes to page-locked memory on a stream of its own, so that later work of the current stream does not wait for
    it. A tensor on the CPU is not copied.

    Args:
        tensor: A tensor of any shape and type that NumPy has.
    """
    if not tensor.is_cuda:
        return tensor.numpy
    host = empty_like(tensor, device="cpu", pin_memory=True)
    stream = cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(cuda.current_stream(tensor.device))
    with cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # Its memory is not used again before the copy has ended.
    finished = stream.record_event()

    def wait() -> np.ndarray:
        finished.synchronize()
        return host.numpy()

    return wait
