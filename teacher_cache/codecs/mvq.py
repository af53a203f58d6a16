"""Multi-codebook vector quantisation: N codebooks of 256 entries whose chosen entries add up to a layer's output.

Objectives predict the chosen entries (MVQ-KD, arXiv 2211.00508; SPEAR, arXiv 2510.25955). Decoding gives features.
"""

import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs.device_copies import DeviceCopies
from ray_distill.teacher_cache.codecs.direct_sum import SIZE, choose_entries, sum_entries, train_codebooks

MAX_CODEBOOKS = 64


class MvqCodec:
    """Codec ``value = mean + sum over n of codebooks[n, code[n]]`` with N bytes ``code``. Frames are stored one after the other.

    Args:
        layers: The single layer, 1-based.
        state: ``mean`` (1, D) float32, ``codebooks`` (N, 256, D) float32 and ``error`` (1,) float32.
    """

    planar = False
    compression = "none"
    alphabet = SIZE

    def __init__(self, layers: tuple[int, ...], state: dict[str, Tensor]) -> None:
        self.layers = layers
        mean, codebooks = state["mean"], state["codebooks"]
        self._state, self._copies = (mean, codebooks), DeviceCopies()
        self.bytes_per_frame = self.symbols_per_frame = len(codebooks)
        self.dim = codebooks.shape[2]
        self.state_shape = tuple(mean.shape)
        self.error = state.get("error", torch.zeros(1))

    @staticmethod
    def fit(sample: Tensor, count: int) -> dict[str, Tensor]:
        """Return ``count`` codebooks for an (N, 1, D) sample. ValueError if it has fewer frames than a codebook has entries."""
        if len(sample) < SIZE:
            raise ValueError(
                f"codec mvq:{count} needs at least {SIZE} frames to fit its codebooks to, but the corpus has {len(sample)}; use "
                "more audio or another codec"
            )
        mean = sample.double().mean(0).float()
        return {"mean": mean, "codebooks": train_codebooks((sample - mean)[:, 0], count)}

    def encode(self, frames: Tensor) -> Tensor:
        """See `ColumnCodec.encode`. ValueError if a value is not finite."""
        if not bool(frames.isfinite().all()):
            raise ValueError(f"a hidden state of layer {self.layers[0]} is not finite")
        mean, codebooks = self._copies.on(frames.device, lambda: self._state)
        return choose_entries((frames - mean)[:, 0], codebooks).to(torch.uint8)

    def symbols(self, codes: Tensor) -> Tensor:
        """See `DiscreteCodec.symbols`."""
        return codes.long().unsqueeze(-2)

    def decode(self, codes: Tensor) -> Tensor:
        """See `ColumnCodec.decode`."""
        mean, codebooks = self._copies.on(codes.device, lambda: self._state)
        return mean + sum_entries(codebooks, codes.long()).unsqueeze(-2)
