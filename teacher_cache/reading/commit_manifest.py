"""The manifest of a cache: one file with all commit records, so that a reader need not ask for each.

The records decide, and the manifest only repeats them. A row of it holds if the record that it repeats is no newer than the manifest
and has the size that it had. A build and a repair remove the manifest before they change a record, and write it at the end.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_distill.teacher_cache.storage.cache import Cache, ShardFile, commit_name
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError, Part, content_key, parts_of
from ray_distill.teacher_cache.storage.json_record import encode_record
from ray_distill.teacher_cache.storage.limits import MAX_FILES, check_commit
from ray_distill.teacher_cache.storage.local_files import FileEntry
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.shard_plan import first_rows
from ray_distill.teacher_cache.storage.store import Store

MANIFEST = "manifest.parquet"
_THREADS = 16
_SEAL = b"ray_distill.seal"
_KEY = pa.binary(32)
_PLAIN = {"PLAIN", "RLE"}
"""Encodings of a manifest: values as they are, and where there is none. All others can repeat values in few bytes."""
_ROW_BYTES = 92
"""Bytes of the numbers and hashes of a row, without its texts."""
_SCHEMA = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("record_bytes", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", _KEY, nullable=False),
        pa.field("content", _KEY, nullable=False),
        pa.field("failed", pa.string()),
    ]
)


@dataclass(frozen=True)
class ManifestPart:
    """The rows of a manifest for one part: shards, ascending, and columns of the same length."""

    shard: np.ndarray
    record_bytes: np.ndarray
    rows: np.ndarray
    bytes: np.ndarray
    sha256: np.ndarray
    content: np.ndarray
    failed: pa.Array


@dataclass(frozen=True)
class Manifest:
    """A manifest as read.

    Attributes:
        parts: Its rows by folder of the part.
        changed: Time of its last change in nanoseconds, if it is known.
    """

    parts: Mapping[str, ManifestPart]
    changed: int | None

    def holds(self, folder: str, place: int, record: FileEntry) -> bool:
        """Return whether a row repeats the record that is stored now, given its entry in a listing."""
        known = self.changed is not None and record.changed is not None and record.changed <= self.changed
        return known and record.size == self.parts[folder].record_bytes[place]

    def row(self, folder: str, shard: int, record: FileEntry) -> dict[str, Any] | None:
        """Return the row of a file, or None if there is none that holds."""
        if (part := self.parts.get(folder)) is None:
            return None
        place = int(np.searchsorted(part.shard, shard))
        if place == len(part.shard) or part.shard[place] != shard or not self.holds(folder, place, record):
            return None
        return {
            "part": folder,
            "shard": shard,
            "record_bytes": record.size,
            "rows": int(part.rows[place]),
            "bytes": int(part.bytes[place]),
            "sha256": part.sha256[place].tobytes(),
            "content": part.content[place].tobytes(),
            "failed": part.failed[place].as_py(),
        }


def read_manifest(store: Store, changed: int | None = None) -> Manifest | None:
    """Return the manifest of a cache, or None if there is none or any byte of it was changed.

    Args:
        store: Store of the cache.
        changed: Time of its last change from a listing.
    """
    try:
        data = store.read(MANIFEST, MAX_FILES * 1024)
    except CacheAccessError:
        raise
    except (FileNotFoundError, ValueError):
        return None
    try:
        table = _decode(data)
    except (OSError, ValueError, OverflowError, pa.ArrowException):
        return None
    table = table.sort_by([("part", "ascending"), ("shard", "ascending")]).combine_chunks()
    names = np.asarray(table["part"].to_pylist(), dtype=object)
    parts = {}
    for name in sorted(set(names)):
        start, count = int(np.argmax(names == name)), int((names == name).sum())
        rows = table.slice(start, count).combine_chunks()
        numbers = {key: rows[key].to_numpy() for key in ("shard", "record_bytes", "rows", "bytes")}
        keys = {key: _key_bytes(rows[key].combine_chunks()) for key in ("sha256", "content")}
        parts[name] = ManifestPart(**numbers, **keys, failed=rows["failed"].combine_chunks())
    return Manifest(parts, changed)


def take_manifest(store: Store) -> Manifest | None:
    """Remove the manifest of a cache, before its records change, and return it."""
    entry = store.entries().get(MANIFEST)
    if entry is None:
        return None
    manifest = read_manifest(store, entry.changed)
    store.remove(MANIFEST)
    return manifest


def current_manifest(cache: Cache, previous: Manifest | None = None) -> bytes:
    """Return what the manifest of a cache should be according to its commit records. Files without a sound record are left out.

    Args:
        cache: The cache.
        previous: An earlier manifest, whose rows are taken where they still hold, so that only new records are read.
    """
    entries = cache.store.entries()
    plan = cache.plan_columns(("split", "num_samples", "num_frames", "shard", "row"))
    first = first_rows(plan["shard"].to_numpy())
    shards = plan["shard"].to_numpy()[first]
    wanted: dict[str, list[tuple[Part, int, str]]] = {}
    for shard, split in zip(shards.tolist(), plan["split"].take(first).to_pylist(), strict=True):
        for part in parts_of(cache.spec, len(cache.layer_sets), split):
            if commit_name(part, shard) in entries:
                wanted.setdefault(part.folder, []).append((part, shard, split))
    files = [file for folder in sorted(wanted) for file in wanted[folder]]

    def row(file: tuple[Part, int, str]) -> dict[str, Any] | None:
        part, shard, split = file
        entry = entries[commit_name(part, shard)]
        if (known := None if previous is None else previous.row(part.folder, shard, entry)) is not None:
            return known
        key = content_key(cache.spec, cache.layer_sets[part.layer_set], part, shard, split)
        try:
            record = cache.commit_of(ShardFile(shard, part, key))
            return None if record is None else _row_of(part.folder, shard, entry.size, record)
        except CacheAccessError:
            raise
        except (CacheError, ValueError):  # The record is damaged; whoever reads the file meets the error.
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        rows = [found for found in pool.map(row, files) if found is not None]
    return _encode(pa.Table.from_pylist(rows, schema=_SCHEMA))


def update_manifest(cache: Cache, previous: Manifest | None = None) -> bool:
    """Write the manifest of a cache if it is not `current_manifest`. Call it only while holding the lock of the cache.

    Returns:
        Whether it was written.
    """
    data = current_manifest(cache, previous)
    try:
        if cache.store.read(MANIFEST) == data:
            return False
    except FileNotFoundError:
        pass
    cache.store.write(MANIFEST, data)
    return True


def write_rows(store: Store, records: Sequence[tuple[str, int, Mapping[str, Any]]]) -> None:
    """Write a manifest of commit records that are known already, given as (folder of the part, shard, record), in that order."""
    rows = [_row_of(folder, shard, len(encode_record(dict(record))), record) for folder, shard, record in records]
    store.write(MANIFEST, _encode(pa.Table.from_pylist(rows, schema=_SCHEMA)))


def rewrite_manifest(location: str | Path | Store, *, thorough: bool = True) -> bool:
    """Write the manifest of an intact cache again if it is not `current_manifest`, and the cache can be locked and written to.

    Args:
        location: Location of the cache.
        thorough: Whether to read all commit records. Otherwise only those are read that the manifest does not seem to repeat.
            Default: True.

    Returns:
        Whether it was written.
    """
    cache = Cache.open(location)
    store = cache.store
    entry = store.entries().get(MANIFEST)
    if entry is not None:
        previous = None if thorough else read_manifest(store, entry.changed)
        with suppress(FileNotFoundError):  # Another process has begun to change the cache.
            if store.read(MANIFEST) == current_manifest(cache, previous):
                return False
    try:
        with cache_lock(store):
            return update_manifest(Cache.open(store))  # It may have grown.
    except (CacheError, OSError):  # It is being built, or may only be read. Readers then read the records.
        return False


def _row_of(folder: str, shard: int, size: int, record: Mapping[str, Any]) -> dict[str, Any]:
    failed = record.get("failed")
    return {
        "part": folder,
        "shard": shard,
        "record_bytes": size,
        "rows": record["rows"],
        "bytes": record["bytes"],
        "sha256": bytes.fromhex(record["sha256"]),
        "content": bytes.fromhex(record["content"]),
        "failed": json.dumps(failed, sort_keys=True) if failed else None,
    }


def failed_of_row(text: str | None) -> dict[str, str] | None:
    """Return the failed utterances in the column ``failed`` of a row, with reasons by id. None if it is damaged."""
    if text is None:
        return {}
    try:
        failed: dict[str, str] = json.loads(text)
        check_commit({"rows": 0, "bytes": 0, "sha256": "", "content": "", "failed": failed})
    except (ValueError, RecursionError):
        return None
    return failed


def _encode(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    sealed = table.replace_schema_metadata({_SEAL: _digest(table)})
    # Without compression and with plain values, a manifest can't claim to be much larger than it is; see `_decode`.
    pq.write_table(sealed, buffer, compression="none", use_dictionary=False, store_schema=True)
    return buffer.getvalue()


def _decode(data: bytes) -> pa.Table:
    """Return the table of a manifest. ValueError or an Arrow exception if it is damaged."""
    with pq.ParquetFile(io.BytesIO(data)) as file:
        metadata = file.metadata
        columns = [
            metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
        ]
        if any(c.compression != "UNCOMPRESSED" or not {*c.encodings} <= _PLAIN for c in columns):
            raise ValueError("it is compressed")
        if metadata.num_rows > min(MAX_FILES, len(data) // _ROW_BYTES):
            raise ValueError("it is too long")
        seal = (file.schema_arrow.metadata or {}).get(_SEAL)
        if file.schema_arrow.remove_metadata() != _SCHEMA:
            raise ValueError("it has other columns")
        table = file.read()
    if any(len(table) and pc.min(table[name]).as_py() < 0 for name in ("shard", "record_bytes", "rows", "bytes")):
        raise ValueError("it has negative numbers")
    if seal != _digest(table):
        raise ValueError("its checksum does not match its content")
    return table


def _digest(table: pa.Table) -> bytes:
    digest = hashlib.sha256()
    for column in table.combine_chunks().columns:
        values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        if pa.types.is_string(values.type):
            digest.update(json.dumps(values.to_pylist()).encode())
        elif values.type == _KEY:
            digest.update(_key_bytes(values).tobytes())
        else:
            digest.update(values.to_numpy().tobytes())
    return digest.hexdigest().encode()


def _key_bytes(values: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Return the (N, 32) uint8 bytes of a column of hashes."""
    data = np.frombuffer(values.buffers()[1], np.uint8) if len(values) else np.zeros(0, np.uint8)
    return data[32 * values.offset : 32 * (values.offset + len(values))].reshape(-1, 32)
