"""Targets of several teachers for the same utterances, from one cache of each teacher."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import ColumnCodec
from ray_distill.teacher_cache.reading.read_ahead import SeveralReadAhead
from ray_distill.teacher_cache.reading.split_rows import TextColumn
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.shard_plan import PLAN_SCHEMA, different_audio
from ray_distill.teacher_cache.targets.domains import Weight, counted_domains, read_domains, without_weight
from ray_distill.teacher_cache.targets.student_frames import SplitReader
from ray_distill.teacher_cache.targets.target_batch import Batch, CodedTargets, SeveralTargets, SymbolLayout


@dataclass(frozen=True)
class TeacherTargets:
    """What batches have of one of several teachers.

    Attributes:
        name: Name of the teacher.
        layers: 1-based layers.
        dim: Width D of the teacher.
        symbols: Layout of discrete targets; None if the targets are features.
        domains: Domains for which its weight is positive; none if its weight is a number.
    """

    name: str
    layers: tuple[int, ...]
    dim: int
    symbols: SymbolLayout | None
    domains: tuple[str, ...] = ()


class SeveralCaches:
    """A `TargetReader` of one split of the caches of several teachers, in the order of the utterances' plan.

    The caches are made from the same audio with the same masks. They may lack different utterances, because their teachers failed
    on them or can't take their length. An utterance is read if any teacher has it, and `Batch.present` says which have it. Audio is
    read once, from the first cache that has the utterance. A teacher whose weight for the domain of an utterance is 0 is taken as
    one that lacks it, and its targets are not read.

    Args:
        readers: Reader of the split in each teacher's cache, by the teacher's name.
        weights: Weights that depend on the domain, by the teacher's name. Default: none.
        labels: File with the domains; see `read_domains`. Needed if there are such weights. Default: none.

    Attributes:
        readers: The readers, by the teacher's name.
        ids: Utterance ids.
        domains: Domain of each utterance; None unless a weight depends on it.
        teachers: What batches have of each teacher.
        num_samples, num_frames, draws: As for `TargetReader`.
        layers: Layers of all teachers, one after another.
        dim: Width of the first teacher.
        shards, prefers_window, batches_at_once: As for `CacheReader`. Shards are those of the first cache that has the utterance.
        needs_window: Whether the local copies have room for a part of all caches only.
        read_ahead: Fetching of the files of later batches; None if no cache has local copies.

    Raises:
        CacheError: Two caches differ in the masks, or in the length, the frames or the audio of an utterance; or a teacher has no
            weight for the domain of an utterance.
        ValueError: The file with the domains is damaged.
    """

    def __init__(
        self,
        readers: dict[str, SplitReader],
        weights: Mapping[str, Weight] | None = None,
        labels: Path | None = None,
    ) -> None:
        self.readers = readers
        weights = weights or {}
        self.teachers = tuple(
            TeacherTargets(name, reader.layers, reader.dim, reader.symbols, counted_domains(weights.get(name, 1.0)))
            for name, reader in readers.items()
        )
        self.layers = tuple(layer for teacher in self.teachers for layer in teacher.layers)
        self.dim = self.teachers[0].dim
        self.batches_at_once = max(reader.batches_at_once for reader in readers.values())
        self.draws = self._common_draws()
        self.ids = self._planned_ids()
        # (N, K) row of each utterance in each teacher's reader; -1 where the teacher lacks it.
        self._rows = np.stack([self.ids.places_in(reader.ids) for reader in readers.values()], axis=1)
        if not (found := (self._rows >= 0).any(1)).all():
            self.ids, self._rows = self.ids.take(np.flatnonzero(found)), self._rows[found]
        self.num_samples = self._common_values("samples", [reader.num_samples for reader in readers.values()])
        self.num_frames = self._common_values("frames", [reader.num_frames for reader in readers.values()])
        self._check_audio()
        self.domains = self._leave_out_domains(weights, labels) if weights else None
        self.shards = self._all_shards()
        self.prefers_window = any(reader.prefers_window for reader in readers.values())
        self.needs_window = sum(reader.local_share for reader in readers.values()) > 1
        aheads = [reader.read_ahead for reader in readers.values()]
        self.read_ahead = SeveralReadAhead(aheads, self._rows_read) if any(aheads) else None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SeveralCaches({self.readers!r})"

    @property
    def bytes_read(self) -> int:
        """Number of bytes read from all caches so far."""
        return sum(reader.bytes_read for reader in self.readers.values())

    @property
    def codecs(self) -> tuple[tuple[ColumnCodec, ...], ...]:
        """Codecs of the columns of each teacher."""
        return tuple(reader.codecs for reader in self.readers.values())

    def _common_draws(self) -> int | None:
        """Return the number of draws, after checking that all caches have the same masks."""
        (first, reader), *others = self.readers.items()
        masks = reader.cache.spec.masks
        policies = [masks.policy_of(draw) for draw in range(reader.draws or 0)]
        for name, other in others:
            theirs = other.cache.spec.masks
            same_draws = other.draws == reader.draws and (not policies or theirs.seed == masks.seed)
            if not same_draws or policies != [theirs.policy_of(draw) for draw in range(other.draws or 0)]:
                raise CacheError(
                    f"the caches of the teachers {first} and {name} ({reader.cache.store.location} and "
                    f"{other.cache.store.location}) have other mask draws, but an utterance has one mask for the student and all "
                    "teachers; build one of them again, in another place, with the policy, seed and draws of the section masks"
                )
        return reader.draws

    def _planned_ids(self) -> TextColumn:
        """Return the ids of the split in the order of the largest plan, then those of the other plans.

        Utterances on which a teacher failed are in its plan, so they do not change the order of the others.
        """
        ids, *others = sorted((reader.planned_ids for reader in self.readers.values()), key=len, reverse=True)
        for plan in others:
            if len(new := np.flatnonzero(plan.places_in(ids) < 0)):
                ids = ids.joined(plan.take(new))
        return ids

    def _common_values(self, what: str, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return the number of samples or frames (N,) of each utterance, which must be equal for all teachers that have it."""
        common = np.zeros(len(self.ids), np.int64)
        known = [np.flatnonzero(rows >= 0) for rows in self._rows.T]
        for k, places in enumerate(known):
            common[places] = np.maximum(common[places], values[k][self._rows[places, k]])
        for k, places in enumerate(known):
            wrong = places[values[k][self._rows[places, k]] != common[places]]
            if len(wrong):
                row = int(wrong[0])
                found = {
                    name: int(values[k][self._rows[row, k]])
                    for k, name in enumerate(self.readers)
                    if self._rows[row, k] >= 0
                }
                teacher, other = list(self.readers)[k], max(found, key=lambda name: found[name])
                advice = (
                    "patches of a spectrogram are not mapped to frames, so either all teachers of a run have the same patches, or "
                    "none has patches"
                    if what == "frames"
                    else "build one of the caches again from the same corpus"
                )
                raise CacheError(
                    f"utterance {self.ids[row]} has {found[teacher]} {what} in the cache of teacher {teacher}, but "
                    f"{found[other]} in that of {other}; {advice}"
                )
        return common

    def _check_audio(self) -> None:
        """Raise CacheError if two caches know an utterance by different audio."""
        names: dict[str, str] = {}
        for name, reader in self.readers.items():
            names.setdefault(reader.cache.record["plan"], name)
        if len(names) == 1:
            return
        plans = {name: self.readers[name].cache.plan_columns(PLAN_SCHEMA.names) for name in names.values()}
        for (first, plan), (name, other) in itertools.combinations(plans.items(), 2):
            # Hashes of earlier versions depend on the machine; the cache stage has compared their audio.
            if (lost := different_audio(plan, other)) is not None:
                raise CacheError(
                    f"the caches of the teachers {first} and {name} have different audio for utterance {lost}; "
                    "build one of them again from the same corpus"
                )

    def _leave_out_domains(self, weights: Mapping[str, Weight], labels: Path | None) -> list[str]:
        """Leave out for each teacher the utterances of domains that it has no weight for, and return the domains of the others."""
        assert labels is not None, "weights by domain need the domains"
        domains = read_domains(labels, self.ids)
        if (problem := without_weight(weights, self.ids, domains)) is not None:
            raise CacheError(problem)
        for k, teacher in enumerate(self.teachers):
            if isinstance(weights.get(teacher.name), dict):
                self._rows[[domain not in teacher.domains for domain in domains], k] = -1
        kept = np.flatnonzero((self._rows >= 0).any(1))
        if not len(kept):
            raise CacheError(
                f"no utterance has a domain for which a teacher has a weight; they are {', '.join(set(domains))}"
            )
        self.ids = self.ids.take(kept)
        self._rows, self.num_samples, self.num_frames = self._rows[kept], self.num_samples[kept], self.num_frames[kept]
        return [domains[row] for row in kept]

    def _all_shards(self) -> np.ndarray:
        """Return the (N,) shards of the first cache that has each utterance, numbered apart for each cache."""
        shards, first = np.zeros(len(self.ids), np.int64), (self._rows >= 0).argmax(1)
        offset = 0
        for k, reader in enumerate(self.readers.values()):
            shards[first == k] = offset + reader.shards[self._rows[first == k, k]]
            offset += int(reader.shards.max()) + 1
        return shards

    def reads(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray, list[int], bool]]:
        """Yield what is read for a batch, teacher after teacher.

        Yields:
            The teacher's number, the members (M,) of the batch, their rows in the teacher's reader, and whether their audio is read.
        """
        rows = self._rows[list(indices)]
        heard = np.zeros(len(rows), bool)
        for k in range(len(self.readers)):
            # Utterances whose audio is already read come second.
            for audio in (True, False):
                members = np.flatnonzero((rows[:, k] >= 0) & (heard != audio))
                if len(members):
                    yield k, members, rows[members, k].tolist(), audio
            heard |= rows[:, k] >= 0

    def _rows_read(self, indices: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield the teacher's number and the rows in its reader of each read for a batch."""
        return ((k, rows) for k, _, rows, _ in self.reads(indices))

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See `TargetReader.read`. Targets are `SeveralTargets`."""
        rows = self._rows[list(indices)]
        lengths, frames = (torch.from_numpy(values[list(indices)]) for values in (self.num_samples, self.num_frames))
        count = int(frames.max())
        waveforms = torch.zeros(len(rows), int(lengths.max()))
        frame_mask = None if draw is None else torch.zeros(len(rows), count, dtype=torch.bool)
        names, readers = list(self.readers), list(self.readers.values())
        codes: list[list[Tensor]] = [[] for _ in readers]
        merged = [1] * len(readers)
        for k, members, some_rows, audio in self.reads(indices):
            batch = readers[k].read(some_rows, draw, audio=audio)
            _place(waveforms, members, batch.waveforms)
            assert isinstance(batch.coded, CodedTargets)
            merged[k] = batch.coded.parts
            columns = [some for _, some in batch.coded.columns]
            codes[k] = codes[k] or [some.new_zeros(len(rows), count, some.shape[2]) for some in columns]
            for whole, some in zip(codes[k], columns, strict=True):
                _place(whole, members, some)
            if frame_mask is not None:
                assert batch.frame_mask is not None
                if not audio and not torch.equal(frame_mask[members, : batch.frame_mask.shape[1]], batch.frame_mask):
                    raise CacheError(
                        f"the cache of teacher {names[k]} has other masks than those of the teachers before it"
                    )
                _place(frame_mask, members, batch.frame_mask)
        parts = []
        for k, reader in enumerate(readers):
            sizes = [codec.bytes_per_frame for codec in reader.codecs]
            found = codes[k] or [torch.zeros(len(rows), count, size, dtype=torch.uint8) for size in sizes]
            parts.append(CodedTargets(reader.layers, tuple(zip(reader.codecs, found, strict=True)), merged[k]))
        return Batch(
            [self.ids[index] for index in indices],
            waveforms,
            lengths,
            frames,
            SeveralTargets(tuple(parts)),
            frame_mask,
            torch.from_numpy(rows >= 0),
            None if self.domains is None else tuple(self.domains[index] for index in indices),
        )


def _place(whole: Tensor, members: np.ndarray, rows: Tensor) -> None:
    """Write some rows (M, S, ...) of a batch into the beginnings of the rows ``members`` of another (B, S', ...)."""
    if rows.shape[1]:
        whole[torch.from_numpy(members), : rows.shape[1]] = rows


def loss_names(reader: object) -> list[str]:
    """Return the names of the losses of several teachers: each one's, and ``NAME.DOMAIN`` where its weight depends on the domain."""
    teachers: tuple[TeacherTargets, ...] = getattr(reader, "teachers", ())
    return [
        name
        for teacher in teachers
        for name in (teacher.name, *(f"{teacher.name}.{domain}" for domain in teacher.domains))
    ]


def layer_names(reader: object, layers: Sequence[int]) -> list[str]:
    """Return the name of each layer in a row of metrics: its number, after the name of its teacher if there are several."""
    teachers: tuple[TeacherTargets, ...] = getattr(reader, "teachers", ())
    if not teachers:
        return [f"{layer:02d}" for layer in layers]
    return [f"{teacher.name}_{layer:02d}" for teacher in teachers for layer in teacher.layers]
