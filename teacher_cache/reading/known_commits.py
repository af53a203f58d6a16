"""The commit records of a cache: from the manifest where it holds, and from the records elsewhere."""

import threading
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST, Manifest, failed_of_row, read_manifest
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile, commit_name
from ray_distill.teacher_cache.storage.cache_spec import Part
from ray_distill.teacher_cache.storage.local_files import FileEntry


class KnownCommits:
    """The commit records of a cache, without a request for each that the manifest repeats.

    Args:
        cache: The cache.
        entries: A listing of its store. Default: None, which lists it.

    Attributes:
        entries: The listing.
    """

    def __init__(self, cache: Cache, entries: Mapping[str, FileEntry] | None = None) -> None:
        self._cache = cache
        self.entries = cache.store.entries() if entries is None else entries
        self._lock = threading.Lock()

    @property
    def _manifest(self) -> Manifest | None:
        # Since Python 3.12, threads that ask for a cached property at once would all read the file.
        with self._lock:
            return self._read_manifest

    @cached_property
    def _read_manifest(self) -> Manifest | None:
        entry = self.entries.get(MANIFEST)
        return None if entry is None else read_manifest(self._cache.store, entry.changed)

    def failed(self, part: Part, shard: int) -> dict[str, str] | None:
        """Return the failed utterances of a file, with reasons by id. None if its record has to be read, or there is none."""
        row = self._row(part, shard)
        return None if row is None else failed_of_row(row["failed"])

    def record(self, file: ShardFile) -> dict[str, Any] | None:
        """Return the commit record of a file, or None if the file is not finished.

        Raises:
            CacheError: If the record is damaged or belongs to a file with other content.
        """
        if file.commit not in self.entries:
            return None
        row = self._row(file.part, file.shard)
        if row is None or row["content"].hex() != file.content or (failed := failed_of_row(row["failed"])) is None:
            return self._cache.commit_of(file)
        known = {"rows": row["rows"], "bytes": row["bytes"], "sha256": row["sha256"].hex(), "content": file.content}
        return known | ({"failed": failed} if failed else {})

    def _row(self, part: Part, shard: int) -> dict[str, Any] | None:
        entry = self.entries.get(commit_name(part, shard))
        return None if entry is None or self._manifest is None else self._manifest.row(part.folder, shard, entry)
