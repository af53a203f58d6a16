"""The files of an index and hashes of what it consists of, without an object for each utterance and each skipped file."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ray_distill.pipeline.corpus.decoded_sources import stamp_rows
from ray_distill.pipeline.corpus.found import SKIPPED_SCHEMA, FoundFiles, SkippedFiles, channel_of, decoded
from ray_distill.teacher_cache.storage.shard_plan import UTTERANCE_SCHEMA, Utterances

_SCHEMA = pa.schema(
    [("id", "string"), ("path", "string"), ("num_samples", "int64"), ("split", "string"), ("sha256", "string")]
)
_ROWS = 1 << 20
"""Number of rows that are copied at a time, which is that of Parquet's row groups."""
_TEXTS = 1 << 16
"""Number of rows that are hashed or written as text at a time."""
_CSV_BLOCK = 1 << 24
"""Number of bytes that are read at a time. It is also the maximum of a row."""


def read_utterances(file: Path) -> tuple[Utterances, Mapping[bytes, bytes]]:
    """Return the utterances of a file, and the metadata of its schema. OSError or ArrowException if it can't be read."""
    columns = {}
    with pq.ParquetFile(file) as parquet:
        # The largest columns come first, since reading takes twice the memory of one column.
        for name in ("path", "sha256", "id", "num_samples", "split"):
            type = UTTERANCE_SCHEMA.field(name).type
            groups = [parquet.read_row_group(n, columns=[name])[name].cast(type) for n in range(parquet.num_row_groups)]
            chunks = [chunk for group in groups for chunk in group.chunks]
            columns[name] = pa.chunked_array(chunks, type).unify_dictionaries().combine_chunks()
            del groups, chunks
            pa.default_memory_pool().release_unused()  # Otherwise it keeps what the parts of a column took.
        metadata = parquet.schema_arrow.metadata or {}
    return Utterances(pa.table({name: columns[name] for name in UTTERANCE_SCHEMA.names})), metadata


def write_utterances(file: Path, utterances: Utterances, metadata: Mapping[bytes, str]) -> None:
    """Write utterances with metadata to a file."""
    schema = _SCHEMA.with_metadata(dict(metadata)) if metadata else _SCHEMA
    with pq.ParquetWriter(file, schema) as writer:
        for begin in range(0, max(1, len(utterances)), _ROWS):
            writer.write_table(utterances.table.slice(begin, _ROWS).cast(schema), _ROWS)


def read_skipped(file: Path) -> SkippedFiles:
    """Return the skipped files of a file. OSError, LookupError or ArrowException if it can't be read."""
    table = pa.csv.read_csv(
        file,
        read_options=pa.csv.ReadOptions(block_size=_CSV_BLOCK),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            include_columns=SKIPPED_SCHEMA.names, column_types={field.name: field.type for field in SKIPPED_SCHEMA}
        ),
    )
    return SkippedFiles.of_columns(*table.columns)


def write_skipped(file: Path, skipped: SkippedFiles) -> None:
    """Write skipped files as a table (CSV) of their paths, reasons and messages.

    URLs have two slashes, of which a path keeps one. Bytes that are not UTF-8 are written as they are.
    """
    comma, end = (pa.scalar(text, pa.large_binary()) for text in (b",", b"\r\n"))
    with file.open("wb") as output:
        output.write(b"path,reason,message\r\n")
        for path, reason, message in _texts(skipped.table):
            place = pc.replace_substring_regex(path, r"^([a-z][a-z0-9+.-]*):/([^/])", r"\1://\2")
            row = pc.binary_join_element_wise(_quoted(place), _quoted(reason), _quoted(message), comma)
            output.write(_joined(pc.binary_join_element_wise(row, end, pa.scalar(b"", pa.large_binary()))))


def _quoted(texts: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """Return fields of a CSV file, with quotation marks where `csv` also writes them."""
    mark, nothing = (pa.scalar(text, pa.large_binary()) for text in (b'"', b""))
    special = pc.match_substring_regex(texts, '[,"\r\n]')
    if not pc.any(special).as_py():
        return texts
    doubled = pc.replace_substring(texts, '"', '""')
    return pc.if_else(special, pc.binary_join_element_wise(mark, doubled, mark, nothing), texts)


def fingerprint_of(utterances: Utterances) -> str:
    """Return the SHA-256 of the ids, splits and identities of utterances in the order of their ids, each as a JSON array."""
    table = utterances.table.select(["id", "split", "sha256"])
    ids = table["id"]
    if len(ids) > 1 and not pc.all(pc.less_equal(ids.slice(0, len(ids) - 1), ids.slice(1))).as_py():
        table = table.take(pc.sort_indices(ids))
    digest = hashlib.sha256()
    for text in _json_arrays(table):
        digest.update(text)
    return digest.hexdigest()


def index_states(
    schemas: Sequence[int], entries: FoundFiles, stamps: np.ndarray, skipped: SkippedFiles, settings: list[object]
) -> list[str]:
    """Return, for each version, a hash of everything that an index of that version depends on, as the text of ``state.json``.

    Args:
        schemas: Versions.
        entries: The entries sorted by id.
        stamps: Stamps of their files.
        skipped: What isn't used.
        settings: Settings of the index.
    """

    def files() -> Iterator[object]:
        rows = entries.rows("id", "path", "role", "start", "end", "channel", "inside")
        for (id, path, role, start, end, channel, inside), stamp in zip(rows, stamp_rows(stamps), strict=True):
            yield [id, path, role, *(stamp or ["missing"])]
            piece = [start, end, channel_of(channel), inside]
            if piece != [None] * 4:
                yield piece

    def parts() -> Iterator[bytes | memoryview]:
        for n, item in enumerate(files()):
            yield f"{', ' if n else ''}{json.dumps(item)}".encode()
        yield b"], ["
        separator = b", "
        for n, text in enumerate(_json_arrays(skipped.table.select(["path", "reason"]), separator)):
            yield text if n else text[len(separator) :]
        yield f"], {json.dumps(settings)}]".encode()

    digests = [hashlib.sha256(f"[{schema}, [".encode()) for schema in schemas]
    for text in parts():
        for digest in digests:
            digest.update(text)
    return [json.dumps({"sha256": digest.hexdigest()}) for digest in digests]


_ESCAPED = r"[^ !#-\[\]-~]"
"""Bytes that JSON writes in another way: all but ASCII's that can be printed, and of those the quotation mark and backslash."""


def _json_arrays(table: pa.Table, before: bytes = b"") -> Iterator[bytes | memoryview]:
    """Yield rows of texts as JSON arrays, many at a time, with ``before`` in front of each."""
    for columns in _texts(table):
        if any(pc.any(pc.match_substring_regex(column, _ESCAPED)).as_py() for column in columns):
            rows = zip(*(map(decoded, column.to_pylist()) for column in columns), strict=True)
            yield b"".join(before + json.dumps(row).encode() for row in rows)
            continue
        begin, between, end = (pa.scalar(text, pa.large_binary()) for text in (before + b'["', b'", "', b'"]'))
        inner = pc.binary_join_element_wise(*columns, between)
        yield _joined(pc.binary_join_element_wise(begin, inner, end, pa.scalar(b"", pa.large_binary())))


def _texts(table: pa.Table) -> Iterator[list[pa.LargeBinaryArray]]:
    """Yield the columns of a table of texts as bytes, some rows at a time."""
    for begin in range(0, table.num_rows, _TEXTS):
        columns = table.slice(begin, _TEXTS).columns
        columns = [
            column if column.type == pa.large_binary() else column.cast(pa.large_string()).cast(pa.large_binary())
            for column in columns
        ]
        yield [column.combine_chunks() for column in columns]


def _joined(texts: pa.LargeBinaryArray) -> memoryview:
    """Return the bytes of an array that a function of Arrow made, one after the other."""
    _, offsets, data = texts.buffers()
    return memoryview(data)[: int(np.frombuffer(offsets, np.int64)[len(texts)])]
