"""Transform coding: principal components of one or more layers, quantised with one step size.

Neighbouring layers are strongly correlated, so the components of all layers in one vector need far fewer bytes than those of
each layer. One step size for all components spreads the error evenly, and components smaller than the quantisation noise are
left out. This is the reverse water-filling of rate-distortion theory (Cover and Thomas, Elements of Information Theory, section
10.3.3).
"""

import torch
from torch import Tensor

DEFAULT_STEP = 0.5
_MIN_DEVIATION = 0.3
"""Minimum standard deviation of a component, relative to the step. Smaller components would almost always round to zero."""
_MAX_COMPONENTS = 2048
_ITERATIONS = 3
_OVERSAMPLING = 32
_HEADROOM = 1.25
"""Range of a coefficient, relative to its largest value in the sample. Larger coefficients are clipped."""


class PcaCodec:
    """Codec of coefficients ``c = basis (x - mean) / spread`` as integers ``round(c / step)``.

    ``spread`` is the RMS deviation of each layer, so that all layers have a similar relative error. The first ``wide`` components
    have two bytes (little-endian), the others one. Values are planar: byte b of all frames, then byte b + 1 of all frames.

    Args:
        layers: 1-based layers of the column.
        state: ``mean`` (L, D) float32, ``spread`` (L,) float32, ``basis`` (K, L, D) float16, ``step`` () float32, ``wide`` ()
            int64, ``error`` (L,) float32.
    """

    planar = True
    compression = "zstd"

    def __init__(self, layers: tuple[int, ...], state: dict[str, Tensor]) -> None:
        self.layers = layers
        self._mean = state["mean"]
        self.state_shape = tuple(self._mean.shape)
        self.dim = self.state_shape[1]
        self.error = state.get("error", torch.zeros(len(layers)))
        self._wide = int(state["wide"])
        components = len(state["basis"])
        self.bytes_per_frame = components + self._wide
        basis = state["basis"].float().reshape(components, -1)
        spread = state["spread"].repeat_interleave(self.dim)
        self._encoder = (basis / spread / state["step"]).T.contiguous()
        self._decoder = basis * spread * state["step"]
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _matrices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = (
                self._encoder.to(device),
                self._decoder.to(device),
                self._mean.reshape(-1).to(device),
            )
        return self._on[device]

    @staticmethod
    def fit(sample: Tensor, step: float) -> dict[str, Tensor]:
        """Return the components of an (N, L, D) sample that are not too small for the step. The seed is fixed."""
        count, layers, dim = sample.shape
        mean = sample.double().mean(0).float()
        centred = sample - mean
        spread = centred.double().square().mean((0, 2)).sqrt().float().clamp(min=torch.finfo(torch.float32).tiny)
        centred = (centred / spread[:, None]).reshape(count, layers * dim)
        kept = min(_MAX_COMPONENTS, layers * dim, count - 1)
        vectors = _leading_vectors(centred, kept)
        coefficients = centred @ vectors
        deviation = coefficients.double().square().mean(0).sqrt()
        kept = max(1, int((deviation > _MIN_DEVIATION * step).sum()))
        reach = coefficients[:, :kept].abs().amax(0) * _HEADROOM / step
        # All components up to the last one that needs two bytes have two. They are few, as components are sorted by size.
        wide = int((reach > 127).nonzero().max()) + 1 if bool((reach > 127).any()) else 0
        return {
            "mean": mean,
            "spread": spread,
            "basis": vectors[:, :kept].T.reshape(kept, layers, dim).half().contiguous(),
            "step": torch.tensor(step),
            "wide": torch.tensor(wide),
        }

    def encode(self, frames: Tensor) -> Tensor:
        """See `ColumnCodec.encode`. Coefficients outside the range are clipped. ValueError if a value is not finite."""
        encoder, _, mean = self._matrices(frames.device)
        codes = ((frames.flatten(1) - mean) @ encoder).round()
        if not bool(codes.isfinite().all()):
            finite = frames.isfinite().all(2).all(0).tolist()
            wrong = [layer for layer, good in zip(self.layers, finite, strict=True) if not good]
            if not wrong:
                raise ValueError(
                    f"the hidden states of layers {list(self.layers)} are too large for codec pca; use codec fp32"
                )
            raise ValueError(f"a hidden state of layer {wrong[0]} is not finite")
        wide = codes[:, : self._wide].clamp(-32767, 32767).to(torch.int16).contiguous().view(torch.uint8)
        narrow = codes[:, self._wide :].clamp(-127, 127).to(torch.int8).contiguous().view(torch.uint8)
        # The low bytes of all wide components come before their high bytes, because similar planes compress better together.
        return torch.cat([wide[:, 0::2], wide[:, 1::2], narrow], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """See `ColumnCodec.decode`."""
        _, decoder, mean = self._matrices(codes.device)
        low = codes[..., : self._wide].float()
        signed = codes[..., self._wide :].contiguous().view(torch.int8).float()
        coefficients = torch.cat([low + 256 * signed[..., : self._wide], signed[..., self._wide :]], dim=-1)
        frames = torch.addmm(mean, coefficients.flatten(0, -2), decoder)
        return frames.view(*codes.shape[:-1], *self.state_shape)


def _leading_vectors(x: Tensor, count: int) -> Tensor:
    """Return the (F, count) leading right singular vectors of x, (N, F), sorted by singular value, largest first.

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    generator = torch.Generator().manual_seed(0)
    width = min(count + _OVERSAMPLING, x.shape[1])
    start = torch.randn(x.shape[1], width, generator=generator).to(x.device)
    subspace = torch.linalg.qr(start)[0]
    for _ in range(_ITERATIONS):
        subspace = torch.linalg.qr(x.T @ (x @ subspace))[0]
    projected = x @ subspace
    values, vectors = torch.linalg.eigh((projected.T @ projected).double())
    leading: Tensor = subspace @ vectors[:, values.argsort(descending=True)[:count]].float()
    return leading * torch.where(leading.sum(0) < 0, -1.0, 1.0)
