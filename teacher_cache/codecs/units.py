"""Units: the nearest of K centroids, fitted by k-means, as HuBERT (arXiv 2106.07447) and DiceHuBERT (arXiv 2507.02911) use them.

Targets of these objectives are the numbers of the clusters. Decoding gives the centroids, so units are also a codec of two bytes
a frame, with a large error.
"""

import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs.device_copies import DeviceCopies
from ray_distill.teacher_cache.codecs.kmeans import cluster, nearest

MAX_UNITS = 1 << 16


class UnitsCodec:
    """Codec with the number of the nearest centroid as a uint16. Values have the low bytes of all frames, then the high bytes.

    Args:
        layers: The single layer, 1-based.
        state: ``centroids``, (K, 1, D) float32, and ``error``, (1,) float32.
    """

    planar = True
    compression = "zstd"
    bytes_per_frame = 2
    symbols_per_frame = 1

    def __init__(self, layers: tuple[int, ...], state: dict[str, Tensor]) -> None:
        self.layers = layers
        centroids = state["centroids"][:, 0]
        self._state, self._copies = (centroids,), DeviceCopies()
        self.alphabet, self.dim = centroids.shape
        self.state_shape = tuple(state["centroids"].shape[1:])
        self.error = state.get("error", torch.zeros(1))

    @staticmethod
    def fit(sample: Tensor, count: int) -> dict[str, Tensor]:
        """Return the centroids of an (N, 1, D) sample. ValueError if it has fewer frames than there are clusters."""
        if len(sample) < count:
            raise ValueError(
                f"codec units:{count} needs at least {count} frames to fit its clusters to, but the corpus has {len(sample)}; "
                "choose fewer units"
            )
        return {"centroids": cluster(sample[:, 0].float(), count)[:, None]}

    def encode(self, frames: Tensor) -> Tensor:
        """See `ColumnCodec.encode`. ValueError if a value is not finite."""
        if not bool(frames.isfinite().all()):
            raise ValueError(f"a hidden state of layer {self.layers[0]} is not finite")
        (centroids,) = self._copies.on(frames.device, lambda: self._state)
        index, _ = nearest(frames[:, 0], centroids)
        return torch.stack([index & 255, index >> 8], 1).to(torch.uint8)

    def symbols(self, codes: Tensor) -> Tensor:
        """See `DiscreteCodec.symbols`. Numbers that no cluster has, which only foreign bytes contain, become the last one."""
        wide = codes.long()
        return (wide[..., 0] + 256 * wide[..., 1]).clamp(max=self.alphabet - 1)[..., None, None]

    def decode(self, codes: Tensor) -> Tensor:
        """See `ColumnCodec.decode`."""
        (centroids,) = self._copies.on(codes.device, lambda: self._state)
        return centroids[self.symbols(codes)[..., 0]]
