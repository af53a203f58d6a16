"""Precision of a teacher's arithmetic."""

from typing import Literal

import torch

Precision = Literal["fp32", "fp16", "bf16"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context in which PyTorch computes with a precision on a device.

    ``fp32`` switches off any autocast of the caller. ``fp16`` and ``bf16`` are PyTorch's automatic mixed precision.
    """
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)
