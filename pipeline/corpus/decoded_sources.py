"""What was decoded, by source, so that neither a killed index nor one of a larger corpus decodes a source again.

    OUTPUT/decoding/part-00000.parquet   results of an index that is not finished, written while it is made
    OUTPUT/decoded.parquet               results of a finished index

A source is an entry of the corpus with the size and the modification time of its file. Remote files, whose size and time are not
known, are told apart by their address alone, and are decoded again if they could not be used.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_distill.pipeline.corpus.decoding import Decoded
from ray_distill.pipeline.corpus.found import FoundFile, FoundFiles, Skipped, SkippedFiles, channel_of, encoded
from ray_distill.whole_files import replacing

DECODED = "decoded.parquet"
DECODING = "decoding"
PART_SOURCES = 2000
"""Maximum number of sources whose results are not on disk yet."""
PART_SECONDS = 10.0
"""Seconds after which results are written, however few they are."""
_STAMPED = 1 << 13
"""Number of stamps that are Python objects at a time."""
_SETTINGS = b"settings"
_CORPUS = b"corpus"

RESULTS = pa.schema(
    [
        ("source", pa.binary(16)),
        ("mixed", pa.bool_()),
        ("cut", pa.bool_()),
        ("id", pa.large_string()),
        ("path", pa.large_binary()),
        ("num_samples", pa.int64()),
        ("sha256", pa.large_string()),
        ("reason", pa.large_string()),
        ("message", pa.large_binary()),
    ]
)
"""One row per utterance or skipped part of a source. ``source`` is its key, and ``reason`` is empty for an utterance. Paths and
messages are bytes, since names of files need not be UTF-8."""

Stamp = tuple[int, int] | None
"""Size in bytes and modification time in nanoseconds of a local file, None if it has none."""
Row = tuple[bytes, bool, bool, str, bytes, int, str, str, bytes]


def stamps_of(entries: FoundFiles) -> np.ndarray:
    """Return the (N, 2) int64 sizes and modification times of the entries' files. The size is -1 if a file has no
    stamp, or can't be read by this user."""
    paths = entries.texts("path")
    places = None
    if any(entries.table[name].null_count < len(entries) for name in ("start", "end", "inside")):
        encoded = paths.dictionary_encode()  # A file has many pieces.
        paths, places = encoded.dictionary, encoded.indices.to_numpy()
    stamps = np.full((len(paths), 2), (-1, 0), np.int64)
    for begin in range(0, len(paths), _STAMPED):
        for n, path in enumerate(paths[begin : begin + _STAMPED].to_pylist(), begin):
            with suppress(OSError):
                stat = os.stat(path)  # noqa: PTH116 (a Path for each of millions of files takes time)
                if os.access(path, os.R_OK):  # Else it is skipped, and decoded once this user may read it.
                    stamps[n] = stat.st_size, stat.st_mtime_ns
    return stamps if places is None else stamps[places]


def stamp_rows(stamps: np.ndarray) -> Iterator[Stamp]:
    """Yield the rows of `stamps_of`."""
    for begin in range(0, len(stamps), _STAMPED):
        for size, changed in stamps[begin : begin + _STAMPED].tolist():
            yield None if size < 0 else (size, changed)


def _keys(entries: FoundFiles, stamps: np.ndarray) -> bytes:
    """Return the 16 bytes of each source by which it is known."""
    keys = bytearray()
    rows = entries.rows("id", "path", "start", "end", "channel", "inside")
    for (id, path, start, end, channel, inside), stamp in zip(rows, stamp_rows(stamps), strict=True):
        content = json.dumps([id, path, stamp, start, end, channel_of(channel), inside])
        keys += hashlib.blake2b(content.encode(), digest_size=16).digest()
    return bytes(keys)


def rows_of(key: bytes, decoded: Decoded) -> list[Row]:
    """Return the rows of a source's results."""
    rows: list[Row] = []
    for item in decoded.results:
        flags = (key, decoded.mixed, decoded.cut)
        if isinstance(item, Skipped):
            rows.append((*flags, "", encoded(str(item.path)), 0, "", item.reason, encoded(item.message)))
        else:
            rows.append((*flags, item.id, encoded(item.path), item.num_samples, item.sha256, "", b""))
    return rows


def table_of(rows: Sequence[Row]) -> pa.Table:
    """Return rows as a table with the schema RESULTS."""
    columns = zip(*rows, strict=True) if rows else [()] * len(RESULTS)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, RESULTS, strict=True)], RESULTS)


def skipped_of(rows: pa.Table) -> SkippedFiles:
    """Return the rows that are no utterances."""
    chosen = rows.select(["path", "reason", "message"]).filter(pc.not_equal(rows["reason"], ""))
    return SkippedFiles.of_columns(*chosen.columns)


class UnknownSources(Sequence[tuple[bytes, FoundFile]]):
    """The keys and entries of sources that have to be decoded. They become objects some at a time.

    Args:
        entries: Entries of all sources.
        keys: The 16 bytes of each source's key.
        positions: (U,) positions of the unknown ones.
    """

    def __init__(self, entries: FoundFiles, keys: bytes, positions: np.ndarray) -> None:
        self._entries, self._keys, self._positions = entries, keys, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> tuple[bytes, FoundFile]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[bytes, FoundFile]]: ...
    def __getitem__(self, index: int | slice) -> tuple[bytes, FoundFile] | list[tuple[bytes, FoundFile]]:
        if not isinstance(index, slice):
            position = int(self._positions[index])
            return self._keys[16 * position : 16 * position + 16], self._entries[position]
        chosen = self._positions[index]
        keys = [self._keys[16 * position : 16 * position + 16] for position in chosen.tolist()]
        return list(zip(keys, self._entries.take(chosen), strict=True))

    def __iter__(self) -> Iterator[tuple[bytes, FoundFile]]:
        for begin in range(0, len(self), _STAMPED):
            yield from self[begin : begin + _STAMPED]


class DecodedSources:
    """The results of a corpus's sources, as far as they are known.

    Args:
        entries: The N sources.
        stamps: (N, 2) stamps of their files, from `stamps_of`.
        settings: Text of all other things that the results depend on.
        corpus: Path of the corpus.

    Attributes:
        keys: The 16 bytes of each source's key, one after the other.
        found: (N,) bool, whether the results of a source are known.
    """

    def __init__(self, entries: FoundFiles, stamps: np.ndarray, settings: str, corpus: Path) -> None:
        self._entries, self.keys = entries, _keys(entries, stamps)
        keys = np.frombuffer(self.keys, "S16")
        self._order = np.argsort(keys).astype(np.int32)
        self._sorted = keys[self._order]
        self._unstamped = stamps[:, 0] < 0
        self._metadata = {_SETTINGS: settings.encode(), _CORPUS: encoded(str(corpus))}
        self.found = np.zeros(len(keys), bool)
        self._tables = [RESULTS.empty_table()]
        self._positions = [np.zeros(0, np.int64)]

    def add(self, rows: pa.Table, *, fresh: bool = False) -> None:
        """Add the results of sources that are not known yet, and ignore all others.

        Args:
            rows: A table with the schema RESULTS.
            fresh: Whether they were decoded just now, so that failures of files without a stamp count. Default: False.
        """
        source = pa.concat_arrays(rows["source"].chunks) if rows["source"].num_chunks else pa.array([], pa.binary(16))
        keys = np.frombuffer(source.buffers()[1] or b"", "S16")[source.offset :][: len(source)]
        if not len(keys) or not len(self._sorted):
            return
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        positions = self._order[places]
        chosen = (self._sorted[places] == keys) & ~self.found[positions]
        if not fresh:
            # The positions of keys of other sources mean nothing.
            failed = chosen & pc.not_equal(rows["reason"], "").to_numpy() & self._unstamped[positions]
            chosen &= ~np.isin(positions, positions[failed])
        self.found[positions[chosen]] = True
        self._tables.append(rows.filter(pa.array(chosen)))
        self._positions.append(positions[chosen])

    def add_file(self, file: Path, *, of_corpus: bool = False) -> None:
        """Add the results in a file that was written with the same settings. One that is damaged or missing is left out.

        Args:
            file: A Parquet file with the schema RESULTS.
            of_corpus: Whether it must be of this corpus. Default: False.
        """
        try:
            with pq.ParquetFile(file) as parquet:
                metadata = parquet.schema_arrow.metadata or {}
                names = [_SETTINGS, _CORPUS] if of_corpus else [_SETTINGS]
                if any(metadata.get(name) != self._metadata[name] for name in names):
                    return
                rows = parquet.read().cast(RESULTS)
            rows.validate(full=True)
        except (OSError, ValueError, pa.ArrowException):
            return  # Its sources are decoded again.
        if not any(column.null_count for column in rows.columns):
            self.add(rows)

    def add_known(self, output: Path, others: Sequence[Path]) -> None:
        """Add the results of a folder's earlier index and of an interrupted one, and then those of other folders of this corpus."""
        for file in (*sorted((output / DECODING).glob("part-*.parquet")), output / DECODED):
            self.add_file(file)
        for folder in others:
            if not self.found.all():
                self.add_file(folder / DECODED, of_corpus=True)

    @property
    def unknown(self) -> UnknownSources:
        """The sources that have to be decoded."""
        return UnknownSources(self._entries, self.keys, np.flatnonzero(~self.found))

    @contextmanager
    def recording(self, output: Path) -> Iterator[Callable[[pa.Table], None]]:
        """Yield a function that adds fresh results. They are written to a folder now and then, and when the block ends or fails."""
        parts = output / DECODING
        parts.mkdir(parents=True, exist_ok=True)
        numbers = [int(file.stem[5:]) for file in parts.glob("part-*.parquet") if file.stem[5:].isdecimal()]
        number = max(numbers, default=-1) + 1
        waiting: list[pa.Table] = []
        sources, written = 0, time.monotonic()

        def flush() -> None:
            nonlocal number, sources, written
            if waiting:
                rows = pa.concat_tables(waiting)
                self._write(rows, parts / f"part-{number:05d}.parquet")
                self.add(rows, fresh=True)
                waiting.clear()
                number += 1
            sources, written = 0, time.monotonic()

        def record(rows: pa.Table) -> None:
            nonlocal sources
            waiting.append(rows)
            sources += len(pc.unique(rows["source"]))
            if sources >= PART_SOURCES or time.monotonic() - written >= PART_SECONDS:
                flush()

        try:
            yield record
        finally:
            flush()

    def results(self) -> tuple[pa.Table, np.ndarray]:
        """Return all results in the order of their sources, and (M,) positions of the M rows' sources."""
        rows, positions = pa.concat_tables(self._tables), np.concatenate(self._positions)
        if bool((np.diff(positions) < 0).any()):
            order = np.argsort(positions, kind="stable")
            rows, positions = rows.combine_chunks().take(pa.array(order)), positions[order]
        return rows, positions

    def save(self, rows: pa.Table, output: Path) -> None:
        """Write all results of a finished index."""
        self._write(rows, output / DECODED)

    def _write(self, rows: pa.Table, file: Path) -> None:
        with replacing(file) as temporary:
            pq.write_table(rows.replace_schema_metadata(self._metadata), temporary, compression="zstd")


def remove_parts(output: Path) -> None:
    """Remove the partial results of a folder whose index is finished."""
    folder = output / DECODING
    for file in folder.glob("part-*"):
        file.unlink()
    with suppress(OSError):  # Files that a user put there stay.
        folder.rmdir()
