"""Codecs: how one layer's frames become bytes in a shard and targets on the training device again.

A codec is a name in ``cache.json``, an ``encode`` and a ``decode``. New ones go into ``CODECS``.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Codec(Protocol):
    """What the cache asks of a codec. Implementations are stateless and deterministic."""

    @property
    def name(self) -> str:
        """As in ``cache.json``."""
        ...

    def encode(self, frames: Tensor) -> bytes:
        """(T, D) float32 on any device → bytes."""
        ...

    def decode(self, data: bytes | memoryview, dim: int) -> Tensor:
        """Bytes → (T, D) float32 on the CPU."""
        ...

    def bytes_per_frame(self, dim: int) -> float:
        """Bytes one D-wide frame of one layer takes."""
        ...


@dataclass(frozen=True)
class RawCodec:
    """Little-endian floats, frame after frame: element (t, d) is number ``t * D + d`` of the value."""

    name: str
    dtype: np.dtype[np.floating]

    def encode(self, frames: Tensor) -> bytes:
        """See Codec. Raises ValueError where a finite value does not fit the type (beyond 65504 in fp16)."""
        values = frames.detach().cpu().numpy()
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        if not np.isfinite(stored).all():
            what = "not finite" if not np.isfinite(values).all() else f"beyond the range of {self.name}"
            raise ValueError(f"a hidden state is {what} (largest magnitude {np.abs(values).max():g}); use codec fp32")
        return stored.tobytes()

    def decode(self, data: bytes | memoryview, dim: int) -> Tensor:
        """See Codec."""
        return torch.from_numpy(np.frombuffer(data, dtype=self.dtype).reshape(-1, dim).astype(np.float32))

    def bytes_per_frame(self, dim: int) -> float:
        """See Codec."""
        return float(dim * self.dtype.itemsize)


CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (RawCodec("fp32", np.dtype("<f4")), RawCodec("fp16", np.dtype("<f2")))
}


def get_codec(name: str) -> Codec:
    """The codec of that name; ValueError names the known ones otherwise."""
    if name not in CODECS:
        raise ValueError(f"codec {name!r} is not known; known codecs: {', '.join(sorted(CODECS))}")
    return CODECS[name]
