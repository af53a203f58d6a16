"""The plan of a cache: the shard and row of every utterance. Utterances are rows of Arrow tables, and become objects one by one."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.teacher_cache.frames import SAMPLE_RATE, num_frames
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.storage.shard_assignment import assign_shards, count_frames


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


UTTERANCE_SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("path", pa.large_string()),
        ("num_samples", pa.int64()),
        ("split", pa.dictionary(pa.int32(), pa.string())),
        ("sha256", pa.large_string()),
    ]
)
"""Columns of `Utterances` in memory. Large strings have no limit of 2 GB in a column."""
_FIELDS = UTTERANCE_SCHEMA.names
_PLAIN = pa.schema([(name, pa.int64() if name == "num_samples" else pa.large_string()) for name in _FIELDS])
_FEW = 1024
"""Number of utterances up to which all become objects, and stay, when one is asked for. A shard has so few."""
_BATCH = 4096
"""Number of utterances that are objects at a time while all are iterated over."""
_COMPARED = 1 << 16
"""Number of texts that are compared at a time."""


class Utterances(Sequence[Utterance]):
    """Utterances as rows of an Arrow table. An `Utterance` is made only when it is asked for.

    Args:
        table: A table with the columns of UTTERANCE_SCHEMA, and any others.

    Attributes:
        table: The table.

    Example:
        >>> utterances = Utterances.of([Utterance("a", "/data/a.flac", 16_000, "train", "")])
        >>> utterances[0].id, utterances.num_samples.sum()
        ('a', 16000)
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, utterances: Iterable[Utterance]) -> "Utterances":
        """Return utterances as a table, or as they are if they are one already."""
        if isinstance(utterances, Utterances):
            return utterances
        batches = []
        rows = iter(utterances)
        while batch := [astuple(utterance) for utterance in itertools.islice(rows, _BATCH)]:
            columns = dict(zip(_FIELDS, zip(*batch, strict=True), strict=True))
            batches.append(pa.table(columns).cast(UTTERANCE_SCHEMA))
        return cls(pa.concat_tables([*batches, UTTERANCE_SCHEMA.empty_table()]).unify_dictionaries().combine_chunks())

    @property
    def num_samples(self) -> np.ndarray:
        """(N,) int64 numbers of samples."""
        samples: np.ndarray = self.table["num_samples"].to_numpy()
        return samples

    @property
    def seconds(self) -> float:
        """Duration of all utterances, in seconds."""
        return int(self.num_samples.sum()) / SAMPLE_RATE

    def texts(self, name: str) -> pa.LargeStringArray:
        """Return a column as one array of texts."""
        column = self.table[name].cast(pa.large_string())
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    @property
    def splits(self) -> tuple[list[str], np.ndarray]:
        """The names of the splits, and the (N,) position among them of each utterance's split."""
        column = self.table["split"]
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        column = column.unify_dictionaries().combine_chunks()
        column = column if isinstance(column, pa.DictionaryArray) else column.chunk(0)
        return column.dictionary.to_pylist(), column.indices.to_numpy()

    def ids(self) -> Iterator[str]:
        """Yield the ids."""
        for begin in range(0, len(self), _BATCH):
            yield from self.table["id"].slice(begin, _BATCH).cast(pa.large_string()).to_pylist()

    def of_split(self, split: str) -> "Utterances":
        """Return the utterances of a split."""
        return Utterances(self.table.filter(pc.equal(self.table["split"], split)))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> "Utterances": ...
    def __getitem__(self, index: int | slice) -> "Utterance | Utterances":
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step == 1:
                return Utterances(self.table.slice(begin, max(0, end - begin)))
            return Utterances(self.table.take(pa.array(range(begin, end, step), pa.int64())))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        if len(self) <= _FEW:
            return self._few[index]
        return Utterance(*(self.table[name][index % len(self)].as_py() for name in _FIELDS))

    @cached_property
    def _few(self) -> list[Utterance]:
        return list(self)

    def __iter__(self) -> Iterator[Utterance]:
        for begin in range(0, len(self), _BATCH):
            # Values of a dictionary are slow to get.
            batch = self.table.select(_FIELDS).slice(begin, _BATCH).cast(_PLAIN)
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield Utterance(*row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Utterance.__eq__, self, other))

    def __repr__(self) -> str:
        return f"Utterances({len(self):,} of {self.seconds / 3600:.2f} h)"


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
PLAN_ROWS = 1 << 20
"""Number of rows of a plan that are plain at a time, which is that of Parquet's row groups."""


def plan_shards(
    utterances: Iterable[Utterance], shard_seconds: float, num_frames: Callable[[int], int] = num_frames
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
        A table with the columns of PLAN_SCHEMA, sorted by shard and row. Its texts are dictionary columns, which share the memory of
        ``utterances`` if those are a table; `plain_rows` gives PLAN_SCHEMA.
    """
    members = Utterances.of(utterances)
    names, codes = members.splits
    samples = members.num_samples
    limit = math.floor(min(shard_seconds * SAMPLE_RATE, 2.0**61))
    order, sizes = assign_shards(members.texts("id"), names, codes, samples, limit)
    places, samples = pa.array(order, pa.int32()), samples[order]
    rows = np.arange(len(order), dtype=np.int32)
    rows -= np.repeat((np.cumsum(sizes) - sizes).astype(np.int32), sizes)
    columns = {name: pa.DictionaryArray.from_arrays(places, members.texts(name)) for name in ("id", "path", "sha256")}
    columns |= {
        "split": pa.DictionaryArray.from_arrays(pa.array(codes[order], pa.int32()), pa.array(names, pa.string())),
        "num_samples": pa.array(samples, pa.int64()),
        "num_frames": pa.array(count_frames(samples, num_frames), pa.int64()),
        "shard": pa.array(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), pa.int32()),
        "row": pa.array(rows, pa.int32()),
    }
    return pa.table({name: columns[name] for name in PLAN_SCHEMA.names})


def default_shard_seconds(seconds: float) -> float:
    """Return the default seconds of audio per shard for the seconds of a corpus.

    They are ten minutes, and for more than 1,000 h as many whole minutes as give 6,000 shards, but at most an hour, whose
    waveforms take 230 MB of memory.
    """
    return 60.0 * min(60, max(10, round(seconds / 60 / 6000)))


def plain_rows(plan: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows of a plan as tables with PLAN_SCHEMA, each of at most PLAN_ROWS rows."""
    for begin in range(0, plan.num_rows, PLAN_ROWS):
        yield plan.slice(begin, PLAN_ROWS).cast(PLAN_SCHEMA)


def shard_numbers(plan: pa.Table) -> list[int]:
    """Return the numbers of all shards of a plan, ascending."""
    shards = plan["shard"].to_numpy()
    return [int(shard) for shard in shards[first_rows(shards)]]


def first_rows(shards: np.ndarray) -> np.ndarray:
    """Return the (K,) int64 position of the first row of each shard, from the (N,) ascending numbers of the rows' shards."""
    changes = np.flatnonzero(shards[1:] != shards[:-1]) + 1
    return np.concatenate([np.zeros(min(1, len(shards)), np.int64), changes])


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
    utterances: Utterances
    num_frames: list[int]

    @property
    def seconds(self) -> float:
        """Seconds of audio."""
        return self.utterances.seconds


class Shards(Sequence[Shard]):
    """The shards of a plan, sorted by number. A `Shard` is made only when it is asked for.

    Args:
        plan: A table with the columns of PLAN_SCHEMA, sorted by shard and row.

    Attributes:
        plan: The table.
        numbers: (K,) numbers of the K shards, ascending.
    """

    def __init__(self, plan: pa.Table) -> None:
        self.plan = plan
        shards = plan["shard"].to_numpy()
        starts = first_rows(shards)
        self.numbers: np.ndarray = shards[starts]
        self._bounds = np.append(starts, len(shards)).tolist()

    @cached_property
    def splits(self) -> tuple[list[str], np.ndarray]:
        """The names of the splits, and the (K,) position among them of each shard's split."""
        names, codes = Utterances(self.plan).splits
        return names, codes[self._bounds[:-1]]

    @cached_property
    def _num_frames(self) -> np.ndarray:
        frames: np.ndarray = self.plan["num_frames"].to_numpy()
        return frames

    def numbered(self, number: int) -> Shard:
        """Return the shard with a number. KeyError if there is none."""
        position = int(np.searchsorted(self.numbers, number))
        if position == len(self) or self.numbers[position] != number:
            raise KeyError(number)
        return self[position]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = index % len(self)
        begin, end = self._bounds[position], self._bounds[position + 1]
        names, codes = self.splits
        return Shard(
            int(self.numbers[position]),
            names[codes[position]],
            Utterances(self.plan.slice(begin, end - begin)),
            self._num_frames[begin:end].tolist(),
        )


def with_sources(plan: pa.Table, sources: pa.Table) -> pa.Table:
    """Return a plan with the paths and identities of audio files from another table of the same corpus, by utterance id.

    Other utterances keep theirs.

    Args:
        plan: A table with the columns of PLAN_SCHEMA.
        sources: A table with the columns ``id``, ``path`` and ``sha256``.
    """
    if plan is sources:
        return plan
    if plan.num_rows == sources.num_rows and _equal(plan["id"], sources["id"]):
        for name in ("path", "sha256"):
            plan = plan.set_column(plan.schema.get_field_index(name), name, sources[name])
        return plan
    found = {name: Utterances(sources).texts(name) for name in ("id", "path", "sha256")}
    pieces = []
    for rows in plain_rows(plan):
        places = pc.index_in(rows["id"].cast(pa.large_string()), value_set=found["id"])
        for name in ("path", "sha256"):
            values = pc.coalesce(found[name].take(places.combine_chunks()), rows[name].cast(pa.large_string()))
            rows = rows.set_column(rows.schema.get_field_index(name), name, values)
        pieces.append(rows)
    return pa.concat_tables(pieces) if pieces else plan


def different_audio(plan: pa.Table, other: pa.Table) -> str | None:
    """Return the id of the first utterance for which two plans have different audio; None if there is none.

    Hashes of earlier versions are not compared with the identities of this one; see `is_earlier_hash`.
    """
    mine, theirs = ({name: Utterances(table).texts(name) for name in ("id", "sha256")} for table in (plan, other))
    places = pc.index_in(mine["id"], value_set=theirs["id"])
    for begin in range(0, len(places), _COMPARED):
        one, two = (
            mine["sha256"].slice(begin, _COMPARED),
            theirs["sha256"].take(places.slice(begin, _COMPARED)),
        )
        comparable = pc.equal(pc.match_substring(one, ":"), pc.match_substring(two, ":"))
        wrong = pc.index(pc.and_(comparable, pc.not_equal(one, two)), True).as_py()
        if wrong >= 0:
            found: str = mine["id"][begin + wrong].as_py()
            return found
    return None


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Return whether two columns of texts are equal, of which each may be plain or a dictionary."""
    return all(
        one.slice(begin, _COMPARED)
        .cast(pa.large_string())
        .equals(other.slice(begin, _COMPARED).cast(pa.large_string()))
        for begin in range(0, len(one), _COMPARED)
    )
