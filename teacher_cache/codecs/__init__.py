"""Codecs: how layer outputs become bytes in a shard, and targets on the training device again.

A codec's name stands in ``cache.json``. It codes each layer by itself (``fp32``, ``fp16``, ``int8``, ``layer-pca``), with one
column per layer, or all of them together (``pca``), with one column for all. Every codec has a fixed number of bytes per frame
until Parquet compresses them, so frames can be picked and mixed before they are decoded. What `fit_codec` learnt (bases, scales)
is the codec's state: a dict of tensors, kept beside the shards.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs.int8 import Int8Codec
from ray_distill.teacher_cache.codecs.pca import DEFAULT_STEP, PcaCodec
from ray_distill.teacher_cache.codecs.raw import RawCodec

CODECS = ("fp32", "fp16", "int8", "pca", "layer-pca")
"""Known names. ``pca`` and ``layer-pca`` take a quantisation step, as in ``pca:0.5``; without one it is DEFAULT_STEP."""

DEFAULT_CODEC = "pca"

State = dict[str, Tensor]


class ColumnCodec(Protocol):
    """Codes one column of a shard: some layers, side by side. Deterministic; works on any device.

    Attributes:
        layers: 1-based layers in the column.
        dim: width D of each.
        bytes_per_frame: of one frame of all of them, before compression.
        compression: Parquet's for the column: ``none`` or ``zstd``.
        planar: whether a value holds all frames' first bytes, then all second ones, ... (better to compress) instead of
            one frame after the other.
        error: (len(layers),) relative RMS error to expect of each layer, as `relative_error` has it.
    """

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def dim(self) -> int: ...
    @property
    def bytes_per_frame(self) -> int: ...
    @property
    def compression(self) -> str: ...
    @property
    def planar(self) -> bool: ...
    @property
    def error(self) -> Tensor: ...

    def encode(self, frames: Tensor) -> Tensor:
        """(T, layers, D) float32 → (T, bytes_per_frame) uint8, on the same device. ValueError where a value does not fit."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """(..., bytes_per_frame) uint8 → (..., layers, D) float32, on the same device."""
        ...


def check_codec(name: str) -> str:
    """The name, if it is a codec's; ValueError names the known ones otherwise."""
    kind, colon, step = name.partition(":")
    if kind not in CODECS or (colon and not kind.endswith("pca")):
        raise ValueError(
            f"codec {name!r} is not known; known codecs: {', '.join(CODECS)}, and pca:STEP, layer-pca:STEP"
        )
    if colon:
        try:
            good = 0 < float(step) < float("inf")
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"codec {name!r}: the step after the colon must be a positive number, as in {kind}:0.5")
    return name


def is_joint(name: str) -> bool:
    """Whether the codec has one column for all its layers."""
    return name.partition(":")[0] == "pca"


def is_learned(name: str) -> bool:
    """Whether the codec needs to be fitted to a sample of the teacher's outputs."""
    return not name.startswith("fp")


def fit_codec(name: str, sample: Tensor, held_out: Tensor) -> State:
    """Learns a codec's state; equal arguments give equal states on one machine.

    Args:
        name: of the codec.
        sample: (N, L, D) float32 frames to learn from; N at least 2.
        held_out: (M, L, D) frames of other utterances, on which the error to expect is measured.

    Returns:
        The state; empty for codecs that learn nothing.
    """
    kind, _, step = check_codec(name).partition(":")
    if not is_learned(name):
        return {}
    layers = range(sample.shape[1])
    groups = [list(layers)] if is_joint(name) else [[layer] for layer in layers]
    state: State = {}
    for number, group in enumerate(groups):
        inside, outside = sample[:, group], held_out[:, group]
        if kind == "int8":
            learned = Int8Codec.fit(inside)
            codec: ColumnCodec = Int8Codec((1,), learned)
        else:
            learned = PcaCodec.fit(inside, float(step or DEFAULT_STEP))
            codec = PcaCodec(tuple(range(1, len(group) + 1)), learned)
        learned["error"] = relative_error(outside, codec.decode(codec.encode(outside)))
        state |= {f"{number}.{key}": value for key, value in learned.items()}
    return state


def open_codec(name: str, layers: Sequence[int], dim: int, state: State) -> tuple[ColumnCodec, ...]:
    """The codecs of a set of layers, one for each column.

    Args:
        name: of the codec.
        layers: 1-based layers, as in the sample that the state was fitted to.
        dim: the teacher's width D.
        state: of `fit_codec`.

    Raises:
        ValueError: an unknown name, or a state made for other layers or another width.
    """
    kind = check_codec(name).partition(":")[0]
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
    made: type[Int8Codec] | type[PcaCodec] = Int8Codec if kind == "int8" else PcaCodec
    try:
        codecs = tuple(made(group, part) for group, part in zip(groups, parts, strict=True))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the state of codec {name!r} was made for another codec ({error})") from error
    for codec in codecs:
        if codec.state_shape != (len(codec.layers), dim):
            raise ValueError(
                f"the state of codec {name!r} was made for {codec.state_shape[0]} layers of width {codec.state_shape[1]}, "
                f"not for {len(codec.layers)} of width {dim}"
            )
    return codecs


def relative_error(frames: Tensor, decoded: Tensor) -> Tensor:
    """(L,): each layer's RMS error over the RMS of its deviation from the mean. Both (N, L, D)."""
    spread = (frames - frames.mean(0)).double().square().sum((0, 2))
    return (
        ((frames - decoded).double().square().sum((0, 2)) / spread.clamp(min=torch.finfo(torch.float32).tiny))
        .sqrt()
        .float()
    )
