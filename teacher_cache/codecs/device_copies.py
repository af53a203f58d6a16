"""The tensors of a codec on the devices that use them."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class DeviceCopies:
    """Tensors of a codec on each device that uses them.

    They are copied once and kept, because the host waits for all the work of a GPU when it copies a tensor there. Otherwise every step
    of a training would wait for the step before it.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[torch.device, Hashable], tuple[Tensor, ...]] = {}

    def on(
        self, device: torch.device, make: Callable[[], tuple[Tensor, ...]], use: Hashable = None
    ) -> tuple[Tensor, ...]:
        """Return what ``make`` returns, on a device. It is called once for each device and use.

        Args:
            device: The device.
            make: Function that returns the tensors.
            use: What distinguishes them from other tensors of the codec. Default None, for a codec with one use.
        """
        key = device, use
        if key not in self._copies:
            self._copies[key] = tuple(tensor.to(device) for tensor in make())
        return self._copies[key]
