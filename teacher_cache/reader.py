"""Targets for training: from a finished cache (CacheReader) or from the teacher itself (OnlineReader), batch for batch alike."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from teacher_cache.audio import load_audio
from teacher_cache.codecs import get_codec
from teacher_cache.flac import from_flac, quantize
from teacher_cache.frames import num_frames
from teacher_cache.layout import (
    CacheError,
    Layout,
    MaskDraws,
    SourceUtterance,
    layer_column,
    read_commit,
    read_spec,
    shard_numbers,
)
from teacher_cache.masks import draw_mask
from teacher_cache.teachers import Teacher

_OPEN_FILES = 64


@dataclass
class Batch:
    """Utterances with their targets, padded to the longest.

    Attributes:
        ids: B utterance ids.
        waveforms: (B, S) float32, zeros at padding.
        lengths: (B,) int64, real samples.
        num_frames: (B,) int64, real frames.
        targets: (B, L, T, D) float32: the clean pass, or for a mask draw the composite ``where(mask, clean, masked)``;
            zeros at padding.
        frame_mask: (B, T) bool, True at masked frames; None for the clean pass.
    """

    ids: list[str]
    waveforms: Tensor
    lengths: Tensor
    num_frames: Tensor
    targets: Tensor
    frame_mask: Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(
            self.ids,
            self.waveforms.to(device, non_blocking=True),
            self.lengths.to(device, non_blocking=True),
            self.num_frames.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            None if self.frame_mask is None else self.frame_mask.to(device, non_blocking=True),
        )


class TargetReader(Protocol):
    """What the training loop asks of a source of targets.

    Attributes:
        num_samples: (N,) int64 lengths of the split's utterances, in index order.
        layers: 1-based teacher layers that ``targets`` holds.
        dim: the teacher's width D.
        draws: mask draws there are; None where every draw can be had.
    """

    num_samples: np.ndarray
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


class CacheReader:
    """Random access to a finished cache: one row group per utterance, one column per layer.

    Example:
        >>> reader = CacheReader(Path("caches/demo"), "train")
        >>> batch = reader.read([0, 1, 2], draw=0)
        >>> batch.targets.shape  # (B, L, T, D)

    Args:
        root: folder of the cache.
        split: ``train`` or ``validation``.
        layers: 1-based layers to read; default all that are cached.

    Raises:
        CacheError: no cache, an unfinished one, a file whose size is not the committed one, an unknown split or layer.
    """

    def __init__(self, root: Path, split: str, layers: Sequence[int] | None = None) -> None:
        self.spec = read_spec(root)
        self.layers = tuple(layers) if layers is not None else self.spec.layers
        missing = sorted(set(self.layers) - set(self.spec.layers))
        if missing:
            raise CacheError(f"the cache at {root} has no layer {missing[0]}; it has layers {list(self.spec.layers)}")
        self.dim = self.spec.dim
        self.draws: int | None = self.spec.masks.draws
        self._layout = Layout(root)
        self._codec = get_codec(self.spec.codec)
        plan = pq.read_table(self._layout.plan)
        for shard in shard_numbers(plan):
            for name, record in read_commit(self._layout, shard)["files"].items():
                path = root / name
                if not path.is_file() or path.stat().st_size != record["bytes"]:
                    raise CacheError(
                        f"{path} is missing or not as committed; delete {self._layout.commit(shard)} and run the "
                        "cache stage again, which rebuilds that shard"
                    )
        splits = plan["split"].to_pylist()
        if split not in splits:
            raise CacheError(f"the cache at {root} has no split {split!r}; it has {sorted(set(splits))}")
        rows = plan.filter(pa.array([name == split for name in splits]))
        self.ids: list[str] = rows["id"].to_pylist()
        self.num_samples = rows["num_samples"].to_numpy()
        self._shards: list[int] = rows["shard"].to_pylist()
        self._rows: list[int] = rows["row"].to_pylist()
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See TargetReader. CacheError where the draw is not cached."""
        if draw is not None and not 0 <= draw < self.spec.masks.draws:
            raise CacheError(f"mask draw {draw} is not in the cache; it has draws 0 to {self.spec.masks.draws - 1}")
        columns = [layer_column(layer) for layer in self.layers]
        clean = [self._row(self._layout.clean(self._shards[i]), i, ["id", "audio", *columns]) for i in indices]
        waveforms, lengths = pad_waveforms([from_flac(row["audio"][0].as_py()) for row in clean])
        frames = num_frames(lengths)
        width = int(frames.max())
        targets = torch.zeros(len(indices), len(self.layers), width, self.dim)
        for b, row in enumerate(clean):
            for n, column in enumerate(columns):
                targets[b, n, : frames[b]] = self._codec.decode(row[column][0].as_buffer(), self.dim)
        frame_mask = None
        if draw is not None:
            frame_mask = torch.zeros(len(indices), width, dtype=torch.bool)
            for b, i in enumerate(indices):
                row = self._row(self._layout.masked(self._shards[i], draw), i, ["id", "mask", *columns])
                mask = torch.tensor(row["mask"][0].as_py(), dtype=torch.bool)
                frame_mask[b, : len(mask)] = mask
                unmasked = torch.nonzero(~mask).squeeze(1)
                for n, column in enumerate(columns):
                    targets[b, n, unmasked] = self._codec.decode(row[column][0].as_buffer(), self.dim)
        return Batch([self.ids[i] for i in indices], waveforms, lengths, frames, targets, frame_mask)

    def _row(self, path: Path, index: int, columns: list[str]) -> pa.Table:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = pq.ParquetFile(path, memory_map=True)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        row: pa.Table = file.read_row_group(self._rows[index], columns=columns)
        if row["id"][0].as_py() != self.ids[index]:
            raise CacheError(f"{path} holds {row['id'][0].as_py()!r} where the plan has {self.ids[index]!r}")
        return row


class OnlineReader:
    """The teacher in the loop: the same batches as a cache would give, computed anew each time.

    Args:
        utterances: of one split; index order is theirs.
        teacher: on the device it is to run on.
        masks: policy and seed of the draws.
        layers: 1-based layers; default all.
    """

    draws: int | None = None

    def __init__(
        self,
        utterances: Sequence[SourceUtterance],
        teacher: Teacher,
        masks: MaskDraws,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.utterances = utterances
        self.num_samples = np.array([utterance.num_samples for utterance in utterances])
        self.layers = tuple(layers or range(1, teacher.num_layers + 1))
        self.dim = teacher.dim
        self._teacher = teacher
        self._masks = masks

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See TargetReader; all tensors are on the teacher's device."""
        members = [self.utterances[i] for i in indices]
        waveforms, lengths = pad_waveforms([load_source(utterance) for utterance in members])
        device = self._teacher.device
        waveforms, lengths = waveforms.to(device), lengths.to(device)
        frames = num_frames(lengths)
        real = (torch.arange(int(frames.max()), device=device) < frames[:, None])[:, None, :, None]
        layers = [layer - 1 for layer in self.layers]
        targets = self._teacher.hidden_states(waveforms, lengths)[:, layers] * real
        frame_mask = None
        if draw is not None:
            frame_mask = masks_of(self._masks, draw, [u.id for u in members], frames.tolist()).to(device)
            masked = self._teacher.hidden_states(waveforms, lengths, frame_mask)[:, layers] * real
            targets = torch.where(frame_mask[:, None, :, None], targets, masked)
        return Batch([u.id for u in members], waveforms, lengths, frames, targets, frame_mask)


def masks_of(masks: MaskDraws, draw: int, ids: Sequence[str], frames: Sequence[int]) -> Tensor:
    """(B, T) bool: each utterance's own mask of this draw, False at padding."""
    out = torch.zeros(len(ids), max(frames), dtype=torch.bool)
    for row, utterance_id, count in zip(out, ids, frames, strict=True):
        row[:count] = torch.from_numpy(draw_mask(masks.policy, masks.seed, draw, utterance_id, count))
    return out


def load_source(utterance: SourceUtterance) -> np.ndarray:
    """(S,) float32 of an utterance as teachers and students hear it.

    Raises:
        ValueError: the file can't be decoded, or is not the one that was indexed.
    """
    waveform = load_audio(Path(utterance.path))
    if hashlib.sha256(waveform.tobytes()).hexdigest() != utterance.sha256:
        raise ValueError(f"{utterance.path} changed since the corpus was indexed; run the index stage again")
    return quantize(waveform)
