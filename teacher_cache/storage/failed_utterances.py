"""Utterances that a cache lacks because they failed while it was built: recorded in commits, counted, and limited.

A commit record has ``failed``, the reasons by utterance id, if its shard file lacks any utterance. What a file lacks depends on
that file alone, so caches that are built at once, resumed, extended or repaired lack the same utterances:

- An utterance whose audio can't be decoded, or that fails in the file with the audio (the clean pass of the first set of
  layers), is in no file of its shard.
- An utterance that fails in another file, such as that of layers or of a mask draw added later, is missing in that file only.

A reader leaves out the utterances that any of the files it reads lacks.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray_distill.teacher_cache.reading.known_commits import KnownCommits
from ray_distill.teacher_cache.storage.cache import Cache, commit_name
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec, Part

DEFAULT_MAX_FAILED = 0.001
_LEAST = 3
"""Number of utterances that any share above 0 allows to fail."""
_SHOWN = 3
_REASON = 1000
"""Maximum number of characters of a reason."""
_THREADS = 16


def allowed_failures(max_failed: float, utterances: int) -> int:
    """Return how many of a cache's utterances may fail: a count if ``max_failed`` is 1 or more, or else a share, at least 3."""
    if max_failed >= 1:
        return int(max_failed)
    return max(_LEAST, int(max_failed * utterances)) if max_failed else 0


def reason_of(error: Exception) -> str:
    """Return an error as one line of at most 1000 printable characters, for a commit record."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))[:_REASON]


def too_many_error(failed: Mapping[str, str], max_failed: float, utterances: int) -> CacheError:
    """Return the error for more failed utterances than are allowed. It names the first few."""
    some = "; ".join(f"{name}: {reason}" for name, reason in list(failed.items())[:_SHOWN])
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    noun = "1 utterance" if len(failed) == 1 else f"{len(failed)} utterances"
    return CacheError(
        f"{noun} failed while caching, but cache.max_failed={max_failed:g} allows {allowed_failures(max_failed, utterances)} of "
        f"{utterances} ({some}{more}); repair these files, remove them from the corpus, or raise cache.max_failed"
    )


def check_failed(record: Mapping[str, Any], ids: list[str]) -> dict[str, str]:
    """Return the failed utterances in a commit record, of a shard with these ids.

    Raises:
        ValueError: The record names other utterances, or its number of rows does not fit.
    """
    failed: dict[str, str] = record.get("failed", {})
    if not failed.keys() <= set(ids):
        raise ValueError("it names failed utterances that are not in its shard")
    if record["rows"] + len(failed) != len(ids):
        raise ValueError(f"it has {record['rows']} rows and {len(failed)} failed utterances of {len(ids)}")
    return failed


def failed_utterances(cache: Cache, needed: CacheSpec | None = None) -> dict[str, str]:
    """Return the utterances that finished files lack, with reasons, by id in the order of shards.

    Args:
        cache: The cache.
        needed: Only the files that this need reads. Default: all files.

    Raises:
        CacheError: If a commit record is damaged.
    """
    commits = KnownCommits(cache)
    shards = cache.shards
    files = [
        (shard, part)
        for part, members in cache.parts(needed)
        for shard in shards.numbers[members].tolist()
        if commit_name(part, shard) in commits.entries
    ]
    files.sort(key=lambda file: file[0])  # The file with the audio comes first in its shard, and its reason counts.
    lost = {file: failed for file in files if (failed := commits.failed(file[1], file[0])) is None or failed}

    def failed_in(file: tuple[int, Part]) -> dict[str, str]:
        shard, part = file
        (shard_file,) = (found for found in cache.files(shards.numbered(shard), needed) if found.part == part)
        failed: dict[str, str] = (cache.commit_of(shard_file) or {}).get("failed", {})
        return failed

    unknown = [file for file, failed in lost.items() if failed is None]
    with ThreadPoolExecutor(_THREADS) as pool:
        lost |= zip(unknown, pool.map(failed_in, unknown), strict=True)
    found: dict[str, str] = {}
    for failed in lost.values():
        for name, reason in (failed or {}).items():
            found.setdefault(name, reason)
    return found
