"""Floats as they are."""

import torch
from torch import Tensor

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# fp16 rounds to 11 bits; what a teacher gives differs a little between machines and batch shapes anyway.
_ERRORS = {"fp32": 1e-5, "fp16": 2**-11}


class RawCodec:
    """Little-endian floats, frame after frame: element (t, d) is number ``t * D + d`` of the value.

    Args:
        name: ``fp32`` or ``fp16``.
        layer: 1-based.
        dim: width D.
    """

    planar = False
    compression = "none"

    def __init__(self, name: str, layer: int, dim: int) -> None:
        self.name, self.layers, self.dim = name, (layer,), dim
        self._dtype = _DTYPES[name]
        self.bytes_per_frame = dim * self._dtype.itemsize
        self.error = torch.tensor([_ERRORS[name]])

    def encode(self, frames: Tensor) -> Tensor:
        """See ColumnCodec. ValueError where a value is not finite, or beyond 65504 in fp16."""
        stored = frames[:, 0].to(self._dtype)
        if not bool(stored.isfinite().all()):
            what = "beyond the range of fp16; use codec fp32" if bool(frames.isfinite().all()) else "not finite"
            raise ValueError(
                f"a hidden state of layer {self.layers[0]} is {what} (largest magnitude {float(frames.abs().max()):g})"
            )
        return stored.contiguous().view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See ColumnCodec."""
        return codes.contiguous().view(self._dtype).float().unsqueeze(-2)
