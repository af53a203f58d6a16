"""Building a cache with Ray Data: CPU tasks decode shards, and actors with one teacher each write the features."""

import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ray_distill.memory import ran_out_of_memory
from ray_distill.teacher_cache.build.codec_fit import fit_codec_to_corpus
from ray_distill.teacher_cache.build.shard_workers import Workers, ray_errors_as_cache_errors, records_of
from ray_distill.teacher_cache.codecs import is_learned
from ray_distill.teacher_cache.reading.audio_place import check_holds, open_holder, recorded_place, refuse_place
from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST, take_manifest, update_manifest
from ray_distill.teacher_cache.storage.build_statistics import TeacherTime, write_build_statistics
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.create import (
    check_location,
    create_cache,
    grow_cache,
    refuse_derived,
    remove_unused_states,
)
from ray_distill.teacher_cache.storage.failed_utterances import (
    DEFAULT_MAX_FAILED,
    allowed_failures,
    failed_utterances,
    too_many_error,
)
from ray_distill.teacher_cache.storage.lock import cache_lock, disk_full_error
from ray_distill.teacher_cache.storage.shard_plan import Shard, Shards, Utterances, with_sources
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.frame_rate import check_masked
from ray_distill.teacher_cache.teachers import load_teacher

_SHOWN_FAILURES = 5


@dataclass(frozen=True)
class Progress:
    """Progress of a build. Numbers of shards, utterances and seconds include those of earlier builds.

    Attributes:
        shards_done: Number of finished shards.
        shards: Number of all shards.
        utterances_done: Number of utterances in finished shards.
        utterances: Number of all utterances.
        seconds_done: Seconds of audio in finished shards.
        seconds: Seconds of all audio.
        audio_per_second: Seconds of audio cached per second of wall time, in this build.
        busy: Fraction of the build's wall time in which teachers and codecs worked, averaged over the actors.
        elapsed: Wall time of this build in seconds.
    """

    shards_done: int
    shards: int
    utterances_done: int
    utterances: int
    seconds_done: float
    seconds: float
    audio_per_second: float
    busy: float
    elapsed: float


@dataclass(frozen=True)
class BuildReport:
    """Result of a build.

    Attributes:
        written: Number of shards written.
        reused: Number of shards that were finished before.
        elapsed: Wall time in seconds.
        seconds: Seconds of audio in the written shards.
        busy: Seconds in which teachers and codecs worked, summed over the actors.
        batch_seconds: Seconds of audio in the batches of the written shards, ascending, if the workers found them themselves; empty
            otherwise.
    """

    written: int
    reused: int
    elapsed: float
    seconds: float
    busy: float
    batch_seconds: tuple[float, ...] = ()


def build_cache(
    location: str | Path,
    spec: CacheSpec,
    plan: pa.Table,
    teacher_spec: str,
    *,
    teacher_name: str,
    workers: Workers | None = Workers(),
    max_failed: float = DEFAULT_MAX_FAILED,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = lambda note: None,
    audio: str | None = None,
    device: str = "cpu",
) -> BuildReport:
    """Create, resume or extend a cache: write all files that the specification needs and that are missing.

    Args:
        location: Location of the cache, an absolute path or a URI that every node can reach.
        spec: Specification of the cache.
        plan: Table from `plan_shards`. An existing cache keeps its own plan, but takes the paths and identities of audio files from
            this one.
        teacher_spec: Specification of the teacher for `load_teacher` on every node.
        teacher_name: Name of the teacher for people to read, stored in ``cache.json``.
        workers: Ray Data actors; Ray must be initialised. None builds in this process, without Ray.
        max_failed: Number of utterances that may fail, or below 1 their share, at least 3 utterances; 0 allows none. The cache
            lacks an utterance that failed, and its commits record the reason; see `failed_utterances`. Default 0.001.
        on_progress: Called after every shard.
        on_note: Called with what a worker says about itself: the size of the batches that it found, and a smaller one later.
        audio: Location of the finished audio store, or of the cache with audio, that the cache refers to. A new cache with ``audio``
            ``store`` needs it. Default: what an existing cache has recorded.
        device: Device of the teacher in this process, without workers: ``cpu`` or ``cuda``. Default ``cpu``.

    Returns:
        Numbers of shards and times of this build.

    Raises:
        CacheError: If the teacher lacks a layer, its frame rate allows no masked targets, a worker on a CPU shall find the size of its
            batches, the location holds a different cache or other files, another process builds the cache, the disk is full, too
            many utterances failed, or a file of the cache is damaged (all other shards are written before this error is raised).
    """
    unknown = [layer for layer in spec.layers if not 1 <= layer <= spec.num_layers]
    if unknown:
        raise CacheError(f"there is no layer {unknown[0]}; the teacher has layers 1 to {spec.num_layers}")
    if spec.masks.draws and spec.targets != "clean_only":
        check_masked(teacher_name, spec.rate)
    store = Store(location)
    check_location(store)
    if not spec.refers_to_store:
        refuse_place(store, spec, audio)
    device = device if workers is None else workers.device
    with cache_lock(store) as check_lock:
        store.remove_leftovers()
        if spec.batch_seconds == "auto" and device == "cpu":
            _refuse_auto(store, spec)
        cache = _create_or_grow(
            store, spec, plan, teacher_spec, teacher_name, workers, max_failed, audio, check_lock, device
        )
        remove_unused_states(cache)
        # The corpus may have moved since the cache was created. The identity of each file shows that it is the same.
        shards = Shards(with_sources(cache.plan, plan))

        def records(todo: list[Shard], allowed: int) -> Generator[dict[str, Any], None, None]:
            return records_of(cache, todo, teacher_spec, workers, allowed, audio, device)

        report = write_missing(cache, shards, records, workers, max_failed, on_progress, check_lock, on_note, device)
        store.remove_leftovers()
    return report


def _refuse_auto(store: Store, spec: CacheSpec) -> None:
    """Raise CacheError if something is to be built on a CPU, which has no memory to measure."""
    if not (Cache.exists(store) and (cache := Cache.open(store)).covers(spec) and not cache.missing(spec)):
        raise CacheError(
            f"the batches of the cache at {store.location} are auto, which measures the memory of a GPU, but the teacher runs on the "
            "CPU; set cache.gpus_per_actor, or give the seconds, as in cache.batch_seconds=120, and a new cache.path"
        )


def _create_or_grow(
    store: Store,
    spec: CacheSpec,
    plan: pa.Table,
    teacher_spec: str,
    teacher_name: str,
    workers: Workers | None,
    max_failed: float,
    audio: str | None,
    check_lock: Callable[[], None],
    device: str,
) -> Cache:
    if not Cache.exists(store):
        place = _place_of_audio(store, spec, plan, audio) if spec.refers_to_store else None
        state = _fit(spec, spec.layers, plan, teacher_spec, workers, max_failed, device)
        check_lock()
        return create_cache(
            store,
            spec,
            plan,
            teacher_name=teacher_name,
            teacher_spec=teacher_spec,
            state=state,
            threads=torch.get_num_threads() if workers is None else workers.cpus_per_actor,
            audio_path=place,
        )
    cache = Cache.open(store)
    covered = cache.covers(spec)
    if cache.spec.derived_from is not None and not (covered and not cache.missing(spec)):
        refuse_derived(cache, spec)
    if covered:
        return cache
    new = tuple(sorted(set(spec.layers) - set(cache.spec.layers)))
    state = _fit(spec, new, plan, teacher_spec, workers, max_failed, device) if new else {}
    check_lock()
    return grow_cache(cache, spec, state)


def _place_of_audio(store: Store, spec: CacheSpec, plan: pa.Table, audio: str | None) -> str:
    """Return the place of the audio for the record of a new cache, after checking that the audio of its utterances is there."""
    if audio is None:
        raise CacheError(
            f"a new cache at {store.location} without audio needs the place of its audio; set cache.audio_path"
        )
    holder = open_holder(audio)
    if holder.spec.audio_fingerprint != spec.audio_fingerprint:
        raise CacheError(
            f"the cache at {audio} does not hold the audio with the fingerprint {spec.audio_fingerprint[:12]}... that the cache at "
            f"{store.location} shall refer to; set cache.audio_path to the place that does"
        )
    check_holds(holder, Utterances(plan), store.location)
    return recorded_place(store, holder.store)


def _fit(
    spec: CacheSpec,
    layers: tuple[int, ...],
    plan: pa.Table,
    teacher_spec: str,
    workers: Workers | None,
    max_failed: float,
    device: str,
) -> Mapping[str, Tensor]:
    if not is_learned(spec.codec):
        return {}
    if workers is None:
        teacher = load_teacher(teacher_spec, device)
        try:
            return fit_codec_to_corpus(spec, layers, plan, teacher, max_failed)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise CacheError(f"the codec could not be fitted: {_fit_failure(error)}") from error
    import ray

    def fit() -> Mapping[str, Tensor] | str:
        # Ray would wrap an exception in a traceback, and can't pickle every exception.
        try:
            return fit_codec_to_corpus(spec, layers, plan, load_teacher(teacher_spec, device), max_failed)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            return _fit_failure(error)

    task = ray.remote(num_cpus=workers.cpus_per_actor, num_gpus=workers.gpus_per_actor, max_retries=3)(fit)
    with ray_errors_as_cache_errors():
        state: Mapping[str, Tensor] | str = ray.get(task.remote())
    if isinstance(state, str):
        raise CacheError(f"the codec could not be fitted: {state}")
    return state


def _fit_failure(error: Exception) -> str:
    if ran_out_of_memory(error):
        # cache.batch_seconds would not help, because the fit runs one utterance at a time.
        return "the teacher ran out of memory with one utterance; stop other work on its device, or lower corpus.max_seconds"
    if not isinstance(error, (ValueError, OSError)):
        raise error
    return str(error)


def write_missing(
    cache: Cache,
    shards: Shards,
    records_of: Callable[[list[Shard], int], Generator[dict[str, Any], None, None]],
    workers: Workers | None,
    max_failed: float,
    on_progress: Callable[[Progress], None],
    check_lock: Callable[[], None],
    on_note: Callable[[str], None] = lambda note: None,
    device: str = "cpu",
) -> BuildReport:
    """Write all files of a cache without a commit record, and its manifest. Call it only while holding the lock of the cache.

    Args:
        cache: The cache.
        shards: Its shards, with the present addresses of their audio.
        records_of: Function that writes the missing files of shards and yields the `shard_record` of each, given the maximum number
            of failed utterances of a shard.
        workers, max_failed, on_progress: As for `build_cache`.
        check_lock: Raises CacheError if the lock was lost.
        on_note, device: As for `build_cache`. ``device`` is that of the workers if there are any.
    """
    started = time.monotonic()
    missing = cache.missing()
    manifest = take_manifest(cache.store) if missing else None
    todo = [shard for shard in shards if shard.number in missing]
    finished = [shard for shard in shards if shard.number not in missing]
    utterances_before, seconds_before = sum(len(s.utterances) for s in finished), sum(s.seconds for s in finished)
    actors = 1 if workers is None else min(workers.actors, len(todo))
    written = utterances = 0
    seconds = busy = 0.0
    failures: list[str] = []
    allowed = allowed_failures(max_failed, cache.record["utterances"])
    failed: dict[str, str] = {}  # All of the cache's, once any is found.
    failed_shards: list[int] = []
    teacher_time = TeacherTime()
    sizes: set[float] = set()
    # Closing stops the actors, so that none of them writes after the lock is released.
    with closing(records_of(todo, allowed)) as records:
        for record in records:
            check_lock()
            if record.get("refused"):
                raise CacheError(record["refused"])
            for note in record["notes"]:
                on_note(note)
            if record["full"]:
                raise disk_full_error(cache.store, record["failures"][-1])
            if found := json.loads(record["failed"]):
                failed_shards.append(record["shard"])
                failed = (failed or failed_utterances(cache)) | found
                if len(failed) > allowed:
                    # The cause may be removed, so the next build computes these shards again.
                    for file in (file for number in failed_shards for file in missing[number]):
                        cache.store.remove(file.commit)
                    raise too_many_error(failed, max_failed, cache.record["utterances"])
            busy += record["busy"]
            teacher_time.add(TeacherTime.from_columns(record))
            if record["failures"]:
                failures += record["failures"]
                continue
            written += 1
            if cache.spec.batch_seconds == "auto" and record["batch_seconds"]:
                sizes.add(record["batch_seconds"])
            utterances += record["utterances"]
            seconds += record["seconds"]
            elapsed = time.monotonic() - started
            on_progress(
                Progress(
                    len(finished) + written,
                    len(shards),
                    utterances_before + utterances,
                    cache.record["utterances"],
                    seconds_before + seconds,
                    cache.record["seconds"],
                    seconds / elapsed,
                    busy / elapsed / actors,
                    elapsed,
                )
            )
    elapsed = time.monotonic() - started
    if teacher_time.seconds:
        how: dict[str, Any] = {"device": device, "actors": actors, "elapsed": elapsed, "batch_seconds": sorted(sizes)}
        write_build_statistics(cache.store, teacher_time, **how)
    raise_failures(failures)
    if written or not cache.store.size(MANIFEST):
        update_manifest(cache, manifest)
    return BuildReport(written, len(finished), elapsed, seconds, busy, tuple(sorted(sizes)))


def raise_failures(failures: list[str], doing: str = "while caching:") -> None:
    """Raise CacheError with the first few of some failures, if there are any, and what was done then."""
    if failures:
        count = "1 failure" if len(failures) == 1 else f"{len(failures)} failures"
        more = f" and {len(failures) - _SHOWN_FAILURES} more" if len(failures) > _SHOWN_FAILURES else ""
        raise CacheError(f"{count} {doing} {'; '.join(failures[:_SHOWN_FAILURES])}{more}")
