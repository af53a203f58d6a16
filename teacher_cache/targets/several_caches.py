"""Targets of several teachers for the same utterances, from one cache of each teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import ColumnCodec
from ray_distill.teacher_cache.storage.cache_spec import CacheError
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
    """

    name: str
    layers: tuple[int, ...]
    dim: int
    symbols: SymbolLayout | None


class SeveralCaches:
    """A `TargetReader` of one split of the caches of several teachers, in the order of the utterances' plan.

    The caches are made from the same audio with the same masks. They may lack different utterances, because their teachers failed
    on them or can't take their length. An utterance is read if any teacher has it, and `Batch.present` says which have it. Audio is
    read once, from the first cache that has the utterance.

    Args:
        readers: Reader of the split in each teacher's cache, by the teacher's name.

    Attributes:
        ids: Utterance ids.
        teachers: What batches have of each teacher.
        num_samples, num_frames, draws: As for `TargetReader`.
        layers: Layers of all teachers, one after another.
        dim: Width of the first teacher.
        batches_at_once: As for `CacheReader`.

    Raises:
        CacheError: Two caches differ in the masks, or in the length, the frames or the audio of an utterance.
    """

    def __init__(self, readers: dict[str, SplitReader]) -> None:
        self._readers = readers
        self.teachers = tuple(
            TeacherTargets(name, reader.layers, reader.dim, reader.symbols) for name, reader in readers.items()
        )
        self.layers = tuple(layer for teacher in self.teachers for layer in teacher.layers)
        self.dim = self.teachers[0].dim
        self.batches_at_once = max(reader.batches_at_once for reader in readers.values())
        self.draws = self._common_draws()
        rows = [{name: row for row, name in enumerate(reader.ids)} for reader in readers.values()]
        self.ids = [name for name in self._planned_ids() if any(name in known for known in rows)]
        # (N, K) row of each utterance in each teacher's reader; -1 where the teacher lacks it.
        self._rows = np.array([[known.get(name, -1) for known in rows] for name in self.ids])
        self.num_samples = self._common_values("samples", [reader.num_samples for reader in readers.values()])
        self.num_frames = self._common_values("frames", [reader.num_frames for reader in readers.values()])
        self._check_audio()

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SeveralCaches({self._readers!r})"

    @property
    def bytes_read(self) -> int:
        """Number of bytes read from all caches so far."""
        return sum(reader.bytes_read for reader in self._readers.values())

    @property
    def codecs(self) -> tuple[tuple[ColumnCodec, ...], ...]:
        """Codecs of the columns of each teacher."""
        return tuple(reader.codecs for reader in self._readers.values())

    def _common_draws(self) -> int | None:
        """Return the number of draws, after checking that all caches have the same masks."""
        (first, reader), *others = self._readers.items()
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

    def _planned_ids(self) -> list[str]:
        """Return the ids of the split in the order of the largest plan, then those of the other plans.

        Utterances on which a teacher failed are in its plan, so they do not change the order of the others.
        """
        plans = [
            [
                utterance.id
                for shard in reader.cache.shards
                if shard.split == reader.split
                for utterance in shard.utterances
            ]
            for reader in self._readers.values()
        ]
        return list(dict.fromkeys(name for plan in sorted(plans, key=len, reverse=True) for name in plan))

    def _common_values(self, what: str, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return the number of samples or frames (N,) of each utterance, which must be equal for all teachers that have it."""
        table = np.stack(
            [np.where(rows < 0, -1, values[k][rows]) for k, rows in enumerate(self._rows.T)], axis=1
        )  # (N, K)
        common: np.ndarray = table.max(1)
        wrong = np.argwhere((table != common[:, None]) & (self._rows >= 0))
        if len(wrong):
            row, teacher = wrong[0]
            other = int(table[row].argmax())
            names = [part.name for part in self.teachers]
            advice = (
                "patches of a spectrogram are not mapped to frames, so either all teachers of a run have the same patches, or "
                "none has patches"
                if what == "frames"
                else "build one of the caches again from the same corpus"
            )
            raise CacheError(
                f"utterance {self.ids[row]} has {table[row, teacher]} {what} in the cache of teacher {names[teacher]}, but "
                f"{common[row]} in that of {names[other]}; {advice}"
            )
        return common

    def _check_audio(self) -> None:
        """Raise CacheError if two caches know an utterance by different audio."""
        known: dict[str, tuple[str, str]] = {}
        for name, reader in self._readers.items():
            for shard in reader.cache.shards:
                for utterance in shard.utterances:
                    first, identity = known.setdefault(utterance.id, (name, utterance.sha256))
                    # Hashes of earlier versions depend on the machine; the cache stage has compared their audio.
                    if identity != utterance.sha256 and (":" in identity) == (":" in utterance.sha256):
                        raise CacheError(
                            f"the caches of the teachers {first} and {name} have different audio for utterance {utterance.id}; "
                            "build one of them again from the same corpus"
                        )

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See `TargetReader.read`. Targets are `SeveralTargets`."""
        rows = self._rows[list(indices)]
        lengths, frames = (torch.from_numpy(values[list(indices)]) for values in (self.num_samples, self.num_frames))
        count = int(frames.max())
        waveforms = torch.zeros(len(rows), int(lengths.max()))
        frame_mask = None if draw is None else torch.zeros(len(rows), count, dtype=torch.bool)
        heard = np.zeros(len(rows), bool)
        parts = []
        for k, (name, reader) in enumerate(self._readers.items()):
            codes: list[Tensor] = []
            merged = 1
            # Utterances whose audio is already read come second.
            for audio in (True, False):
                members = np.flatnonzero((rows[:, k] >= 0) & (heard != audio))
                if not len(members):
                    continue
                batch = reader.read(rows[members, k].tolist(), draw, audio=audio)
                _place(waveforms, members, batch.waveforms)
                assert isinstance(batch.coded, CodedTargets)
                merged = batch.coded.parts
                codes = codes or [some.new_zeros(len(rows), count, some.shape[2]) for _, some in batch.coded.columns]
                for whole, (_, some) in zip(codes, batch.coded.columns, strict=True):
                    _place(whole, members, some)
                if frame_mask is not None:
                    assert batch.frame_mask is not None
                    if not audio and not torch.equal(
                        frame_mask[members, : batch.frame_mask.shape[1]], batch.frame_mask
                    ):
                        raise CacheError(
                            f"the cache of teacher {name} has other masks than those of the teachers before it"
                        )
                    _place(frame_mask, members, batch.frame_mask)
            heard |= rows[:, k] >= 0
            codes = codes or [
                torch.zeros(len(rows), count, c.bytes_per_frame, dtype=torch.uint8) for c in reader.codecs
            ]
            parts.append(CodedTargets(reader.layers, tuple(zip(reader.codecs, codes, strict=True)), merged))
        return Batch(
            [self.ids[index] for index in indices],
            waveforms,
            lengths,
            frames,
            SeveralTargets(tuple(parts)),
            frame_mask,
            torch.from_numpy(rows >= 0),
        )


def _place(whole: Tensor, members: np.ndarray, rows: Tensor) -> None:
    """Write some rows (M, S, ...) of a batch into the beginnings of the rows ``members`` of another (B, S', ...)."""
    if rows.shape[1]:
        whole[torch.from_numpy(members), : rows.shape[1]] = rows


def layer_names(reader: object, layers: Sequence[int]) -> list[str]:
    """Return the name of each layer in a row of metrics: its number, after the name of its teacher if there are several."""
    teachers: tuple[TeacherTargets, ...] = getattr(reader, "teachers", ())
    if not teachers:
        return [f"{layer:02d}" for layer in layers]
    return [f"{teacher.name}_{layer:02d}" for teacher in teachers for layer in teacher.layers]
