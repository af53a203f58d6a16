"""Audio of the utterances of a reader, from the files of the corpus, for a cache with ``audio`` ``source``."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_distill.first_line import first_line
from ray_distill.teacher_cache.reading.local_copies import CommittedFile, LocalCopies
from ray_distill.teacher_cache.reading.split_rows import SplitRows
from ray_distill.teacher_cache.source_audio import ChangedAudioError, load_waveform
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.shard_plan import PLAN_SCHEMA, Utterances

SOUGHT_FILES = 100
"""Number of utterances whose files are looked for where not all have to be."""
_THREADS = 8


class SourceRows:
    """Audio of utterances of a cache that holds none, decoded from the corpus. Safe to use from several threads.

    The audio of each utterance is compared with its identity in the plan whenever it is read.

    Args:
        cache: A cache with ``audio`` ``source``.
        split: Split of the utterances.
        utterances: The utterances.
        index: Index of the corpus as it is now; see `with_places`.

    Attributes:
        bytes, bytes_read: 0, as no file of a cache is read.
        is_remote: Whether any of the audio is in an object store or on a web server.
        prefers_window: False, since the files of a corpus are not in the order of shards.

    Raises:
        CacheError: If the index can't be read or lacks an utterance.
    """

    bytes = bytes_read = 0
    prefers_window = False

    def __init__(self, cache: Cache, split: str, utterances: SplitRows, index: str | None = None) -> None:
        self._place, self._index = cache.store.location, index
        plan = cache.plan_columns(PLAN_SCHEMA.names)
        plan = Utterances(plan).of_split(split).table
        plan = plan.take(utterances.rows_among(Utterances(plan).texts("id"))).combine_chunks()
        self._rows = Utterances(with_places(cache, plan, index))
        self.is_remote = bool(pc.any(pc.match_substring(self._rows.texts("path"), "://")).as_py())

    def waveform(self, index: int) -> np.ndarray:
        """Return the (S,) float32 waveform of an utterance. CacheError if its audio is missing or has changed."""
        utterance = self._rows[index]
        try:
            return load_waveform(utterance, exact=self._index is None)
        except (ValueError, OSError) as error:
            reason = error.what if isinstance(error, ChangedAudioError) else str(error)
            problem = f"utterance {utterance.id} can't be read: {reason}"
            raise CacheError(_sentence(self._place, problem, self._index)) from error

    def files(self, indices: Sequence[int]) -> list[tuple[LocalCopies, CommittedFile]]:
        """Return no files: those of a corpus are not copied."""
        return []


def with_places(cache: Cache, plan: pa.Table, index: str | None) -> pa.Table:
    """Return rows of a cache's plan with the present places of their audio. The identities of the audio are those of the plan.

    Args:
        cache: The cache.
        plan: Rows of its plan.
        index: Path of an index of the corpus: a Parquet file with the columns ``id`` and ``path``, such as ``corpus/index.parquet`` in
            the folder of a run. None: the places are those of the plan.

    Raises:
        CacheError: If the index can't be read or lacks an utterance.
    """
    if index is None:
        return plan
    try:
        with pq.ParquetFile(index) as file:
            table = file.read(columns=["id", "path"])
            ids, paths = (table[name].cast(pa.large_string()).combine_chunks() for name in ("id", "path"))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise CacheError(
            f"the cache at {cache.store.location} reads its audio from the corpus (cache.audio=source), but {index} is no index of it "
            f"({first_line(error)}); give corpus/index.parquet in the folder of a run with that corpus"
        ) from error
    wanted = Utterances(plan).texts("id")
    rows = pc.index_in(wanted, value_set=ids)
    if rows.null_count:
        lost = wanted[pc.index(pc.is_null(rows), True).as_py()].as_py()
        raise CacheError(
            f"{index} lacks utterance {lost} of the cache at {cache.store.location}; give the index of the corpus that the cache was "
            "made from"
        )
    return plan.set_column(plan.schema.get_field_index("path"), "path", paths.take(rows))


def missing_sources(cache: Cache, index: str | None = None, most: int | None = None) -> str | None:
    """Return a sentence about the files of the corpus that are missing, or None if all are there. URLs are not looked at.

    Args:
        cache: A cache with ``audio`` ``source``.
        index: Index of the corpus as it is now; see `with_places`.
        most: Maximum number of utterances whose files are looked for, at even distances over the cache. Default: all.

    Raises:
        CacheError: If the index can't be read or lacks an utterance.
    """
    utterances = Utterances(with_places(cache, cache.plan, index))
    step = 1 if most is None else max(1, len(utterances) // most)
    files: dict[str, str] = {}
    for utterance in utterances[::step]:
        if not (address := utterance.address).is_remote:
            files.setdefault(address.file, utterance.id)
    with ThreadPoolExecutor(_THREADS) as pool:
        # Path.is_file raises if a parent folder can't be searched.
        there = list(pool.map(os.path.isfile, files))
    lost = [file for file, found in zip(files, there, strict=True) if not found]
    if not lost:
        return None
    problem = f"{len(lost)} of {len(files)} files are missing, such as {lost[0]} of utterance {files[lost[0]]}"
    return _sentence(cache.store.location, problem, index)


def _sentence(place: str, problem: str, index: str | None) -> str:
    """Return a sentence about a problem with the corpus of a cache, and what to do."""
    where = (
        "give the index of the corpus as it is now (corpus/index.parquet in the folder of a run; to commands as --audio)"
        if index is None
        else "run the index stage again"
    )
    return (
        f"the cache at {place} reads its audio from the corpus (cache.audio=source), but {problem}; restore the corpus as it was, or "
        f"{where}, or build a cache with cache.audio=store, which needs no corpus later"
    )
