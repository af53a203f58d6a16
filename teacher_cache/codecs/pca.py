"""Principal components of one layer or of several together, quantised with one step: transform coding.

Neighbouring layers say mostly the same, so the components of all layers stacked into one vector take far fewer bytes than each
layer's own. With one step for all components the error is spread evenly, and components smaller than the noise are left out: the
reverse water-filling of rate-distortion theory (Cover and Thomas, Elements of Information Theory, section 10.3.3).
"""

import torch
from torch import Tensor

DEFAULT_STEP = 0.5
_KEPT = 0.3
"""Components whose standard deviation is below this share of the step would round to zero almost always: left out."""
_MOST = 2048
"""Components at most."""
_ITERATIONS = 3
_OVERSAMPLING = 32
_HEADROOM = 1.25
"""How far beyond the sample's largest coefficient the range goes before codes are clipped."""


class PcaCodec:
    """Coefficients ``c = basis (x - mean) / spread`` as integers ``round(c / step)``.

    ``spread`` is each layer's RMS deviation, so that every layer is kept equally well relative to itself. The first ``wide``
    components take two bytes (little-endian), the others one; a value is planar: byte b of all frames, then byte b + 1 of all.

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
        """Components of a sample (N, L, D), by subspace iteration with a fixed seed; what the step leaves out is not kept."""
        count, layers, dim = sample.shape
        mean = sample.double().mean(0).float()
        centred = sample - mean
        spread = centred.double().square().mean((0, 2)).sqrt().float().clamp(min=torch.finfo(torch.float32).tiny)
        centred = (centred / spread[:, None]).reshape(count, layers * dim)
        kept = min(_MOST, layers * dim, count - 1)
        vectors = _leading_vectors(centred, kept)
        coefficients = centred @ vectors
        deviation = coefficients.double().square().mean(0).sqrt()
        kept = max(1, int((deviation > _KEPT * step).sum()))
        reach = coefficients[:, :kept].abs().amax(0) * _HEADROOM / step
        # Two bytes for every component up to the last that needs them: deviations fall, so these are few.
        wide = int((reach > 127).nonzero().max()) + 1 if bool((reach > 127).any()) else 0
        return {
            "mean": mean,
            "spread": spread,
            "basis": vectors[:, :kept].T.reshape(kept, layers, dim).half().contiguous(),
            "step": torch.tensor(step),
            "wide": torch.tensor(wide),
        }

    def encode(self, frames: Tensor) -> Tensor:
        """See ColumnCodec. Coefficients beyond the range are clipped; ValueError where a value is not finite."""
        encoder, _, mean = self._matrices(frames.device)
        codes = ((frames.flatten(1) - mean) @ encoder).round()
        if not bool(codes.isfinite().all()):
            raise ValueError(f"a hidden state of layers {list(self.layers)} is not finite")
        wide = codes[:, : self._wide].clamp(-32767, 32767).to(torch.int16).contiguous().view(torch.uint8)
        narrow = codes[:, self._wide :].clamp(-127, 127).to(torch.int8).contiguous().view(torch.uint8)
        # Low bytes of all wide components, then their high bytes: planes of a kind compress better side by side.
        return torch.cat([wide[:, 0::2], wide[:, 1::2], narrow], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """See ColumnCodec."""
        _, decoder, mean = self._matrices(codes.device)
        low = codes[..., : self._wide].float()
        signed = codes[..., self._wide :].contiguous().view(torch.int8).float()
        coefficients = torch.cat([low + 256 * signed[..., : self._wide], signed[..., self._wide :]], dim=-1)
        frames = torch.addmm(mean, coefficients.flatten(0, -2), decoder)
        return frames.view(*codes.shape[:-1], *self.state_shape)


def _leading_vectors(x: Tensor, count: int) -> Tensor:
    """(F, count): leading right singular vectors of x (N, F), largest first (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
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
