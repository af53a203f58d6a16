"""Codecs, which encode layer outputs to bytes in a shard and decode them on the training device.

``cache.json`` has the codec's name. ``fp32``, ``fp16``, ``int8`` and ``layer-pca`` encode each layer separately, with one column
per layer; ``pca`` encodes all layers together in one column. ``units`` and ``mvq`` are discrete, with one column per layer: their
codes are numbers of clusters or of codebooks' entries, which some objectives predict. Every codec uses a fixed number of bytes per
frame (before Parquet compresses them), so frames can be selected and combined before they are decoded. The parameters that
`fit_codec` learns (bases, scales, centroids) are the codec's state, a dict of tensors stored beside the shards.

Other packages add codecs by entry points; see `CodecKind`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ray_distill.plugins import of_packages
from ray_distill.teacher_cache.codecs.codec_kind import CodecOfPackage, codec_of_package
from ray_distill.teacher_cache.codecs.column_codec import ColumnCodec, DiscreteCodec, State
from ray_distill.teacher_cache.codecs.int8 import Int8Codec
from ray_distill.teacher_cache.codecs.mvq import MAX_CODEBOOKS, MvqCodec
from ray_distill.teacher_cache.codecs.pca import DEFAULT_STEP, PcaCodec
from ray_distill.teacher_cache.codecs.raw import RawCodec
from ray_distill.teacher_cache.codecs.units import MAX_UNITS, UnitsCodec

CODECS = ("fp32", "fp16", "int8", "pca", "layer-pca", "units", "mvq")
"""Names of codecs. ``pca`` and ``layer-pca`` take a quantisation step, as in ``pca:0.5``; the default is DEFAULT_STEP. ``units`` needs
a number of clusters, as in ``units:500``, and ``mvq`` a number of codebooks, as in ``mvq:16``."""

_MOST = {"units": MAX_UNITS, "mvq": MAX_CODEBOOKS}
"""Largest number after the colon of the discrete codecs."""
_SAMPLE_FRAMES = 20_000
"""Number of frames to fit a codec to, about 7 minutes of speech."""
_FRAMES_PER_UNIT = 100
_FRAMES_PER_CODEBOOK = 4000
_SAMPLE_BYTES = 2 << 30
"""Limit of the sample's memory, beyond which it is not enlarged for a discrete codec."""

DEFAULT_CODEC = "pca"

__all__ = [
    "CODECS",
    "DEFAULT_CODEC",
    "ColumnCodec",
    "DiscreteCodec",
    "State",
    "check_codec",
    "discrete_bytes",
    "fit_codec",
    "is_discrete",
    "is_joint",
    "is_learned",
    "open_codec",
    "relative_error",
    "sample_frames",
]

_LEARNED: dict[str, Callable[[tuple[int, ...], State], "Int8Codec | PcaCodec | UnitsCodec | MvqCodec"]] = {
    "int8": Int8Codec,
    "pca": PcaCodec,
    "layer-pca": PcaCodec,
    "units": UnitsCodec,
    "mvq": MvqCodec,
}


def _of_package(name: str) -> CodecOfPackage | None:
    """Return the codec of another package that a name means. None for a codec of this package."""
    kind = name.partition(":")[0]
    return None if kind in CODECS else codec_of_package(name)


def check_codec(name: str) -> str:
    """Return the name of a codec unchanged. ValueError if it is unknown."""
    kind, colon, step = name.partition(":")
    if _of_package(name) is not None:
        return name
    if kind not in CODECS or (colon and not kind.endswith("pca") and kind not in _MOST):
        plain = ", ".join(codec for codec in CODECS if codec not in _MOST)
        raise ValueError(
            f"codec {name!r} is not known; known codecs: {plain}, and pca:STEP, layer-pca:STEP, units:CLUSTERS, mvq:CODEBOOKS"
            f"{of_packages('codec', CODECS)}"
        )
    if kind in _MOST:
        if not (step.isascii() and step.isdigit() and len(step) < 10 and 1 <= int(step) <= _MOST[kind]):
            example = {"units": "units:500", "mvq": "mvq:16"}[kind]
            raise ValueError(
                f"codec {name!r}: the number after the colon must be a whole number from 1 to {_MOST[kind]}, as in {example}"
            )
        return name
    if colon:
        try:
            good = 0 < float(step) < float("inf")
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"codec {name!r}: the step after the colon must be a positive number, as in {kind}:0.5")
    return name


def is_joint(name: str) -> bool:
    """Return whether the codec has one column for all its layers."""
    if (other := _of_package(name)) is not None:
        return other.joint
    return name.partition(":")[0] == "pca"


def is_discrete(name: str) -> bool:
    """Return whether the codec is a `DiscreteCodec`."""
    if (other := _of_package(name)) is not None:
        return other.discrete
    return name.partition(":")[0] in _MOST


def discrete_bytes(name: str) -> int | None:
    """Return the bytes per frame and layer of a discrete codec of this package, which do not depend on the features; else None."""
    kind, _, number = name.partition(":")
    return None if kind not in _MOST else 2 if kind == "units" else int(number)


def sample_frames(name: str, layers: int, dim: int) -> int:
    """Return the number of frames to fit a codec to: more for codecs with many clusters, within the limit of memory."""
    kind, _, number = name.partition(":")
    wanted = int(number) * {"units": _FRAMES_PER_UNIT, "mvq": _FRAMES_PER_CODEBOOK}[kind] if kind in _MOST else 0
    return max(_SAMPLE_FRAMES, min(wanted, _SAMPLE_BYTES // (4 * layers * dim)))


def is_learned(name: str) -> bool:
    """Return whether the codec must be fitted to a sample of the teacher's outputs."""
    return name not in ("fp32", "fp16")


def fit_codec(name: str, sample: Tensor, held_out: Tensor) -> State:
    """Fit a codec and return its state. Equal arguments give equal states on one machine.

    Args:
        name: Name of the codec.
        sample: (N, L, D) float32 frames to fit to, N at least 2.
        held_out: (M, L, D) float32 frames of other utterances, on which the expected error is measured.

    Returns:
        The state. Empty for ``fp32`` and ``fp16``.

    Raises:
        ValueError: If the sample has too few frames for a discrete codec.
    """
    kind, _, step = check_codec(name).partition(":")
    if not is_learned(name):
        return {}
    layers = range(sample.shape[1])
    groups = [list(layers)] if is_joint(name) else [[layer] for layer in layers]
    other = _of_package(name)
    state: State = {}
    for number, group in enumerate(groups):
        inside, outside = sample[:, group], held_out[:, group]
        if other is not None:
            learned = other.fit(inside)
            codec: ColumnCodec = other.open(tuple(range(1, len(group) + 1)), sample.shape[2], learned)
        elif kind == "int8":
            learned = Int8Codec.fit(inside)
            codec = Int8Codec((1,), learned)
        elif kind == "units":
            learned = UnitsCodec.fit(inside, int(step))
            codec = UnitsCodec((1,), learned)
        elif kind == "mvq":
            learned = MvqCodec.fit(inside, int(step))
            codec = MvqCodec((1,), learned)
        else:
            learned = PcaCodec.fit(inside, float(step or DEFAULT_STEP))
            codec = PcaCodec(tuple(range(1, len(group) + 1)), learned)
        learned["error"] = relative_error(outside, codec.decode(codec.encode(outside)))
        state |= {f"{number}.{key}": value for key, value in learned.items()}
    return state


def open_codec(name: str, layers: Sequence[int], dim: int, state: State) -> tuple[ColumnCodec, ...]:
    """Return the codecs of a set of layers, one per column.

    Args:
        name: Name of the codec.
        layers: 1-based layers, in the order of the sample that the state was fitted to.
        dim: Width D of the teacher.
        state: State from `fit_codec`.

    Raises:
        ValueError: If the name is unknown, or the state is that of other layers or another width.
    """
    kind, _, number_given = check_codec(name).partition(":")
    if not is_learned(name):
        return tuple(RawCodec(kind, layer, dim) for layer in layers)
    groups = [tuple(layers)] if is_joint(name) else [(layer,) for layer in layers]
    parts: list[State] = [{} for _ in groups]
    for key, value in state.items():
        number, _, rest = key.partition(".")
        if not number.isdigit() or int(number) >= len(groups):
            raise ValueError(f"the state of codec {name!r} was made for other layers than {list(layers)}")
        parts[int(number)][rest] = value
    if not all(parts):
        raise ValueError(f"the state of codec {name!r} was made for other layers than {list(layers)}")
    if (other := _of_package(name)) is not None:
        return tuple(other.open(group, dim, part) for group, part in zip(groups, parts, strict=True))
    try:
        codecs = tuple(_LEARNED[kind](group, part) for group, part in zip(groups, parts, strict=True))
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"the state of codec {name!r} was made for another codec ({error})") from error
    for codec in codecs:
        if codec.state_shape != (len(codec.layers), dim):
            raise ValueError(
                f"the state of codec {name!r} was made for {codec.state_shape[0]} layers of width {codec.state_shape[1]}, "
                f"not for {len(codec.layers)} of width {dim}"
            )
        size = codec.alphabet if isinstance(codec, UnitsCodec) else getattr(codec, "symbols_per_frame", None)
        if size is not None and size != int(number_given):
            raise ValueError(f"the state of codec {name!r} was made for {kind}:{size}")
    return codecs


def relative_error(frames: Tensor, decoded: Tensor) -> Tensor:
    """Return the (L,) RMS errors of decoded frames, each divided by the RMS deviation of the layer from its mean.

    Both arguments are (N, L, D).
    """
    spread = (frames - frames.mean(0)).double().square().sum((0, 2))
    return (
        ((frames - decoded).double().square().sum((0, 2)) / spread.clamp(min=torch.finfo(torch.float32).tiny))
        .sqrt()
        .float()
    )
