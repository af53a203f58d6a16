"""What the search of a corpus finds: the audio to decode, and what can't be used."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.teacher_cache.sources.address import AudioAddress, Channel


@dataclass(frozen=True)
class Skipped:
    """A file or folder that isn't used.

    Attributes:
        path: Path of the file or folder.
        reason: ``undecodable``, ``empty``, ``too_short``, ``too_long``, ``missing``, ``no_channel``, ``outside``, ``duplicate_id``,
            ``no_split``, ``unused_split``, ``unsupported_format``, ``bad_name``, ``hidden`` or ``unreadable_folder``.
        message: The reason as a sentence.
    """

    path: Path
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file, or audio inside a file, or a piece of it, that was found but not decoded yet.

    Attributes:
        id: ID of the utterance.
        path: Path of the file.
        split: Name of a split of the corpus. None if the corpus has no splits.
        origin: Where the split's name came from, such as ``folder LibriSpeech/dev-clean``. Default: nowhere.
        role: ``train`` or ``validation``, after `assign_splits`. None if the corpus has no splits.
        start: Beginning of the piece in seconds. Default: None, the first sample.
        end: End of the piece in seconds. Default: None, the end of the audio.
        channel: Channel to use. Default: None, which leaves it to ``corpus.channel``.
        speaker: Speaker, if the corpus names one. Default: empty.
        text: Transcript, if the corpus has one. Default: empty.
        domain: Domain, such as ``speech``, if the corpus names one. Default: empty.
        inside: Address of the audio inside the file. Default: None, the file is the audio.
    """

    id: str
    path: Path
    split: str | None
    origin: str = ""
    role: str | None = None
    start: float | None = None
    end: float | None = None
    channel: Channel | None = None
    speaker: str = ""
    text: str = ""
    inside: AudioAddress | None = None
    domain: str = ""

    @property
    def address(self) -> AudioAddress:
        """Address of the audio, without the piece, whose bounds in samples depend on the audio's rate."""
        return replace(self.inside or AudioAddress(str(self.path)), channel=self.channel)


_LABELS = pa.dictionary(pa.int32(), pa.string())
FOUND_SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("path", pa.large_string()),
        ("split", _LABELS),
        ("origin", _LABELS),
        ("role", _LABELS),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("channel", _LABELS),
        ("speaker", pa.large_string()),
        ("text", pa.large_string()),
        ("inside", pa.large_string()),
        ("domain", _LABELS),
    ]
)
"""Columns of `FoundFiles`. Channels and addresses are texts. A column may have the type null instead if it has no values."""
_BATCH = 4096
"""Number of rows that are Python objects at a time."""


class FoundFiles(Sequence[FoundFile]):
    """What was found, as rows of an Arrow table. A `FoundFile` is made only when it is asked for.

    Args:
        table: A table with the columns of FOUND_SCHEMA. An empty speaker, text or domain may also be null.

    Attributes:
        table: The table.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, found: Sequence[FoundFile]) -> "FoundFiles":
        """Return what was found as a table, or as it is if it is one already.

        Raises:
            ValueError: A path is not valid UTF-8.
        """
        if isinstance(found, FoundFiles):
            return found
        columns: dict[str, Any] = {name: [getattr(entry, name) for entry in found] for name in FOUND_SCHEMA.names}
        columns["path"] = [str(path) for path in columns["path"]]
        columns["channel"] = [None if channel is None else str(channel) for channel in columns["channel"]]
        columns["inside"] = [None if address is None else address.encode() for address in columns["inside"]]
        try:
            arrays = [pa.array(columns[field.name], field.type) for field in FOUND_SCHEMA]
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object!r} is not valid UTF-8; rename the file or folder") from error
        return cls(pa.table(arrays, FOUND_SCHEMA))

    def texts(self, name: str) -> pa.LargeStringArray:
        """Return a column of texts as one array, with null where there is no value."""
        column = self.table[name].cast(pa.large_string())
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def rows(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield the values of some columns, row by row, as plain Python values."""
        table = self.table.select(names)
        for begin in range(0, len(self), _BATCH):
            batch = table.slice(begin, _BATCH)
            yield from zip(*(_plain(column) for column in batch.columns), strict=True)

    def take(self, positions: np.ndarray) -> "FoundFiles":
        """Return the rows at these positions."""
        return FoundFiles(self.table.take(pa.array(positions)))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> FoundFile: ...
    @overload
    def __getitem__(self, index: slice) -> "FoundFiles": ...
    def __getitem__(self, index: int | slice) -> "FoundFile | FoundFiles":
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(iter(FoundFiles(self.table.slice(index % len(self), 1))))

    def __iter__(self) -> Iterator[FoundFile]:
        rows = self.rows(*FOUND_SCHEMA.names)
        for id, path, split, origin, role, start, end, channel, speaker, text, inside, domain in rows:
            yield FoundFile(
                id=id,
                path=Path(path),
                split=split,
                origin=origin or "",
                role=role,
                start=start,
                end=end,
                channel=channel_of(channel),
                speaker=speaker or "",
                text=text or "",
                inside=None if inside is None else AudioAddress.parse(inside),
                domain=domain or "",
            )


def channel_of(text: str | None) -> Channel | None:
    """Return a channel from its text in a table."""
    return "mix" if text == "mix" else None if text is None else int(text)


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column. Those of a dictionary are slow to get."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values: list[Any] = column.to_pylist()
    return values


SKIPPED_SCHEMA = pa.schema([("path", pa.large_binary()), ("reason", _LABELS), ("message", pa.large_binary())])
"""Columns of `SkippedFiles`. Paths and messages are bytes, since names of files need not be UTF-8; see `encoded`."""
_SKIPPED_ROWS = 1 << 16
"""Number of rows of skipped files of which there are several copies at a time."""
_UNUSUAL_PATH = r"(?s)^$|//|(^|/)\.(/|$)|.+/$"
"""Texts that may be others than those of their paths."""


class SkippedFiles(Sequence[Skipped]):
    """What isn't used, as rows of an Arrow table. A `Skipped` is made only when it is asked for, or where a format reports one.

    Args:
        table: A table with the schema SKIPPED_SCHEMA, and with paths as `pathlib` writes them. Default: no rows.
    """

    def __init__(self, table: pa.Table | None = None) -> None:
        self._tables = [SKIPPED_SCHEMA.empty_table() if table is None else table]
        self._rows: list[tuple[bytes, str, bytes]] = []

    @classmethod
    def of(cls, skipped: Iterable[Skipped]) -> "SkippedFiles":
        """Return skipped files as a table, or as they are if they are in one already."""
        if isinstance(skipped, SkippedFiles):
            return skipped
        made = cls()
        made.extend(skipped)
        return made

    @classmethod
    def of_columns(cls, paths: pa.ChunkedArray, reasons: pa.ChunkedArray, messages: pa.ChunkedArray) -> "SkippedFiles":
        """Return skipped files from columns of texts. Paths may be written in any way."""
        chunks = [_as_pathlib(chunk) for chunk in _chunks(paths.cast(pa.large_binary()))]
        columns = [pa.chunked_array(chunks, pa.large_binary()), reasons, messages]
        return cls(
            pa.table(
                [column.cast(field.type) for column, field in zip(columns, SKIPPED_SCHEMA, strict=True)], SKIPPED_SCHEMA
            )
        )

    @property
    def table(self) -> pa.Table:
        """The rows, with the schema SKIPPED_SCHEMA."""
        self._pack()
        if len(self._tables) > 1:
            self._tables = [pa.concat_tables(self._tables)]
        return self._tables[0]

    def append(self, skip: Skipped) -> None:
        """Add a row."""
        self._rows.append((encoded(str(skip.path)), skip.reason, encoded(skip.message)))
        if len(self._rows) >= _BATCH:
            self._pack()

    def extend(self, skipped: Iterable[Skipped]) -> None:
        """Add rows."""
        if isinstance(skipped, SkippedFiles):
            self._pack()
            self._tables.append(skipped.table)
        else:
            for skip in skipped:
                self.append(skip)

    def __iadd__(self, skipped: Iterable[Skipped]) -> "SkippedFiles":
        self.extend(skipped)
        return self

    def counts(self) -> Counter[str]:
        """Return the number of rows of each reason, in the order in which the reasons occur first."""
        counts: Counter[str] = Counter()
        for chunk in self.table["reason"].chunks:
            for row in pc.value_counts(chunk.indices):
                counts[chunk.dictionary[row["values"].as_py()].as_py()] += row["counts"].as_py()
        return counts

    def sorted_by_path(self) -> "SkippedFiles":
        """Return the rows in the order of their paths as texts. Rows of one path keep their order."""
        table = self.table.unify_dictionaries()
        keys = pa.chunked_array([_in_order_of_texts(chunk) for chunk in _chunks(table["path"])], pa.large_binary())
        if pc.all(pc.less_equal(keys.slice(0, max(0, len(keys) - 1)), keys.slice(1))).as_py():
            return SkippedFiles(table)  # Most formats find files in this order, and a copy takes the memory again.
        order = pc.sort_indices(keys)
        return SkippedFiles(pa.table([column.take(order) for column in table.columns], SKIPPED_SCHEMA))

    def __len__(self) -> int:
        return len(self._rows) + sum(len(table) for table in self._tables)

    @overload
    def __getitem__(self, index: int) -> Skipped: ...
    @overload
    def __getitem__(self, index: slice) -> "SkippedFiles": ...
    def __getitem__(self, index: int | slice) -> "Skipped | SkippedFiles":
        if isinstance(index, slice):
            return SkippedFiles(self.table.take(pa.array(np.arange(*index.indices(len(self))))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(iter(SkippedFiles(self.table.slice(index % len(self), 1))))

    def __iter__(self) -> Iterator[Skipped]:
        table = self.table
        for begin in range(0, len(table), _BATCH):
            columns = [_plain(column) for column in table.slice(begin, _BATCH).columns]
            for path, reason, message in zip(*columns, strict=True):
                yield Skipped(Path(decoded(path)), reason, decoded(message))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Skipped.__eq__, self, other))

    def __repr__(self) -> str:
        return f"SkippedFiles({len(self):,})"

    def _pack(self) -> None:
        """Move the rows that were appended to a table."""
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SKIPPED_SCHEMA, strict=True)]
            self._tables.append(pa.table(arrays, SKIPPED_SCHEMA))
            self._rows = []


def encoded(text: str) -> bytes:
    """Return the bytes of a text in which surrogates stand for bytes that are not UTF-8, as in names of files."""
    return text.encode(errors="surrogateescape")


def decoded(data: bytes) -> str:
    """Return the text of bytes from `encoded`."""
    return data.decode(errors="surrogateescape")


def _chunks(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """Yield the values of a column, some at a time."""
    for chunk in column.chunks:
        for begin in range(0, len(chunk), _SKIPPED_ROWS):
            yield chunk.slice(begin, _SKIPPED_ROWS)


def _as_pathlib(paths: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """Return paths as `pathlib` writes them."""
    if not pc.any(pc.match_substring_regex(paths, _UNUSUAL_PATH)).as_py():
        return paths
    return pa.array([encoded(str(Path(decoded(path)))) for path in paths.to_pylist()], pa.large_binary())


def _in_order_of_texts(paths: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """Return bytes with the order of the texts. UTF-8 has it, but other bytes come where their surrogates are."""
    try:
        paths.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([decoded(path).encode(errors="surrogatepass") for path in paths.to_pylist()], pa.large_binary())
    return paths


@dataclass
class Search:
    """What a format is told for its search, and where it reports.

    Attributes:
        train: Names of the splits to train on. None chooses by name.
        validation: Names of the splits to validate on. None chooses by name.
        skipped: Files and folders that are not used are appended to it, each as a `Skipped`.
        notes: Sentences that warn the user are appended to it.
    """

    train: list[str] | None = None
    validation: list[str] | None = None
    skipped: SkippedFiles = field(default_factory=SkippedFiles)
    notes: list[str] = field(default_factory=list)

    @property
    def wanted(self) -> list[str]:
        """The splits that the configuration names."""
        return [*(self.train or []), *(self.validation or [])]


@lru_cache(maxsize=4096)  # A file may have many pieces.
def without_suffix(path: str) -> str:
    """Return a path without its suffix, with slashes, as an id."""
    name = Path(path)
    return name.with_suffix("").as_posix() if name.name else path


def piece_id(stem: str, start: float | None, end: float | None, channel: Channel | None = None) -> str:
    """Return an id for a piece of a recording, such as ``talk_00012.34_00034.56``, followed by ``_c1`` for channel 1.

    Args:
        stem: ID of the recording.
        start: Beginning in seconds. None means 0.
        end: End in seconds. None means the end of the recording.
        channel: Channel, if the corpus names one.
    """
    bounds = "" if start is None and end is None else f"_{start or 0:08.2f}_{'end' if end is None else f'{end:08.2f}'}"
    return f"{stem}{bounds}{f'_c{channel}' if isinstance(channel, int) else ''}"
