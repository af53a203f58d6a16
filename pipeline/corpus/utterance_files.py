"""The file with the utterances of an index, and a fingerprint of them, both without an object for each."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_distill.teacher_cache.storage.shard_plan import UTTERANCE_SCHEMA, Utterances

_SCHEMA = pa.schema(
    [("id", "string"), ("path", "string"), ("num_samples", "int64"), ("split", "string"), ("sha256", "string")]
)
_ROWS = 1 << 20
"""Number of rows that are copied at a time, which is that of Parquet's row groups."""
_HASHED = 1 << 16
"""Number of rows that are hashed at a time."""


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


def fingerprint_of(utterances: Utterances) -> str:
    """Return the SHA-256 of the ids, splits and identities of utterances in the order of their ids, each as a JSON array."""
    table = utterances.table.select(["id", "split", "sha256"])
    ids = table["id"]
    if len(ids) > 1 and not pc.all(pc.less_equal(ids.slice(0, len(ids) - 1), ids.slice(1))).as_py():
        table = table.take(pc.sort_indices(ids))
    digest = hashlib.sha256()
    texts = pa.schema([(name, pa.string()) for name in table.column_names])
    for begin in range(0, table.num_rows, _HASHED):
        columns = [column.combine_chunks() for column in table.slice(begin, _HASHED).cast(texts).columns]
        if any(pc.any(pc.match_substring_regex(column, _ESCAPED)).as_py() for column in columns):
            rows = zip(*(column.to_pylist() for column in columns), strict=True)
            digest.update("".join(map(json.dumps, rows)).encode())
            continue
        id, split, identity = columns
        rows = pc.binary_join_element_wise('["', id, '", "', split, '", "', identity, '"]', "")
        digest.update(memoryview(rows.buffers()[2])[: int(np.frombuffer(rows.buffers()[1], np.int32)[len(rows)])])
    return digest.hexdigest()


_ESCAPED = r"[^ !#-\[\]-~]"
"""Characters that JSON writes in another way: all but ASCII's that can be printed, and of those the quotation mark and backslash."""
