"""A codec: one byte per value, an 8-bit float (e4m3) after division by the layer's largest value."""

import torch
from torch import Tensor

joint = False
discrete = False

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def check(argument: str) -> None:
    """See `CodecKind.check`."""
    if argument:
        raise ValueError(f"codec float8 takes nothing after a colon, not {argument!r}")


def fit(sample: Tensor, argument: str) -> dict[str, Tensor]:
    """See `CodecKind.fit`."""
    return {"scale": sample.abs().max().clamp(min=1e-12) / _LARGEST}


def open(layers: tuple[int, ...], dim: int, argument: str, state: dict[str, Tensor]) -> "Float8Codec":
    """See `CodecKind.open`."""
    if "scale" not in state:
        raise ValueError("the state of codec float8 has no scale")
    return Float8Codec(layers, dim, state)


class Float8Codec:
    """See `ColumnCodec`."""

    planar = False
    compression = "zstd"

    def __init__(self, layers: tuple[int, ...], dim: int, state: dict[str, Tensor]) -> None:
        self.layers, self.dim, self.bytes_per_frame = layers, dim, dim
        self.error = state.get("error", torch.zeros(1))
        self._scale = state["scale"]

    def encode(self, frames: Tensor) -> Tensor:
        """See `ColumnCodec.encode`."""
        if not bool(frames.isfinite().all()):
            raise ValueError(f"a hidden state of layer {self.layers[0]} is not finite")
        scaled = (frames[:, 0] / self._scale.to(frames.device)).clamp(-_LARGEST, _LARGEST)
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `ColumnCodec.decode`."""
        values = codes.contiguous().view(torch.float8_e4m3fn).float() * self._scale.to(codes.device)
        return values.unsqueeze(-2)
