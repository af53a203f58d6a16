"""Targets for training from a finished cache, with random access: one row group per utterance."""

import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import ColumnCodec
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import draw_mask
from ray_distill.teacher_cache.reading.audio_place import refuse_audio_store, refuse_place
from ray_distill.teacher_cache.reading.local_copies import CommittedFile, LocalCopies
from ray_distill.teacher_cache.reading.read_ahead import ReadAhead
from ray_distill.teacher_cache.reading.referred_rows import ReferredRows, decoded
from ray_distill.teacher_cache.reading.shard_rows import ShardRows
from ray_distill.teacher_cache.reading.split_rows import SplitRows
from ray_distill.teacher_cache.storage.cache import Cache, column_name
from ray_distill.teacher_cache.storage.cache_spec import CacheError, Part, Targets, parts_of, serves
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.target_batch import (
    Batch,
    CachedUtterance,
    CodedTargets,
    pad_waveforms,
    symbol_layout,
)

if TYPE_CHECKING:
    from ray_distill.teacher_cache.reading.source_rows import SourceRows

_LOCAL_THREADS = 16
"""Maximum default number of threads for a local disk, where they mostly decompress, outside the interpreter's lock."""
_REMOTE_THREADS = 32
"""Default number of threads for an object store, where they mostly wait for requests."""
_REMOTE_BATCHES = 4
"""Batches to read at a time from an object store, because a single batch of six utterances can't use all threads."""


class CacheReader:
    """Utterances of one split of a cache with their targets. Safe to use from several threads.

    A reader is a map-style dataset: ``len(reader)``, ``reader[i]`` and iteration give single utterances as
    `CachedUtterance`. `read` gives padded batches, which training uses.

    Args:
        location: Location of the cache, a path or a URI.
        split: ``train`` or ``validation``.
        layers: 1-based layers to read. Default all cached layers.
        draws: Number of cached mask draws to use. Default all.
        threads: Number of threads that read and decode. Default up to 16 (limited by the number of cores) for a local
            cache, 32 for an object store.
        targets: Kind of targets. ``clean_only`` reads no masked pass from a ``clean_and_masked`` cache, so that targets are
            clean at unmasked frames too; see `serves`. Default the cache's own kind.
        local: Absolute path of a folder of this node for copies of shard files; see `LocalCopies`. Whole files are then fetched
            and read from there. Default None: rows are read from the cache itself.
        local_gb: Limit on the size of that folder in units of 1e9 bytes. Default `LocalCopies`' own.
        audio: Location of the audio that the cache refers to. Default: the recorded place. For a cache with ``audio`` ``source`` the
            path of an index of the corpus (``corpus/index.parquet`` in the folder of a run), which says where the audio is now; by
            default only local files are read, from the paths in the plan of the cache.

    Attributes:
        cache: The opened cache.
        ids: Utterance ids, in index order, without those that any of the files read lacks: a sequence of texts.
        planned_ids: The same with those.
        failed: Reasons by id for the utterances of the split that are left out.
        num_samples: (N,) int64 numbers of samples.
        num_frames: (N,) int64 numbers of frames.
        layers: 1-based layers of the targets.
        dim: Width D of the teacher.
        shards: (N,) int32 numbers of the shards that hold the utterances.
        prefers_window: Whether training should read shard by shard unless told otherwise, as from an object store.
        local_share: Size of the split's files as a share of the limit of the local copies; 0 without copies.
        needs_window: Whether it must, because the local copies have room for a part of the files only.
        targets: Kind of targets that are read, as in `CacheSpec.targets`.
        draws: Number of mask draws of the split. Validation uses no masks, so it has 0.
        symbols: Layout of discrete targets; None if the codec is not discrete.
        read_ahead: Fetching of the files of later batches in the background; None without local copies.
        batches_at_once: Number of `read` calls that a prefetcher should keep in flight.

    Raises:
        CacheError: If the cache or the audio to which it refers is missing or incomplete, a file does not have its committed size, or
            the split, a layer or a draw does not exist, the index of the corpus does not fit, or it is an audio store.

    Example:
        >>> reader = CacheReader("caches/demo", "train")
        >>> reader[0].targets.shape  # (L, T, D)
        >>> batch = reader.read([0, 1, 2], draw=0).to("cuda")
        >>> batch.targets.shape  # (B, L, T, D)
    """

    def __init__(
        self,
        location: str | Path | Store,
        split: str,
        layers: Sequence[int] | None = None,
        draws: int | None = None,
        threads: int | None = None,
        targets: Targets | None = None,
        local: str | Path | None = None,
        local_gb: float | None = None,
        audio: str | None = None,
    ) -> None:
        self.cache = Cache.open(location)
        spec = self.cache.spec
        refuse_audio_store(self.cache, "give the cache of a teacher")
        self.targets = targets or spec.targets
        if not serves(spec.targets, self.targets):
            raise CacheError(f"the cache at {self.cache.store.location} has targets {spec.targets}, not {targets}")
        self.layers = tuple(layers) if layers is not None else spec.layers
        missing = sorted(set(self.layers) - set(spec.layers))
        if missing or not self.layers:
            wrong = (
                f"the cache at {self.cache.store.location} has no layer {missing[0]}"
                if missing
                else "no layer is named"
            )
            raise CacheError(f"{wrong}; it has layers {list(spec.layers)}")
        if draws is not None and draws > spec.masks.draws:
            raise CacheError(f"the cache at {self.cache.store.location} has {spec.masks.draws} mask draws, not {draws}")
        self.dim = spec.dim
        self._split = split
        self.draws: int | None = 0 if split != "train" else spec.masks.draws if draws is None else draws
        self._sets = {
            number: tuple(c for c in self.cache.codecs(number) if set(c.layers) & set(self.layers))
            for number, layer_set in enumerate(self.cache.layer_sets)
            if set(layer_set.layers) & set(self.layers)
        }
        self._codecs = [codec for codecs in self._sets.values() for codec in codecs]
        self.symbols = symbol_layout(self._codecs)
        self._parts: dict[tuple[str, int | None, int], Part] = {
            (part.kind, part.draw, part.layer_set): part
            for part in parts_of(spec, len(self.cache.layer_sets), split)
            if part.has_audio or (part.layer_set in self._sets and self._needs(part))
        }
        width = max((codec.bytes_per_frame for codec in self._codecs), default=0)
        self._rows = ShardRows(self.cache, split, list(self._parts.values()), width, local, local_gb)
        rows, self.failed, self.planned_ids = self._rows.utterances, self._rows.failed, self._rows.planned.ids
        if not len(rows.ids):
            name, reason = next(iter(self.failed.items()))
            raise CacheError(
                f"all utterances of split {split!r} failed when the cache at {self.cache.store.location} was built ({name}: "
                f"{reason}); repair the corpus, and build the cache again"
            )
        self.ids, self.num_samples, self.num_frames = rows.ids, rows.num_samples, rows.num_frames
        self.shards = rows.shard
        self._audio: ReferredRows | SourceRows | None = None
        if spec.refers_to_store:
            self._audio = ReferredRows(self.cache, split, rows, local, local_gb, audio)
        elif spec.embeds_audio:
            refuse_place(self.cache.store, spec, audio)
        else:
            self._audio = _source_rows(self.cache, split, rows, audio)
        in_store = self.cache.store.local is None
        remote = in_store or (self._audio is not None and self._audio.is_remote)
        self.batches_at_once = _REMOTE_BATCHES if remote else 1
        default = _REMOTE_THREADS if remote else min(_LOCAL_THREADS, os.cpu_count() or 1)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads or default, "cache-reader")
        self._local, self._local_gb, self._audio_location = local, local_gb, audio
        copies = self._rows.copies
        self.read_ahead = None if copies is None else ReadAhead(self._files)
        self.prefers_window = in_store or (self._audio is not None and self._audio.prefers_window)
        size = self._rows.bytes + (0 if self._audio is None else self._audio.bytes)
        self.local_share = 0.0 if copies is None else size / copies.limit
        self.needs_window = self.local_share > 1

    def _needs(self, part: Part) -> bool:
        return part.draw is None or (part.draw < (self.draws or 0) and self.targets != "clean_only")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: SupportsIndex) -> CachedUtterance:
        """Return one utterance with its targets under mask draw 0, or those of the clean pass if the split has no masks.

        Raises:
            IndexError: If the index is out of range. Negative indices count from the end.
            CacheError: If a file is damaged.
        """
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(
                f"index {position} is out of range for the {len(self)} utterances of split {self._split!r}"
            )
        position %= len(self)
        draw = 0 if self.draws else None
        waveform, codes, mask = self._read_row(position, draw)
        columns = tuple((codec, torch.tensor(values)[None]) for codec, values in zip(self._codecs, codes, strict=True))
        return CachedUtterance(
            id=self.ids[position],
            waveform=torch.from_numpy(waveform),
            targets=CodedTargets(self.layers, columns).decode()[0],
            frame_mask=None if mask is None else torch.tensor(mask),
        )

    def __iter__(self) -> Iterator[CachedUtterance]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        hours = self.num_samples.sum() / SAMPLE_RATE / 3600
        return (
            f"CacheReader({self.cache.store.location!r}, split={self._split!r}, utterances={len(self)}, hours={hours:.2f}, "
            f"layers={self.layers}, dim={self.dim}, draws={self.draws}, targets={self.targets!r})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self._split, self.layers, self.draws, self._threads, self.targets, self._local, self._local_gb)
        return CacheReader, (self.cache.store.location, *arguments, self._audio_location)

    def _files(self, indices: Sequence[int], draw: int | None) -> list[tuple[LocalCopies, CommittedFile]]:
        """Return the files that a batch is read from, each once, with the copies that fetch them."""
        assert self._rows.copies is not None
        files = [(self._rows.copies, file) for file in self._rows.files(indices, draw)]
        return files if self._audio is None else files + self._audio.files(indices)

    @property
    def bytes_read(self) -> int:
        """Number of bytes read from shard files so far."""
        return self._rows.bytes_read + (0 if self._audio is None else self._audio.bytes_read)

    @property
    def split(self) -> str:
        """Split of the utterances."""
        return self._split

    @property
    def codecs(self) -> tuple[ColumnCodec, ...]:
        """Codecs of the columns that a batch has, in order."""
        return tuple(self._codecs)

    def read(self, indices: Sequence[int], draw: int | None, *, audio: bool = True) -> Batch:
        """Return a padded batch; see `TargetReader.read`.

        Args:
            indices, draw: As for `TargetReader.read`.
            audio: Whether to read the audio too. Without it the waveforms are (B, 0). Default True.

        Raises:
            CacheError: If the draw is not cached or a file is damaged.
            IndexError: If there are no indices, or one is out of range.
        """
        spec = self.cache.spec
        if not len(indices):
            raise IndexError(f"a batch needs an index; the split {self._split!r} has {len(self)} utterances")
        if draw is not None and not 0 <= draw < (self.draws or 0):
            present = f"draws 0 to {self.draws - 1}" if self.draws else "no draws"
            raise CacheError(f"mask draw {draw} is not in the cache at {self.cache.store.location}; it has {present}")
        if draw is None and spec.masks.draws and self.targets == "composite_only" and self._split == "train":
            raise CacheError(
                f"the cache at {self.cache.store.location} has no clean targets for the training split, because its targets "
                "are composite_only"
            )
        rows = list(self._pool.map(self._read_row, indices, [draw] * len(indices), [audio] * len(indices)))
        if self.read_ahead is not None:
            self.read_ahead.met(indices, draw)
        waveforms, lengths = pad_waveforms([waveform for waveform, *_ in rows])
        frames = torch.from_numpy(self.num_frames[list(indices)])
        width = int(frames.max())
        columns: list[tuple[ColumnCodec, Tensor]] = []
        for n, codec in enumerate(self._codecs):
            codes = torch.zeros(len(indices), width, codec.bytes_per_frame, dtype=torch.uint8)
            for b, (_, values, _) in enumerate(rows):
                codes[b, : len(values[n])] = torch.from_numpy(values[n])
            columns.append((codec, codes))
        frame_mask = None
        if draw is not None:
            frame_mask = torch.zeros(len(indices), width, dtype=torch.bool)
            for b, (_, _, mask) in enumerate(rows):
                assert mask is not None
                frame_mask[b, : len(mask)] = torch.from_numpy(mask)
        ids = [self.ids[i] for i in indices]
        return Batch(ids, waveforms, lengths, frames, CodedTargets(self.layers, tuple(columns)), frame_mask)

    def _read_row(
        self, index: int, draw: int | None, audio: bool = True
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
        """Return the (S,) waveform, the (T, bytes_per_frame) codes of each column and the (T,) mask of an utterance.

        Without ``audio`` the waveform is empty.
        """
        spec = self.cache.spec
        composite = self.targets == "composite_only" and draw is not None
        # The clean pass is not read where the targets are those of another pass.
        whole = composite or (self.targets == "masked_everywhere" and draw is not None)
        no_features = whole or 0 not in self._sets
        first: list[Any] = []
        waveform = np.zeros(0, np.float32)
        embedded = audio and self._audio is None
        if embedded or not no_features:
            extra = ["audio"] if embedded else []
            first = self._columns(index, "clean", None, 0, extra, [] if no_features else None)
        if self._audio is not None and audio:
            waveform = self._audio.waveform(index)
        elif embedded:
            waveform = decoded(self._rows, index, self._parts["clean", None, 0], first.pop(0))
        codes: list[np.ndarray] = []
        mask: np.ndarray | None = None
        count = int(self.num_frames[index])
        for number in self._sets:
            if whole:
                kind = "composite" if composite else "masked"
                mask_value, *values = self._columns(index, kind, draw, number, ["mask"], None)
                mask = self._mask(index, kind, draw, number, mask_value)
                codes += self._codes(index, kind, draw, number, values, count)
                continue
            clean = first if number == 0 else self._columns(index, "clean", None, number, [], None)
            arrays = self._codes(index, "clean", None, number, clean, count)
            if draw is not None and self.targets == "clean_only":
                mask = draw_mask(spec.masks.policy_of(draw), spec.masks.seed, draw, self.ids[index], count)
            elif draw is not None:
                mask_value, *values = self._columns(index, "masked", draw, number, ["mask"], None)
                mask = self._mask(index, "masked", draw, number, mask_value)
                unmasked = ~mask
                at_masked = self._parts["masked", draw, number].at_masked
                masked = self._codes(index, "masked", draw, number, values, count if at_masked else int(unmasked.sum()))
                arrays = [array.copy() for array in arrays]
                for array, whole_pass in zip(arrays, masked, strict=True):
                    array[unmasked] = whole_pass[unmasked] if at_masked else whole_pass
            codes += arrays
        return waveform, codes, mask

    def _mask(self, index: int, kind: str, draw: int | None, number: int, value: pa.ListScalar) -> np.ndarray:
        mask: np.ndarray = value.values.to_numpy(zero_copy_only=False)
        if mask.dtype != bool or len(mask) != self.num_frames[index]:
            raise self._damaged(index, (kind, draw, number), "a mask does not have the planned size")
        return mask

    def _codes(
        self, index: int, kind: str, draw: int | None, number: int, values: list[Any], frames: int
    ) -> list[np.ndarray]:
        arrays = []
        for codec, value in zip(self._sets[number], values, strict=True):
            data = np.frombuffer(value.as_buffer(), np.uint8)
            if len(data) != frames * codec.bytes_per_frame:
                reason = f"row {self._rows.utterances.row[index]} does not have the planned size"
                raise self._damaged(index, (kind, draw, number), reason)
            size = codec.bytes_per_frame
            arrays.append(data.reshape(size, frames).T if codec.planar else data.reshape(frames, size))
        return arrays

    def _columns(
        self, index: int, kind: str, draw: int | None, number: int, extra: list[str], features: list[str] | None
    ) -> list[Any]:
        """Return the values of one row: the extra columns, then the feature columns (default all of the layer set)."""
        if features is None:
            features = [column_name(codec.layers) for codec in self._sets[number]]
        return self._rows.values(index, self._parts[kind, draw, number], [*extra, *features])

    def _damaged(self, index: int, part: tuple[str, int | None, int], reason: str) -> CacheError:
        return self._rows.damaged(index, self._parts[part], reason)


def _source_rows(cache: Cache, split: str, rows: SplitRows, index: str | None) -> "SourceRows":
    # Decoding files of any format loads torchaudio, which other caches don't need.
    from ray_distill.teacher_cache.reading.source_rows import SourceRows

    return SourceRows(cache, split, rows, index)
