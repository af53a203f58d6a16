"""Batches of utterances with their targets, and the interface of readers that provide them to training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import ColumnCodec, DiscreteCodec
from ray_distill.teacher_cache.codecs.pca import PcaCodec


@dataclass(frozen=True)
class SymbolLayout:
    """Layout of discrete targets.

    Attributes:
        layers: Number of layers L.
        per_frame: Number S of symbols of a frame and layer.
        alphabet: Number of different symbols.
    """

    layers: int
    per_frame: int
    alphabet: int


def symbol_layout(codecs: Sequence[ColumnCodec]) -> SymbolLayout | None:
    """Return the layout of the symbols of the layers' codecs, or None if they are not discrete."""
    first = codecs[0]
    if not isinstance(first, DiscreteCodec):
        return None
    return SymbolLayout(len(codecs), first.symbols_per_frame, first.alphabet)


@dataclass(frozen=True)
class CodedTargets:
    """Encoded targets of a batch, to be decoded on the device that needs them.

    Attributes:
        layers: 1-based layers of the decoded targets, in order.
        columns: One pair per column that holds some of the layers: the codec and (B, T, K x bytes_per_frame) uint8 codes.
        parts: Number K of the teacher's frames whose mean is the target of a frame; see `frame_rate`. Default 1.
    """

    layers: tuple[int, ...]
    columns: tuple[tuple[ColumnCodec, Tensor], ...]
    parts: int = 1

    @property
    def shape(self) -> torch.Size:
        """Shape (B, L, T, D) of the decoded targets."""
        codec, codes = self.columns[0]
        return torch.Size([codes.shape[0], len(self.layers), codes.shape[1], codec.dim])

    def decode(self) -> Tensor:
        """Return the (B, L, T, D) float32 targets on the device of the codes."""
        found: dict[int, Tensor] = {}
        for codec, columns in self.columns:
            codes = columns.reshape(len(columns), columns.shape[1] * self.parts, -1)
            if isinstance(codec, PcaCodec):
                wanted = tuple(layer for layer in self.layers if layer in codec.layers)
                decoded = codec.decode(codes, wanted)
            else:
                wanted, decoded = codec.layers, codec.decode(codes)
            if self.parts > 1:
                decoded = decoded.reshape(len(decoded), -1, self.parts, *decoded.shape[2:]).mean(2)
            if wanted == self.layers:
                return decoded.transpose(1, 2)
            found |= {layer: decoded[..., n, :] for n, layer in enumerate(wanted)}
        return torch.stack([found[layer] for layer in self.layers], dim=1)

    def symbols(self) -> Tensor:
        """Return the (B, L, T, S) int64 symbols on the device of the codes. ValueError if the codec is not discrete."""
        assert self.parts == 1, "symbols have no mean"
        found: dict[int, Tensor] = {}
        for codec, codes in self.columns:
            if not isinstance(codec, DiscreteCodec):
                raise ValueError("the targets are features, not symbols; give the cache the codec units:K or mvq:N")
            found[codec.layers[0]] = codec.symbols(codes)[..., 0, :]
        return torch.stack([found[layer] for layer in self.layers], dim=1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "CodedTargets":
        """Return a copy with a function applied to every tensor of codes."""
        return replace(self, columns=tuple((codec, function(codes)) for codec, codes in self.columns))


@dataclass(frozen=True)
class SeveralTargets:
    """Encoded targets of several teachers for one batch.

    Attributes:
        parts: Targets of each teacher. Utterances that a teacher lacks have zeros as codes.
    """

    parts: tuple[CodedTargets, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> "SeveralTargets":
        """Return a copy with a function applied to every tensor of codes."""
        return SeveralTargets(tuple(part.map(function) for part in self.parts))


@dataclass(frozen=True)
class CombinedTargets:
    """Encoded targets of several teachers that are decoded to one.

    Attributes:
        parts: Targets of each teacher, with as many layers.
        weights: Weight of each teacher in the mean; they add up to 1. None puts the channels of the teachers side by side.
    """

    parts: tuple[CodedTargets, ...]
    weights: tuple[float, ...] | None

    @property
    def shape(self) -> torch.Size:
        """Shape (B, L, T, D) of the decoded targets."""
        *rest, dim = self.parts[0].shape
        return torch.Size([*rest, dim if self.weights is not None else sum(part.shape[3] for part in self.parts)])

    def decode(self) -> Tensor:
        """Return the (B, L, T, D) float32 targets on the device of the codes."""
        decoded = (part.decode() for part in self.parts)
        if self.weights is None:
            return torch.cat(list(decoded), -1)
        first, *others = (part * weight for part, weight in zip(decoded, self.weights, strict=True))
        return sum(others, start=first)

    def symbols(self) -> Tensor:
        """Raise ValueError, since symbols can't be combined."""
        raise ValueError("symbols of several teachers can't be combined; set train.aggregate to heads")

    def map(self, function: Callable[[Tensor], Tensor]) -> "CombinedTargets":
        """Return a copy with a function applied to every tensor of codes."""
        return replace(self, parts=tuple(part.map(function) for part in self.parts))


@dataclass(frozen=True, repr=False)
class CachedUtterance:
    """One utterance with its targets.

    Attributes:
        id: Utterance id.
        waveform: (S,) float32 at 16 kHz.
        targets: (L, T, D) float32, as in `Batch.targets`.
        frame_mask: (T,) bool, True at masked frames, or None for the clean pass.
    """

    id: str
    waveform: Tensor
    targets: Tensor
    frame_mask: Tensor | None

    def __repr__(self) -> str:
        return (
            f"CachedUtterance({self.id!r}, waveform={tuple(self.waveform.shape)}, targets={tuple(self.targets.shape)}, "
            f"frame_mask={_masked_share(self.frame_mask, self.targets.shape[1])})"
        )


@dataclass(frozen=True, repr=False)
class Batch:
    """Utterances with their targets, padded to the longest utterance.

    Attributes:
        ids: B utterance ids.
        waveforms: (B, S) float32 at 16 kHz, zeros at padding.
        lengths: (B,) int64, number of real samples.
        num_frames: (B,) int64, number of real frames.
        coded: The targets, encoded or decoded.
        frame_mask: (B, T) bool, True at masked frames, False at padding; None for the clean pass.
        present: (B, K) bool, whether each of K teachers has targets and a weight for the utterance; None with a single teacher.
        domains: Domain of each utterance; None unless weights of teachers depend on it.
    """

    ids: list[str]
    waveforms: Tensor
    lengths: Tensor
    num_frames: Tensor
    coded: CodedTargets | SeveralTargets | CombinedTargets | Tensor
    frame_mask: Tensor | None
    present: Tensor | None = None
    domains: tuple[str, ...] | None = None

    def of_teacher(self, number: int) -> "Batch":
        """Return the batch with the targets of one of several teachers, counted from 0."""
        assert isinstance(self.coded, SeveralTargets)
        return replace(self, coded=self.coded.parts[number], present=None)

    @property
    def targets(self) -> Tensor:
        """(B, L, T, D) float32: the clean pass, or under a mask draw the composite ``where(mask, clean, masked)``.

        Values at padding are finite and meaningless. Every access decodes the targets again, unless the batch comes from
        `to`.
        """
        assert not isinstance(self.coded, SeveralTargets), "several teachers have targets each; see `of_teacher`"
        return self.coded if isinstance(self.coded, Tensor) else self.coded.decode()

    @property
    def symbols(self) -> Tensor:
        """(B, L, T, S) int64: the symbols of a discrete codec, with any values at padding. ValueError for other targets."""
        if isinstance(self.coded, Tensor):
            raise ValueError(
                "the targets are decoded features, not symbols; read them from a cache of codec units:K or mvq:N"
            )
        assert not isinstance(self.coded, SeveralTargets), "several teachers have symbols each; see `of_teacher`"
        return self.coded.symbols()

    def __repr__(self) -> str:
        parts = self.coded.parts if isinstance(self.coded, SeveralTargets) else (self.coded,)
        return (
            f"Batch({len(self.ids)} utterances, waveforms={tuple(self.waveforms.shape)}, "
            f"targets={' and '.join(str(tuple(part.shape)) for part in parts)}, "
            f"frame_mask={_masked_share(self.frame_mask, int(self.num_frames.sum()))}, device={str(self.waveforms.device)!r})"
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device, with its targets decoded there."""
        moved = self.moved(device)
        return replace(moved, coded=moved.targets)

    def moved(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device, with its targets as they are: decoded at each access of ``targets`` if encoded."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        coded = move(self.coded) if isinstance(self.coded, Tensor) else self.coded.map(move)
        return replace(self._map_inputs(move), coded=coded)

    def pinned(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU are asynchronous.

        Tensors that are on a GPU, as those of an `OnlineReader` are, stay there.
        """

        def pin(tensor: Tensor) -> Tensor:
            return tensor.pin_memory() if tensor.device.type == "cpu" else tensor

        coded = pin(self.coded) if isinstance(self.coded, Tensor) else self.coded.map(pin)
        return replace(self._map_inputs(pin), coded=coded)

    def _map_inputs(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            waveforms=function(self.waveforms),
            lengths=function(self.lengths),
            num_frames=function(self.num_frames),
            frame_mask=None if self.frame_mask is None else function(self.frame_mask),
            present=None if self.present is None else function(self.present),
        )


class TargetReader(Protocol):
    """Interface of a reader of targets, as the training loop uses it.

    Attributes:
        num_samples: (N,) int64 lengths of the utterances of a split, in index order.
        num_frames: (N,) int64 numbers of frames, as the teacher counts them.
        layers: 1-based teacher layers in ``targets``.
        dim: Width D of the teacher.
        draws: Number of mask draws, or None if any draw can be read.
    """

    num_samples: np.ndarray
    num_frames: np.ndarray
    layers: tuple[int, ...]
    dim: int
    draws: int | None

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """Return the batch of some utterances under a 0-based mask draw, or of the clean pass if ``draw`` is None."""
        ...


def pad_waveforms(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad B waveforms, (S_i,) float32, with zeros and return (B, S) float32 and their (B,) int64 lengths."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return padded, lengths


def _masked_share(frame_mask: Tensor | None, num_frames: int) -> str:
    return "None" if frame_mask is None else f"{int(frame_mask.sum())} of {num_frames} frames"
