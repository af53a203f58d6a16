"""A codec with eight bits per value and a scale per channel."""

import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs.device_copies import DeviceCopies

_HEADROOM = 1.1
"""Range of a channel, relative to its largest deviation in the sample. A few channels of SSL teachers are 70 times the others."""
_CONSTANT = 1e-3
"""A channel with less than this fraction of the layer's RMS range gets that range, because it may vary in other audio."""


class Int8Codec:
    """Codec with ``value = code * scale[d] + mean[d]`` for a signed byte ``code``. Frames are stored one after the other.

    Args:
        layers: The single layer, 1-based.
        state: ``mean`` and ``scale``, (1, D) float32, and ``error``, (1,) float32.
    """

    planar = False
    compression = "zstd"

    def __init__(self, layers: tuple[int, ...], state: dict[str, Tensor]) -> None:
        mean = state["mean"]
        self._state, self._copies = (mean, state["scale"]), DeviceCopies()
        self.layers = layers
        self.error = state.get("error", torch.zeros(1))
        self.state_shape = tuple(mean.shape)
        self.dim = self.bytes_per_frame = mean.shape[-1]

    @staticmethod
    def fit(sample: Tensor) -> dict[str, Tensor]:
        """Return the mean and scale of every channel of an (N, 1, D) sample."""
        mean = sample.double().mean(0).float()
        reach = (sample - mean).abs().amax(0) * _HEADROOM
        usual = reach.square().mean().sqrt()
        reach = torch.where(reach < _CONSTANT * usual, usual, reach)
        return {"mean": mean, "scale": (reach / 127).clamp(min=torch.finfo(torch.float32).tiny)}

    def encode(self, frames: Tensor) -> Tensor:
        """See `ColumnCodec.encode`. Values outside the range are clipped. ValueError if a value is not finite."""
        mean, scale = self._copies.on(frames.device, lambda: self._state)
        if not bool(frames.isfinite().all()):
            raise ValueError(f"a hidden state of layer {self.layers[0]} is not finite")
        codes = ((frames - mean) / scale).round()
        return codes.clamp(-127, 127).to(torch.int8)[:, 0].contiguous().view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `ColumnCodec.decode`."""
        mean, scale = self._copies.on(codes.device, lambda: self._state)
        return torch.addcmul(mean, codes.view(torch.int8).float().unsqueeze(-2), scale)
