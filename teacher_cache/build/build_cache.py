"""Building a cache with Ray Data: CPU tasks decode shards, and actors with one teacher each write the features."""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ray_distill.memory import memory_named, ran_out_of_memory
from ray_distill.teacher_cache.build.codec_fit import fit_codec_to_corpus
from ray_distill.teacher_cache.build.shard_audio import ShardAudio, load_shard_audio
from ray_distill.teacher_cache.build.shard_writer import ShardWriter, open_writer, shard_from_json, shard_to_json
from ray_distill.teacher_cache.codecs import is_learned
from ray_distill.teacher_cache.embedded_audio import to_pcm
from ray_distill.teacher_cache.storage.build_statistics import TeacherTime, write_build_statistics
from ray_distill.teacher_cache.storage.cache import Cache, check_location
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.create import create_cache, grow_cache, remove_unused_states
from ray_distill.teacher_cache.storage.lock import cache_lock, disk_full_error
from ray_distill.teacher_cache.storage.shard_plan import Shard, with_paths
from ray_distill.teacher_cache.storage.store import Store
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
    """

    written: int
    reused: int
    elapsed: float
    seconds: float
    busy: float


@dataclass(frozen=True)
class Workers:
    """Ray actors that build a cache, with one teacher each.

    Attributes:
        actors: Number of actors.
        gpus_per_actor: Number of GPUs per actor. 0 runs the teachers on CPUs.
        cpus_per_actor: Number of cores per actor. A cache keeps the number of PyTorch threads it was created with.
    """

    actors: int = 1
    gpus_per_actor: float = 0
    cpus_per_actor: int = 1

    @property
    def device(self) -> str:
        """Device of the teachers."""
        return "cuda" if self.gpus_per_actor else "cpu"


def build_cache(
    location: str | Path,
    spec: CacheSpec,
    plan: pa.Table,
    teacher_spec: str,
    *,
    teacher_name: str,
    workers: Workers | None = Workers(),
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BuildReport:
    """Create, resume or extend a cache: write all files that the specification needs and that are missing.

    Args:
        location: Location of the cache, an absolute path or a URI that every node can reach.
        spec: Specification of the cache.
        plan: Table from `plan_shards`. An existing cache keeps its own plan, but takes the paths of audio files from this one.
        teacher_spec: Specification of the teacher for `load_teacher` on every node.
        teacher_name: Name of the teacher for people to read, stored in ``cache.json``.
        workers: Ray Data actors; Ray must be initialised. None builds in this process, without Ray.
        on_progress: Called after every shard.

    Returns:
        Numbers of shards and times of this build.

    Raises:
        CacheError: If the teacher lacks a layer, the location holds a different cache or other files, another process builds
            the cache, the disk is full, or audio files changed since they were indexed (all other shards are written
            before the error is raised).
    """
    unknown = [layer for layer in spec.layers if not 1 <= layer <= spec.num_layers]
    if unknown:
        raise CacheError(f"there is no layer {unknown[0]}; the teacher has layers 1 to {spec.num_layers}")
    store = Store(location)
    check_location(store)
    with cache_lock(store) as check_lock:
        store.remove_leftovers()
        cache = _create_or_grow(store, spec, plan, teacher_spec, teacher_name, workers, check_lock)
        remove_unused_states(cache)
        # The corpus may have moved since the cache was created. The SHA-256 of each waveform shows that it is the same.
        shards = with_paths(cache.shards, dict(zip(plan["id"].to_pylist(), plan["path"].to_pylist(), strict=True)))
        report = _write_missing(cache, shards, teacher_spec, workers, on_progress, check_lock)
        store.remove_leftovers()
    return report


def _create_or_grow(
    store: Store,
    spec: CacheSpec,
    plan: pa.Table,
    teacher_spec: str,
    teacher_name: str,
    workers: Workers | None,
    check_lock: Callable[[], None],
) -> Cache:
    if not Cache.exists(store):
        state = _fit(spec, spec.layers, plan, teacher_spec, workers)
        check_lock()
        return create_cache(
            store,
            spec,
            plan,
            teacher_name=teacher_name,
            teacher_spec=teacher_spec,
            state=state,
            threads=torch.get_num_threads() if workers is None else workers.cpus_per_actor,
        )
    cache = Cache.open(store)
    if cache.covers(spec):
        return cache
    new = tuple(sorted(set(spec.layers) - set(cache.spec.layers)))
    state = _fit(spec, new, plan, teacher_spec, workers) if new else {}
    check_lock()
    return grow_cache(cache, spec, state)


def _fit(
    spec: CacheSpec, layers: tuple[int, ...], plan: pa.Table, teacher_spec: str, workers: Workers | None
) -> Mapping[str, Tensor]:
    if not is_learned(spec.codec):
        return {}
    if workers is None:
        teacher = load_teacher(teacher_spec)
        try:
            return fit_codec_to_corpus(spec, layers, plan, teacher)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise CacheError(f"the codec could not be fitted: {_fit_failure(error)}") from error
    import ray

    def fit() -> Mapping[str, Tensor] | str:
        # Ray would wrap an exception in a traceback, and can't pickle every exception.
        try:
            return fit_codec_to_corpus(spec, layers, plan, load_teacher(teacher_spec, workers.device))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            return _fit_failure(error)

    task = ray.remote(num_cpus=workers.cpus_per_actor, num_gpus=workers.gpus_per_actor, max_retries=3)(fit)
    with _ray_errors_as_cache_errors():
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


@contextmanager
def _ray_errors_as_cache_errors() -> Iterator[None]:
    """Turn Ray's errors about failed workers into a CacheError of one sentence."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # An error in a task is a traceback, whose last line has the message. Ray's own errors have it in their first line.
        line = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
        # The kernel's killer leaves no trace, so a worker that died without a word may have run out of memory too.
        died = isinstance(error, (ray.exceptions.WorkerCrashedError, ray.exceptions.RayActorError))
        advice = "remove the cause"
        if died or ran_out_of_memory(error):
            advice = f"{'if' if died else 'since'} memory ran out, lower cache.actors, or corpus.max_seconds or cache.batch_seconds"
            advice += " with a new cache.path"
        raise CacheError(
            f"the cache stage stopped because a worker failed ({line}); finished files are kept: {advice}, and run the same command "
            "again"
        ) from error


def _write_missing(
    cache: Cache,
    shards: list[Shard],
    teacher_spec: str,
    workers: Workers | None,
    on_progress: Callable[[Progress], None],
    check_lock: Callable[[], None],
) -> BuildReport:
    """Write all files without a commit record."""
    started = time.monotonic()
    missing = cache.missing()
    todo = [shard for shard in shards if shard.number in missing]
    finished = [shard for shard in shards if shard.number not in missing]
    utterances_before, seconds_before = sum(len(s.utterances) for s in finished), sum(s.seconds for s in finished)
    actors = 1 if workers is None else min(workers.actors, len(todo))
    written = utterances = 0
    seconds = busy = 0.0
    failures: list[str] = []
    teacher_time = TeacherTime()
    # Closing stops the actors, so that none of them writes after the lock is released.
    with closing(_records(cache, todo, teacher_spec, workers)) as records:
        for record in records:
            check_lock()
            if record.get("refused"):
                raise CacheError(record["refused"])
            if record["full"]:
                raise disk_full_error(cache.store, record["failures"][-1])
            busy += record["busy"]
            teacher_time.add(TeacherTime.from_columns(record))
            if record["failures"]:
                failures += record["failures"]
                continue
            written += 1
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
        device = "cpu" if workers is None else workers.device
        write_build_statistics(cache.store, teacher_time, device=device, actors=actors, elapsed=elapsed)
    raise_failures(failures)
    return BuildReport(written, len(finished), elapsed, seconds, busy)


def raise_failures(failures: list[str]) -> None:
    """Raise CacheError with the first few of some failures, if there are any."""
    if failures:
        count = "1 failure" if len(failures) == 1 else f"{len(failures)} failures"
        more = f" and {len(failures) - _SHOWN_FAILURES} more" if len(failures) > _SHOWN_FAILURES else ""
        raise CacheError(f"{count} while caching: {'; '.join(failures[:_SHOWN_FAILURES])}{more}")


class _ShardMetrics:
    """Metrics of an actor, exported by its Ray node. Ray adds the prefix ``ray_``, and the suffix ``_total`` to counters."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        self._counters = {
            "utterances": Counter("distill_cache_utterances", "Utterances in the shards written"),
            "seconds": Counter("distill_cache_audio_seconds", "Audio in the shards written, in seconds"),
            "bytes": Counter("distill_cache_bytes", "Bytes of the shards written"),
            "busy": Counter("distill_cache_teacher_seconds", "Seconds in which teachers and codecs worked"),
        }
        self._failures = Counter("distill_cache_failures", "Utterances or shards that could not be cached")
        about = "Seconds from a shard's decoded audio to its last commit"
        self._shard = Histogram("distill_cache_shard_seconds", about, boundaries=[1, 3, 10, 30, 100, 300, 1000])

    def count(self, record: Mapping[str, Any], seconds: float) -> None:
        """Count the record of a shard. A shard already finished when a task is retried is not counted."""
        if failed := len(record["failures"]):
            self._failures.inc(failed)
        elif record["bytes"]:
            self._shard.observe(seconds)
            for field, counter in self._counters.items():
                counter.inc(record[field])


class _ShardWriterActor:
    """`ShardWriter` in a Ray Data actor. It returns a user's mistake as a record, because Ray would retry after an exception."""

    def __init__(self, location: str, teacher_spec: str, device: str) -> None:
        self._metrics = _ShardMetrics()
        self._refused = ""
        try:
            with memory_named("a worker of the cache stage", "lower cache.actors"):
                self._writer = ShardWriter(location, teacher_spec, device)
        except (ValueError, OSError) as error:
            self._refused = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._refused:
            return pa.Table.from_pylist([{"refused": self._refused}])
        started = time.perf_counter()
        try:
            records = self._writer(batch)  # One shard.
        except CacheError as error:
            return pa.Table.from_pylist([{"refused": str(error)}])
        self._metrics.count(records.to_pylist()[0], time.perf_counter() - started)
        return records


def _records(
    cache: Cache, shards: list[Shard], teacher_spec: str, workers: Workers | None
) -> Generator[dict[str, Any], None, None]:
    if not shards:
        return
    if workers is None:
        with open_writer(cache, teacher_spec) as writer:
            for shard in shards:
                yield writer.write(shard)
        return
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    location = cache.store.location

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        shard = shard_from_json(row["shard"])
        try:
            decoded = load_shard_audio(Cache.open(location), shard)
        except (ValueError, OSError) as error:
            decoded = ShardAudio([], [], [f"shard {shard.number}: {error}"])
        return {
            "shard": row["shard"],
            "pcm": b"".join(to_pcm(waveform) for waveform in decoded.waveforms),
            "audio": decoded.embedded or [b""],
            "failures": json.dumps(decoded.failures),
        }

    with _ray_errors_as_cache_errors():
        dataset = ray.data.from_items(
            [{"shard": shard_to_json(shard)} for shard in shards], override_num_blocks=len(shards)
        ).map(decode, num_cpus=1)
        yield from dataset.map_batches(
            _ShardWriterActor,
            fn_constructor_args=(location, teacher_spec, workers.device),
            batch_size=1,
            batch_format="pyarrow",
            # An actor takes two shards at a time: the teacher runs on one while the other is unpacked, written or synced.
            compute=ray.data.ActorPoolStrategy(
                size=min(workers.actors, len(shards)),
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            num_gpus=workers.gpus_per_actor,
            num_cpus=workers.cpus_per_actor,
        ).iter_rows()
