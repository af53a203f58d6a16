"""Eight bits a value, with a scale for every channel."""

import torch
from torch import Tensor

_HEADROOM = 1.1
"""How far beyond the sample's largest deviation a channel's range goes. A few channels of SSL teachers are 70 times the others."""
_STILL = 1e-3
"""A channel that moves less than this share of the layer's usual range in the sample gets that range: it may move elsewhere."""


class Int8Codec:
    """``value = code * scale[d] + mean[d]``, code a signed byte; frame after frame, as `RawCodec`.

    Args:
        layers: the one layer, 1-based.
        state: ``mean`` and ``scale`` (1, D) float32, ``error`` (1,).
    """

    planar = False
    compression = "zstd"

    def __init__(self, layers: tuple[int, ...], state: dict[str, Tensor]) -> None:
        self._mean, self._scale = state["mean"], state["scale"]
        self.layers = layers
        self.error = state.get("error", torch.zeros(1))
        self.state_shape = tuple(self._mean.shape)
        self.dim = self.bytes_per_frame = self._mean.shape[-1]

    @staticmethod
    def fit(sample: Tensor) -> dict[str, Tensor]:
        """Mean and range of every channel. sample: (N, 1, D)."""
        mean = sample.double().mean(0).float()
        reach = (sample - mean).abs().amax(0) * _HEADROOM
        usual = reach.square().mean().sqrt()
        reach = torch.where(reach < _STILL * usual, usual, reach)
        return {"mean": mean, "scale": (reach / 127).clamp(min=torch.finfo(torch.float32).tiny)}

    def encode(self, frames: Tensor) -> Tensor:
        """See ColumnCodec. Values beyond the range are clipped; ValueError where one is not finite."""
        mean, scale = self._mean.to(frames.device), self._scale.to(frames.device)
        if not bool(frames.isfinite().all()):
            raise ValueError(f"a hidden state of layer {self.layers[0]} is not finite")
        codes = ((frames - mean) / scale).round()
        return codes.clamp(-127, 127).to(torch.int8)[:, 0].contiguous().view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See ColumnCodec."""
        mean, scale = self._mean.to(codes.device), self._scale.to(codes.device)
        return torch.addcmul(mean, codes.view(torch.int8).float().unsqueeze(-2), scale)
