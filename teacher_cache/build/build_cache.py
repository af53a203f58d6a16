"""Building a cache with Ray Data: shards decoded on CPUs, one teacher per actor, features straight from it into the shard."""

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

from ray_distill.teacher_cache.build.codec_fit import fit_to_teacher
from ray_distill.teacher_cache.build.shard_writer import (
    ShardAudio,
    ShardWriter,
    decode_shard,
    shard_from_json,
    shard_to_json,
)
from ray_distill.teacher_cache.codecs import is_learned
from ray_distill.teacher_cache.embedded_audio import to_pcm
from ray_distill.teacher_cache.storage.build_statistics import TeacherWork, write_build
from ray_distill.teacher_cache.storage.cache import (
    COPIES,
    Cache,
    create_cache,
    grow_cache,
    refuse_strangers,
    state_name,
)
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.lock import building, full_disk
from ray_distill.teacher_cache.storage.shard_plan import Shard, moved
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import Teacher, load_teacher

_FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
        shards_done, shards: with those that were there before.
        utterances_done, utterances: likewise.
        seconds_done, seconds: of audio, likewise.
        audio_per_second: seconds of audio cached per second of wall time, in this build.
        busy: share of the build's time in which teachers worked, averaged over the actors.
        elapsed: wall seconds of this build.
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
    """What a build did: shards written now, shards that were there already, wall seconds, seconds of audio written."""

    written: int
    reused: int
    elapsed: float
    seconds: float
    busy: float


@dataclass(frozen=True)
class Workers:
    """Who builds: Ray actors, each with a teacher.

    Attributes:
        actors: teachers that run side by side.
        gpus_per_actor: GPUs each takes; 0 runs on the CPU.
        cpus_per_actor: cores each takes. A cache keeps to the number of PyTorch threads that it was begun with.
    """

    actors: int = 1
    gpus_per_actor: float = 0
    cpus_per_actor: int = 1

    @property
    def device(self) -> str:
        """Where the teachers compute."""
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
    """Begins a cache, or goes on with it, or adds to it: writes whatever the spec needs and is not there.

    Args:
        location: of the cache, reachable from every node: an absolute path or a URI.
        spec: what is needed.
        plan: of `plan_shards`. A cache that is there keeps its own, but audio is looked for where this one says.
        teacher_spec: for `load_teacher`, on every node.
        teacher_name: for people, kept in ``cache.json``.
        workers: Ray Data actors; Ray must be initialised. None does it all in this process, without Ray.
        on_progress: called after every shard.

    Raises:
        CacheError: the teacher lacks a layer, the location holds something else, another builder is at work, the disk is full,
            or files changed since the index (all others are cached first).
    """
    wrong = [layer for layer in spec.layers if not 1 <= layer <= spec.num_layers]
    if wrong:
        raise CacheError(f"there is no layer {wrong[0]}; the teacher has layers 1 to {spec.num_layers}")
    store = Store(location)
    refuse_strangers(store)
    with building(store) as check:
        store.remove_leftovers()
        cache = _prepared(store, spec, plan, teacher_spec, teacher_name, workers, check)
        _remove_states_of_no_set(cache)
        # The corpus may lie elsewhere now than when the cache was begun; that the audio is the same, its SHA-256 says.
        shards = moved(cache.shards, dict(zip(plan["id"].to_pylist(), plan["path"].to_pylist(), strict=True)))
        report = _write_missing(cache, shards, teacher_spec, workers, on_progress, check)
        store.remove_leftovers()
    return report


def _prepared(
    store: Store,
    spec: CacheSpec,
    plan: pa.Table,
    teacher_spec: str,
    teacher_name: str,
    workers: Workers | None,
    check: Callable[[], None],
) -> Cache:
    if not Cache.exists(store):
        state = _fit(spec, spec.layers, plan, teacher_spec, workers)
        check()
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
    check()
    return grow_cache(cache, spec, state)


def _remove_states_of_no_set(cache: Cache) -> None:
    """A builder killed before it wrote ``cache.json`` leaves a codec's state; what is built now may need none."""
    known = {state_name(number) for number, chosen in enumerate(cache.layer_sets) if chosen.state is not None}
    for name in (*cache.store.names("codec"), *cache.store.names(f"{COPIES}/codec")):
        if name.removeprefix(f"{COPIES}/") not in known and Path(name).name.startswith("set="):
            cache.store.remove(name)


def _fit(
    spec: CacheSpec, layers: tuple[int, ...], plan: pa.Table, teacher_spec: str, workers: Workers | None
) -> Mapping[str, Tensor]:
    if not is_learned(spec.codec):
        return {}
    if workers is None:
        teacher = load_teacher(teacher_spec)
        try:
            return fit_to_teacher(spec, layers, plan, teacher)
        except (ValueError, torch.OutOfMemoryError) as error:
            raise CacheError(f"the codec could not be fitted: {_fit_failure(error)}") from error
    import ray

    def fit() -> Mapping[str, Tensor] | str:
        # Ray would wrap an exception in its traceback, and can't carry every one.
        try:
            return fit_to_teacher(spec, layers, plan, load_teacher(teacher_spec, workers.device))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            return _fit_failure(error)

    task = ray.remote(num_cpus=workers.cpus_per_actor, num_gpus=workers.gpus_per_actor, max_retries=3)(fit)
    with _ray_in_one_sentence():
        state: Mapping[str, Tensor] | str = ray.get(task.remote())
    if isinstance(state, str):
        raise CacheError(f"the codec could not be fitted: {state}")
    return state


def _fit_failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        # Not for cache.batch_seconds: here it takes one at a time.
        return "the teacher ran out of memory with one utterance; keep other work off its device, or lower corpus.max_seconds"
    return str(error)


@contextmanager
def _ray_in_one_sentence() -> Iterator[None]:
    """What Ray says of workers that failed, as a CacheError."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # Of an error in a task it is a traceback, whose last line says what; of one of Ray's own the first line does.
        line = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
        raise CacheError(
            f"the cache stage was broken off, since a worker failed ({line}); what is finished stays: once the cause is "
            "removed, run the same command again"
        ) from error


def _write_missing(
    cache: Cache,
    shards: list[Shard],
    teacher_spec: str,
    workers: Workers | None,
    on_progress: Callable[[Progress], None],
    check: Callable[[], None],
) -> BuildReport:
    """Writes all files without a commit record."""
    started = time.monotonic()
    missing = cache.missing()
    todo = [shard for shard in shards if shard.number in missing]
    there = [shard for shard in shards if shard.number not in missing]
    utterances_there, seconds_there = sum(len(shard.utterances) for shard in there), sum(s.seconds for s in there)
    actors = 1 if workers is None else min(workers.actors, len(todo))
    written = utterances = 0
    seconds = busy = 0.0
    failures: list[str] = []
    work = TeacherWork()
    # Closed whatever happens, so that no actor writes on after the claim is given up.
    with closing(_records(cache, todo, teacher_spec, workers)) as records:
        for record in records:
            check()
            if record.get("refused"):
                raise CacheError(record["refused"])
            if record["full"]:
                raise full_disk(cache.store, record["failures"][-1])
            busy += record["busy"]
            work.add(TeacherWork.of(record))
            if record["failures"]:
                failures += record["failures"]
                continue
            written += 1
            utterances += record["utterances"]
            seconds += record["seconds"]
            elapsed = time.monotonic() - started
            on_progress(
                Progress(
                    len(there) + written,
                    len(shards),
                    utterances_there + utterances,
                    cache.record["utterances"],
                    seconds_there + seconds,
                    cache.record["seconds"],
                    seconds / elapsed,
                    busy / elapsed / actors,
                    elapsed,
                )
            )
    elapsed = time.monotonic() - started
    if work.seconds:
        device = "cpu" if workers is None else workers.device
        write_build(cache.store, work, device=device, actors=actors, elapsed=elapsed)
    refuse_failures(failures)
    return BuildReport(written, len(there), elapsed, seconds, busy)


def refuse_failures(failures: list[str]) -> None:
    """CacheError of the first few sentences, where there are any."""
    if failures:
        more = f" and {len(failures) - _FAILURES_SHOWN} more" if len(failures) > _FAILURES_SHOWN else ""
        raise CacheError(
            f"{len(failures)} utterances could not be cached: {'; '.join(failures[:_FAILURES_SHOWN])}{more}"
        )


@contextmanager
def writer_here(cache: Cache, teacher: str | Teacher, device: str = "cpu") -> Iterator[ShardWriter]:
    """A writer in this process, with the cache's number of PyTorch threads while the block runs."""
    threads = torch.get_num_threads()
    try:
        yield ShardWriter(cache.store.location, teacher, device)
    finally:
        torch.set_num_threads(threads)


class _ShardMetrics:
    """What an actor wrote, for the exporter of its node. Ray puts ``ray_`` before each name, and ``_total`` after a counter's."""

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
        """A shard's record, and how long it took. One that was there already, as a retried task finds it, counts for nothing."""
        if failed := len(record["failures"]):
            self._failures.inc(failed)
        elif record["bytes"]:
            self._shard.observe(seconds)
            for field, counter in self._counters.items():
                counter.inc(record[field])


class _ShardWriterActor:
    """`ShardWriter` in a Ray Data actor. What it raises for the user comes back in a record: Ray would try again and again."""

    def __init__(self, location: str, teacher_spec: str, device: str) -> None:
        self._metrics = _ShardMetrics()
        self._refused = ""
        try:
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
        with writer_here(cache, teacher_spec) as writer:
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
            decoded = decode_shard(Cache.open(location), shard)
        except (ValueError, OSError) as error:
            decoded = ShardAudio([], [], [f"shard {shard.number}: {error}"])
        return {
            "shard": row["shard"],
            "pcm": b"".join(to_pcm(waveform) for waveform in decoded.waveforms),
            "audio": decoded.embedded or [b""],
            "failures": json.dumps(decoded.failures),
        }

    with _ray_in_one_sentence():
        dataset = ray.data.from_items(
            [{"shard": shard_to_json(shard)} for shard in shards], override_num_blocks=len(shards)
        ).map(decode, num_cpus=1)
        yield from dataset.map_batches(
            _ShardWriterActor,
            fn_constructor_args=(location, teacher_spec, workers.device),
            batch_size=1,
            batch_format="pyarrow",
            # Two shards at a time in one actor: one is at the teacher while the other is unpacked, written or synced.
            compute=ray.data.ActorPoolStrategy(
                size=min(workers.actors, len(shards)),
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            num_gpus=workers.gpus_per_actor,
            num_cpus=workers.cpus_per_actor,
        ).iter_rows()
