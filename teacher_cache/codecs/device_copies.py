"""The tensors of a codec's state on the devices that use them."""

import torch
from torch import Tensor


class DeviceCopies:
    """Tensors on the CPU, and their copies on other devices.

    Each copy is made once and kept, because the host waits for all the work of a GPU when it copies a tensor there. Otherwise every
    step of a training would wait for the step before it.

    Args:
        tensors: The tensors.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._copies: dict[torch.device, tuple[Tensor, ...]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tensors, in their order, on a device."""
        if device not in self._copies:
            self._copies[device] = tuple(tensor.to(device) for tensor in self._tensors)
        return self._copies[device]
