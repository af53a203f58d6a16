"""The plan of a cache: the shard and row of every utterance."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ray_distill.teacher_cache.frames import SAMPLE_RATE, num_frames
from ray_distill.teacher_cache.sources.address import AudioAddress


@dataclass(frozen=True)
class Utterance:
    """One utterance of a corpus, from the index to the cache.

    Attributes:
        id: Unique identifier within the corpus.
        path: Absolute path of the audio file, or the text of another `AudioAddress`.
        num_samples: Number of samples S, at 16 kHz.
        split: ``train`` or ``validation``.
        sha256: Identity of the audio from `load_identified_audio`, which shows whether the file changed since it was indexed. Earlier
            versions stored the SHA-256 of the waveform; see `is_earlier_hash`.
    """

    id: str
    path: str
    num_samples: int
    split: str
    sha256: str

    @property
    def address(self) -> AudioAddress:
        """Address of the audio."""
        return AudioAddress.parse(self.path)


def is_earlier_hash(recorded: str, identity: str) -> bool:
    """Return whether a record of an audio's identity is the hash of an earlier version, which can't be compared with the identity.

    Earlier versions hashed the waveform at 16 kHz. That hash depends on the machine for audio that was resampled or decoded with
    floats, whose identities have a prefix (``44100:`` or ``file:``).
    """
    return ":" not in recorded and ":" in identity


PLAN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("num_samples", pa.int64()),
        ("num_frames", pa.int64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)


def plan_shards(
    utterances: Sequence[Utterance], shard_seconds: float, num_frames: Callable[[int], int] = num_frames
) -> pa.Table:
    """Assign every utterance to a shard and a row in it. The result depends on the arguments only.

    Utterances of a split are sorted by the hash of their ids, so that every shard has a mix of speakers, and cut into shards of
    about ``shard_seconds``. A shard holds one split only. Rows of a shard are sorted from the longest to the shortest
    utterance, so that teacher batches need little padding.

    Args:
        utterances: Utterances of all splits.
        shard_seconds: Seconds of audio per shard.
        num_frames: The teacher's function from a number of samples to a number of frames. Default HuBERT's.

    Returns:
        A table with PLAN_SCHEMA, sorted by shard and row.
    """
    rows: list[tuple[int, int, Utterance]] = []
    shard = 0
    for split in sorted({utterance.split for utterance in utterances}):
        members = [utterance for utterance in utterances if utterance.split == split]
        members.sort(key=lambda utterance: hashlib.sha256(utterance.id.encode()).digest())
        group: list[Utterance] = []
        groups = [group]
        samples = 0
        for utterance in members:
            if group and samples + utterance.num_samples > shard_seconds * SAMPLE_RATE:
                group, samples = [], 0
                groups.append(group)
            group.append(utterance)
            samples += utterance.num_samples
        for group in groups:
            group.sort(key=lambda utterance: (-utterance.num_samples, utterance.id))
            rows += [(shard, row, utterance) for row, utterance in enumerate(group)]
            shard += 1
    columns = {
        "id": [u.id for *_, u in rows],
        "split": [u.split for *_, u in rows],
        "path": [u.path for *_, u in rows],
        "sha256": [u.sha256 for *_, u in rows],
        "num_samples": [u.num_samples for *_, u in rows],
        "num_frames": [num_frames(u.num_samples) for *_, u in rows],
        "shard": [s for s, *_ in rows],
        "row": [r for _, r, _ in rows],
    }
    return pa.table(columns, schema=PLAN_SCHEMA)


def shard_numbers(plan: pa.Table) -> list[int]:
    """Return the numbers of all shards of a plan, ascending."""
    return [int(shard) for shard in np.unique(plan["shard"].to_numpy())]


@dataclass(frozen=True)
class Shard:
    """One shard of a plan.

    Attributes:
        number: Number of the shard.
        split: Split of all its utterances.
        utterances: Utterances in the order of rows.
        num_frames: Number of frames of each utterance.
    """

    number: int
    split: str
    utterances: list[Utterance]
    num_frames: list[int]

    @property
    def seconds(self) -> float:
        """Seconds of audio."""
        return sum(u.num_samples for u in self.utterances) / SAMPLE_RATE


def shards_of(plan: pa.Table) -> list[Shard]:
    """Return the shards of a plan, sorted by number."""
    shards: list[Shard] = []
    for row in plan.to_pylist():
        if not shards or shards[-1].number != row["shard"]:
            shards.append(Shard(row["shard"], row["split"], [], []))
        shards[-1].utterances.append(Utterance(row["id"], row["path"], row["num_samples"], row["split"], row["sha256"]))
        shards[-1].num_frames.append(row["num_frames"])
    return shards


def with_sources(shards: Sequence[Shard], sources: Mapping[str, Utterance]) -> list[Shard]:
    """Return the shards with the paths and identities of audio files from another index of the same corpus, by utterance id.

    Other utterances keep theirs.
    """

    def moved(utterance: Utterance) -> Utterance:
        source = sources.get(utterance.id, utterance)
        return replace(utterance, path=source.path, sha256=source.sha256)

    return [replace(shard, utterances=[moved(utterance) for utterance in shard.utterances]) for shard in shards]
