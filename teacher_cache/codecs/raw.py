"""Codecs that store floats."""

import torch
from torch import Tensor

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# fp16 rounds to 11 bits. In fp32, teachers' outputs differ slightly between machines and batch shapes.
_ERRORS = {"fp32": 1e-5, "fp16": 2**-11}


class RawCodec:
    """Codec of little-endian floats. Element (t, d) is number ``t * D + d`` of a value.

    Args:
        name: ``fp32`` or ``fp16``.
        layer: Number of the layer, 1-based.
        dim: Width D.
    """

    planar = False
    compression = "none"

    def __init__(self, name: str, layer: int, dim: int) -> None:
        self.name, self.layers, self.dim = name, (layer,), dim
        self._dtype = _DTYPES[name]
        self.bytes_per_frame = dim * self._dtype.itemsize
        self.error = torch.tensor([_ERRORS[name]])

    def encode(self, frames: Tensor) -> Tensor:
        """See `ColumnCodec.encode`. ValueError if a value is not finite or, in fp16, above 65504."""
        stored = frames[:, 0].to(self._dtype)
        if not bool(stored.isfinite().all()):
            what = "beyond the range of fp16; use codec fp32" if bool(frames.isfinite().all()) else "not finite"
            raise ValueError(
                f"a hidden state of layer {self.layers[0]} is {what} (largest magnitude {float(frames.abs().max()):g})"
            )
        return stored.contiguous().view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `ColumnCodec.decode`."""
        return codes.contiguous().view(self._dtype).float().unsqueeze(-2)
