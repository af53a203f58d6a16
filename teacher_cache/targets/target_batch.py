"""What a reader hands to training: utterances with their targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import ColumnCodec


@dataclass(frozen=True)
class CodedTargets:
    """Targets as they were read, to be decoded where they are needed.

    Attributes:
        layers: 1-based layers wanted, in their order.
        columns: (codec, codes (B, T, bytes_per_frame) uint8) for each column that holds some of them.
    """

    layers: tuple[int, ...]
    columns: tuple[tuple[ColumnCodec, Tensor], ...]

    def decode(self) -> Tensor:
        """(B, L, T, D) float32, on the codes' device."""
        found: dict[int, Tensor] = {}
        for codec, codes in self.columns:
            decoded = codec.decode(codes)
            if codec.layers == self.layers:
                return decoded.transpose(1, 2)
            found |= {layer: decoded[..., n, :] for n, layer in enumerate(codec.layers)}
        return torch.stack([found[layer] for layer in self.layers], dim=1)

    def map(self, move: "Move") -> "CodedTargets":
        """The same with every codes tensor replaced by ``move(codes)``."""
        return CodedTargets(self.layers, tuple((codec, move(codes)) for codec, codes in self.columns))


class Move(Protocol):
    """Something that takes a tensor elsewhere."""

    def __call__(self, tensor: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Utterances with their targets, padded to the longest.

    Attributes:
        ids: B utterance ids.
        waveforms: (B, S) float32, zeros at padding.
        lengths: (B,) int64, real samples.
        num_frames: (B,) int64, real frames.
        coded: the targets, decoded or not.
        frame_mask: (B, T) bool, True at masked frames; None for the clean pass.
    """

    ids: list[str]
    waveforms: Tensor
    lengths: Tensor
    num_frames: Tensor
    coded: CodedTargets | Tensor
    frame_mask: Tensor | None

    @property
    def targets(self) -> Tensor:
        """(B, L, T, D) float32: the clean pass, or under a mask draw the composite ``where(mask, clean, masked)``.

        Values at padding are finite and mean nothing. Decoded at each use of a batch that was not moved by `to`.
        """
        return self.coded if isinstance(self.coded, Tensor) else self.coded.decode()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device, its targets decoded there."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        coded = move(self.coded) if isinstance(self.coded, Tensor) else self.coded.map(move).decode()
        return replace(self._moved(move), coded=coded)

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU need not wait."""
        coded = self.coded.pin_memory() if isinstance(self.coded, Tensor) else self.coded.map(Tensor.pin_memory)
        return replace(self._moved(Tensor.pin_memory), coded=coded)

    def _moved(self, move: Move) -> "Batch":
        return replace(
            self,
            waveforms=move(self.waveforms),
            lengths=move(self.lengths),
            num_frames=move(self.num_frames),
            frame_mask=None if self.frame_mask is None else move(self.frame_mask),
        )


class TargetReader(Protocol):
    """What the training loop asks of a source of targets.

    Attributes:
        num_samples: (N,) int64 lengths of the split's utterances, in index order.
        num_frames: (N,) int64 frames of each, as the teacher counts them.
        layers: 1-based teacher layers that ``targets`` holds.
        dim: the teacher's width D.
        draws: mask draws there are; None where every draw can be had.
    """

    num_samples: np.ndarray
    num_frames: np.ndarray
    layers: tuple[int, ...]
    dim: int
    draws: int | None

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """The batch of these utterances under mask draw ``draw`` (None: the clean pass)."""
        ...


def pad_waveforms(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """B waveforms (S_i,) → ((B, S) float32 zero-padded, (B,) int64 lengths)."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return padded, lengths
