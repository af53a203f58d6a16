"""The commit records of one split's files as columns, from the manifest where it holds, and from the records elsewhere."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST, Manifest, failed_of_row, read_manifest
from ray_distill.teacher_cache.reading.local_copies import CommittedFile
from ray_distill.teacher_cache.reading.split_rows import SplitRows
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile, commit_name, damage_error, file_name
from ray_distill.teacher_cache.storage.cache_spec import CacheError, Part, content_key, parts_of
from ray_distill.teacher_cache.storage.failed_utterances import check_failed
from ray_distill.teacher_cache.storage.local_files import FileEntry
from ray_distill.teacher_cache.storage.shard_plan import first_rows

MAX_LISTED = 50_000
"""Number of objects up to which a reader lists a cache with a manifest: 50 requests."""
_THREADS = 16


class CommitTable:
    """The commit records of the files of one split, as columns.

    A row of the manifest is compared with a listing of the cache, and with the record itself if that is newer or has another size. A
    cache with more than `MAX_LISTED` objects is not listed: there, a row is compared with its shard file when that is opened, and with
    its record if they differ; see `refresh`.

    Args:
        cache: The cache.
        planned: The utterances of the split according to the plan.
        split: The split.
        parts: The parts to read.

    Raises:
        CacheError: If a file is not finished, is missing, does not have its committed size, or has a damaged record.
    """

    def __init__(self, cache: Cache, planned: SplitRows, split: str, parts: Sequence[Part]) -> None:
        self._cache, self._planned, self._split = cache, planned, split
        starts = first_rows(planned.shard)
        shards, self._counts = planned.shard[starts], np.diff(starts, append=len(planned.shard))
        self._shards = shards
        store = cache.store
        entries: Mapping[str, FileEntry] | None = None
        if 2 * len(shards) * len(parts_of(cache.spec, len(cache.layer_sets), split)) <= MAX_LISTED:
            entries = store.entries()
            manifest = read_manifest(store, entries[MANIFEST].changed) if MANIFEST in entries else None
        elif (manifest := read_manifest(store)) is None:
            entries = store.entries()
        self._lock = threading.Lock()  # Of the columns, which `refresh` changes.
        self._bytes: dict[str, np.ndarray] = {}
        self._sha256: dict[str, np.ndarray] = {}
        self._unchecked: dict[str, np.ndarray] = {}
        self._content: dict[str, np.ndarray] = {}
        self.rows: dict[str, np.ndarray] = {}
        self.failed: dict[tuple[str, int], dict[str, str]] = {}
        for part in parts:
            self._read(part, manifest, entries)

    def _read(self, part: Part, manifest: Manifest | None, entries: Mapping[str, FileEntry] | None) -> None:
        """Read the columns of a part: from the manifest, or where that does not hold, from the records."""
        store, shards, folder = self._cache.store, self._shards, part.folder
        numbers = {name: np.zeros(len(shards), np.int64) for name in ("rows", "bytes")}
        keys = {name: np.zeros((len(shards), 32), np.uint8) for name in ("sha256", "content")}
        doubtful = np.ones(len(shards), bool)
        known = None if manifest is None else manifest.parts.get(folder)
        if manifest is not None and known is not None and len(known.shard):
            places = np.minimum(np.searchsorted(known.shard, shards), len(known.shard) - 1)
            doubtful = known.shard[places] != shards
            for columns in (numbers, keys):
                for name in columns:
                    columns[name] = getattr(known, name)[places]
            if entries is not None:
                for n in np.flatnonzero(~doubtful):
                    entry = entries.get(commit_name(part, int(shards[n])))
                    doubtful[n] = entry is None or not manifest.holds(folder, int(places[n]), entry)
            failures = np.zeros(len(shards), np.int64)
            for n in np.flatnonzero(known.failed.is_valid().to_numpy(zero_copy_only=False)[places] & ~doubtful):
                # A damaged row lists none, which does not fit the plan.
                failed = failed_of_row(known.failed[int(places[n])].as_py()) or {}
                if failed.keys() <= set(self._planned.of_shard(int(shards[n]))):
                    self.failed[folder, int(shards[n])] = failed
                    failures[n] = len(failed)
            doubtful |= numbers["rows"] + failures != self._counts
        self._unchecked[folder] = ~doubtful
        files = {int(n): self._file(part, int(shards[n])) for n in np.flatnonzero(doubtful)}
        for file in files.values():
            if entries is not None and file.commit not in entries:
                raise self._unfinished(file)
        with ThreadPoolExecutor(_THREADS) as pool:
            for (place, file), record in zip(
                files.items(), pool.map(self._cache.commit_of, files.values()), strict=True
            ):
                if record is None:
                    raise self._unfinished(file)
                numbers["rows"][place], numbers["bytes"][place] = record["rows"], record["bytes"]
                keys["sha256"][place] = _key(record["sha256"])
                keys["content"][place] = _key(record["content"])
                self.failed.pop((folder, file.shard), None)
                if record.get("failed"):
                    self.failed[folder, file.shard] = record["failed"]
                try:
                    check_failed(record, self._planned.of_shard(file.shard))
                except ValueError as error:
                    raise damage_error(store, file.commit, f"does not fit the plan ({error})") from error
        if entries is not None:
            for shard, size in zip(shards.tolist(), numbers["bytes"].tolist(), strict=True):
                name = file_name(part, shard)
                if name not in entries or entries[name].size != size:
                    raise damage_error(store, name, "is missing or does not have its committed size")
        self.rows[folder], self._bytes[folder] = numbers["rows"], numbers["bytes"]
        self._sha256[folder], self._content[folder] = keys["sha256"], keys["content"]

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(int(sizes.sum()) for sizes in self._bytes.values())

    def file(self, part: Part, shard: int) -> CommittedFile:
        """Return a file as its commit record describes it."""
        n = self._place(shard)
        with self._lock:
            size, sha256 = int(self._bytes[part.folder][n]), self._sha256[part.folder][n].tobytes().hex()
        return CommittedFile(file_name(part, shard), size, sha256)

    def shard_file(self, part: Part, shard: int) -> ShardFile:
        """Return what a file must hold. ValueError if its commit record says that it holds something else."""
        file = self._file(part, shard)
        if self._content[part.folder][self._place(shard)].tobytes().hex() != file.content:
            raise ValueError("its commit record belongs to another file or cache")
        return file

    def refresh(self, part: Part, shard: int, used: CommittedFile) -> bool:
        """Read the record of a file again if only the manifest was read. Return whether it differs from what was used.

        Args:
            part, shard: As for `file`.
            used: What `file` returned before. Another thread may have read the record since.

        Raises:
            CacheError: If the record is missing or damaged, or names other failed utterances.
        """
        n, folder = self._place(shard), part.folder
        if not self._unchecked[folder][n]:
            return used != self.file(part, shard)
        file = self._file(part, shard)
        record = self._cache.commit_of(file)
        store = self._cache.store
        if record is None:
            raise self._unfinished(file)
        if record.get("failed", {}) != self.failed.get((folder, shard), {}) or record["rows"] != self.rows[folder][n]:
            raise CacheError(
                f"{store.at(file.name)} was written again without some of its utterances after the manifest; run "
                f"`ray-distill cache verify {store.location}`, which writes it again, and start again"
            )
        content = _key(record["content"])
        with self._lock:
            differs = bool((self._content[folder][n] != content).any())
            self._bytes[folder][n], self._sha256[folder][n] = record["bytes"], _key(record["sha256"])
            self._content[folder][n], self._unchecked[folder][n] = content, False
        return differs or used != self.file(part, shard)

    def _unfinished(self, file: ShardFile) -> CacheError:
        return CacheError(f"{self._cache.store.at(file.name)} is not finished; run the cache stage again")

    def _place(self, shard: int) -> int:
        return int(np.searchsorted(self._shards, shard))

    def _file(self, part: Part, shard: int) -> ShardFile:
        cache = self._cache
        key = content_key(cache.spec, cache.layer_sets[part.layer_set], part, shard, self._split)
        return ShardFile(shard, part, key)


def _key(text: str) -> np.ndarray:
    """Return the 32 bytes of a SHA-256 in hex, or zeros, which match nothing, for another text."""
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    return np.frombuffer(data if len(data) == 32 else bytes(32), np.uint8)
