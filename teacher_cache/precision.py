"""Precision of a teacher's arithmetic."""

from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "fp16", "bf16"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context in which PyTorch computes with a precision on a device.

    ``fp32`` switches off any autocast of the caller. ``fp16`` and ``bf16`` are PyTorch's automatic mixed precision.
    """
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)


def convolve_in_groups(convolution: nn.Module, x: Tensor) -> Tensor:
    """Apply a module that consists of a grouped convolution, without autocast on a CPU.

    The AMX kernels that PyTorch 2.11 uses for bfloat16 on recent CPUs are wrong by 100 % where the kernel size is even and a group
    has fewer than 16 channels.

    Args:
        convolution: Module with parameters.
        x: Float tensor that the module accepts.

    Returns:
        What the module returns; on a CPU in the dtype of its parameters.
    """
    if x.device.type != "cpu":
        return convolution(x)  # type: ignore[no-any-return]
    with torch.autocast("cpu", enabled=False):
        return convolution(x.to(next(convolution.parameters()).dtype))  # type: ignore[no-any-return]
