"""Transform coding: principal components of one or more layers, quantised with one step size.

Neighbouring layers are strongly correlated, so the components of all layers in one vector need far fewer bytes than those of
each layer. One step size for all components spreads the error evenly, and components smaller than the quantisation noise are
left out. This is the reverse water-filling of rate-distortion theory (Cover and Thomas, Elements of Information Theory, section
10.3.3).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs.device_copies import DeviceCopies

DEFAULT_STEP = 0.5
_MIN_DEVIATION = 0.3
"""Minimum standard deviation of a component, relative to the step. Smaller components would almost always round to zero."""
_MAX_COMPONENTS = 2048
_ITERATIONS = 3
_OVERSAMPLING = 32
_HEADROOM = 1.25
"""Range of a coefficient, relative to its largest value in the sample. Larger coefficients are clipped."""
_ALIGNMENT = 8
"""The depth of a half-precision product is padded to a multiple of this, without which tensor cores are slow."""


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
        self._basis = state["basis"]
        self._scale = state["spread"] * state["step"]
        basis = self._basis.float().reshape(components, -1)
        spread = state["spread"].repeat_interleave(self.dim)
        self._encoder = (basis / spread / state["step"]).T.contiguous()
        self._decoder = basis * spread * state["step"]
        self._copies = DeviceCopies()

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
        encoder, mean = self._copies.on(
            frames.device, lambda: (self._encoder, self._mean.flatten()), ("encode", self.layers)
        )
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

    def decode(self, codes: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """See `ColumnCodec.decode`.

        On a GPU the product has operands in fp16 and sums in fp32. The basis is stored in fp16 and codes are split into their bytes,
        so no operand is rounded, and the result differs from that on a CPU only by the rounding of sums.

        Args:
            codes: (..., bytes_per_frame) uint8.
            layers: Layers of the column to decode, in this order; no others are computed. Default: all.

        Returns:
            (..., layers, D) float32.
        """
        wanted = self.layers if layers is None else tuple(layers)
        if codes.is_cuda:
            frames = self._decode_in_halves(codes.flatten(0, -2), wanted, _product_on_tensor_cores)
        else:
            low = codes[..., : self._wide].float()
            signed = codes[..., self._wide :].contiguous().view(torch.int8).float()
            coefficients = torch.cat([low + 256 * signed[..., : self._wide], signed[..., self._wide :]], dim=-1)

            def matrices() -> tuple[Tensor, Tensor]:
                places = self._places(wanted)
                decoder = self._decoder.unflatten(1, self.state_shape)[:, places].flatten(1)  # type: ignore[no-untyped-call]
                return decoder, self._mean[places].flatten()

            decoder, mean = self._copies.on(codes.device, matrices, ("decode", wanted))
            frames = torch.addmm(mean, coefficients.flatten(0, -2), decoder)
        return frames.view(*codes.shape[:-1], len(wanted), self.dim)

    def _places(self, layers: Sequence[int]) -> list[int]:
        return [self.layers.index(layer) for layer in layers]

    def _decode_in_halves(
        self, codes: Tensor, layers: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Decode (N, bytes_per_frame) uint8 to (N, layers * D) float32 with half-precision operands.

        A code of two bytes can be larger than 2,048, above which fp16 does not hold all integers. Its low and its high byte are
        separate operands, and the rows of the basis for high bytes are multiplied by 256, all of which is exact.

        Args:
            codes: The codes.
            layers: Layers to decode.
            product: Product of (N, K) and (K, M) float16 as (N, M) float32.
        """
        wide, size = self._wide, self.bytes_per_frame
        surplus = -size % _ALIGNMENT

        def matrices() -> tuple[Tensor, Tensor, Tensor]:
            places = self._places(layers)
            basis = self._basis[:, places].flatten(1)
            rows = torch.cat([basis[:wide], 256 * basis[:wide], basis[wide:], basis.new_zeros(surplus, basis.shape[1])])
            return rows.half(), self._scale[places].repeat_interleave(self.dim), self._mean[places].flatten()

        rows, scale, mean = self._copies.on(codes.device, matrices, ("decode in halves", layers))
        operand = torch.zeros(len(codes), size + surplus, dtype=torch.float16, device=codes.device)
        operand[:, :wide] = codes[:, :wide]
        operand[:, wide:size] = codes[:, wide:].view(torch.int8)
        return torch.addcmul(mean, product(operand, rows), scale)


def _product_on_tensor_cores(left: Tensor, right: Tensor) -> Tensor:
    """Return the (N, M) float32 product of (N, K) and (K, M) float16 on a GPU, with sums in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _leading_vectors(x: Tensor, count: int) -> Tensor:
    """Return the (F, count) leading right singular vectors of x, (N, F), sorted by singular value, largest first.

    With few columns or rows they follow from the eigenvectors of xᵀ x, or from those of x xᵀ: if u is one, xᵀ u over its length is
    one of the vectors. That is faster than randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), which
    finds them otherwise.
    """
    width = min(count + _OVERSAMPLING, x.shape[1])
    if x.shape[1] <= width:
        return _with_sign(torch.linalg.eigh((x.T @ x).double())[1][:, -count:].flip(1).float())
    if len(x) <= width:
        values, vectors = torch.linalg.eigh((x @ x.T).double())
        lengths = values[-count:].clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return _with_sign(x.T @ (vectors[:, -count:] / lengths).flip(1).float())
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape[1], width, generator=generator).to(x.device)
    subspace = torch.linalg.qr(start)[0]
    for _ in range(_ITERATIONS):
        subspace = torch.linalg.qr(x.T @ (x @ subspace))[0]
    projected = x @ subspace
    values, vectors = torch.linalg.eigh((projected.T @ projected).double())
    return _with_sign(subspace @ vectors[:, values.argsort(descending=True)[:count]].float())


def _with_sign(vectors: Tensor) -> Tensor:
    """Return vectors, (F, count), with the signs that make their sums positive."""
    return vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)
