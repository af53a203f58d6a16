"""Building an audio store: the audio of a corpus in shards, without any teacher, for caches to refer to."""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_distill.teacher_cache.build.build_cache import BuildReport, Progress, write_missing
from ray_distill.teacher_cache.build.shard_audio import ShardAudio, audio_from_corpus
from ray_distill.teacher_cache.build.shard_output import open_output, shard_record
from ray_distill.teacher_cache.build.shard_workers import Workers, map_on_ray
from ray_distill.teacher_cache.build.shard_writer import shard_from_json
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.create import check_location, create_cache
from ray_distill.teacher_cache.storage.failed_utterances import DEFAULT_MAX_FAILED
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.shard_plan import Shard, Shards, Utterance, plan_shards, with_sources
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.whole_files import is_disk_full


def plan_audio(utterances: Iterable[Utterance], shard_seconds: float) -> pa.Table:
    """Return the plan of an audio store, as `plan_shards` does. It has no frames, which only a teacher could count."""
    return plan_shards(utterances, shard_seconds, lambda samples: 0)


def build_audio_store(
    location: str | Path,
    spec: CacheSpec,
    plan: pa.Table,
    *,
    workers: Workers | None = Workers(),
    max_failed: float = DEFAULT_MAX_FAILED,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BuildReport:
    """Create an audio store, or finish an interrupted one.

    Args:
        location: Location of the store, an absolute path or a URI that every node can reach.
        spec: Its specification, from `CacheSpec.of_audio`.
        plan: Table from `plan_audio`. An existing store keeps its own plan, but takes the paths and identities of audio files from
            this one.
        workers: Anything but None decodes on all cores of a cluster; Ray must be initialised. None decodes in this process.
        max_failed, on_progress: As for `build_cache`.

    Raises:
        CacheError: If the location holds something else, another process builds the store, the disk is full, or too many utterances
            can't be decoded.
    """
    assert spec.is_audio_store
    store = Store(location)
    check_location(store)
    with cache_lock(store) as check_lock:
        store.remove_leftovers()
        if Cache.exists(store):
            cache = Cache.open(store)
            if cache.spec != spec:
                raise CacheError(
                    f"{store.location} holds something else than the audio of this corpus in such shards; set cache.audio_path to "
                    "another place"
                )
        else:
            cache = create_cache(store, spec, plan, teacher_name="", teacher_spec="", state={})

        def records(todo: list[Shard], allowed: int) -> Generator[dict[str, Any], None, None]:
            return _records_of(cache, todo, allowed, on_ray=workers is not None)

        shards = Shards(with_sources(cache.plan, plan))
        report = write_missing(cache, shards, records, workers, max_failed, on_progress, check_lock)
        store.remove_leftovers()
    return report


def write_audio(
    cache: Cache, shard: Shard, audio: ShardAudio | None = None, max_failed: int | None = None
) -> dict[str, Any]:
    """Write the file of a shard of an audio store, and return its `shard_record`.

    Args:
        cache: The audio store.
        shard: A shard of its plan.
        audio: Decoded audio. Default: that of the corpus.
        max_failed: Maximum number of failed utterances; a shard with more is not finished. Default: no limit.
    """
    (file,) = cache.files(shard)
    failures: list[str] = []
    failed: dict[str, str] = {}
    full, written = False, 0
    if cache.store.size(file.commit) is None:
        try:
            audio = audio or audio_from_corpus(cache, shard)
            failed = audio.failed
            if max_failed is None or len(failed) <= max_failed:
                with open_output(cache, file, [()], shard, audio) as output:
                    output.write(list(range(len(shard.utterances))), [], None)
                written = cache.store.size(file.name) or 0
        except OSError as error:
            full = is_disk_full(error)
            failures = [f"shard {shard.number} could not be written to {cache.store.location}: {error}"]
    return shard_record(shard, written=written, failed=failed, failures=failures, full=full)


def _records_of(
    cache: Cache, shards: list[Shard], max_failed: int, *, on_ray: bool
) -> Generator[dict[str, Any], None, None]:
    """Write the files of shards in this process or in Ray tasks, and yield the record of each."""
    if not on_ray:
        for shard in shards:
            yield write_audio(cache, shard, max_failed=max_failed)
        return
    location = cache.store.location

    def write(row: dict[str, Any]) -> dict[str, Any]:
        # Ray would try again after an exception, and end with a traceback.
        try:
            return write_audio(Cache.open(location), shard_from_json(row["shard"]), max_failed=max_failed)
        except ValueError as error:
            return {"refused": str(error)}

    yield from map_on_ray(shards, write)
