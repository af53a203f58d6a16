"""Building a cache with Ray Data: shards decoded on CPUs, one teacher per actor, features straight from it into the shard."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from teacher_cache.building import building
from teacher_cache.codecs import is_learned
from teacher_cache.embedded import to_pcm
from teacher_cache.fit import fit_to_teacher
from teacher_cache.layout import Cache, create_cache, grow_cache, refuse_strangers
from teacher_cache.shards import Shard
from teacher_cache.spec import CacheError, CacheSpec
from teacher_cache.store import Store
from teacher_cache.teachers import Teacher, load_teacher
from teacher_cache.writer import ShardWriter, decode_shard, shard_from_json, shard_to_json

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
        plan: of `plan_shards`.
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
    with building(store):
        store.remove_leftovers()
        cache = _prepared(store, spec, plan, teacher_spec, teacher_name, workers)
        report = write_missing(cache, teacher_spec, workers, on_progress)
        store.remove_leftovers()
    return report


def _prepared(
    store: Store, spec: CacheSpec, plan: pa.Table, teacher_spec: str, teacher_name: str, workers: Workers | None
) -> Cache:
    if not Cache.exists(store):
        state = _fit(spec, spec.layers, plan, teacher_spec, workers)
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
    return grow_cache(cache, spec, state)


def _fit(
    spec: CacheSpec, layers: tuple[int, ...], plan: pa.Table, teacher_spec: str, workers: Workers | None
) -> Mapping[str, Tensor]:
    if not is_learned(spec.codec):
        return {}
    if workers is None:
        return fit_to_teacher(spec, layers, plan, load_teacher(teacher_spec))
    import ray

    def fit() -> Mapping[str, Tensor]:
        return fit_to_teacher(spec, layers, plan, load_teacher(teacher_spec, workers.device))

    task = ray.remote(num_cpus=workers.cpus_per_actor, num_gpus=workers.gpus_per_actor, max_retries=3)(fit)
    state: Mapping[str, Tensor] = ray.get(task.remote())
    return state


def write_missing(
    cache: Cache,
    teacher: str | Teacher,
    workers: Workers | None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BuildReport:
    """Writes all files without a commit record; the caller holds the claim (`building`). See `build_cache`."""
    started = time.monotonic()
    missing = cache.missing()
    todo = [shard for shard in cache.shards if shard.number in missing]
    there = [shard for shard in cache.shards if shard.number not in missing]
    done = seconds = 0.0
    utterances = 0
    busy = 0.0
    failures: list[str] = []
    full = False
    records = _records(cache, todo, teacher, workers) if todo else iter(())
    for count, record in enumerate(records, 1):
        failures += record["failures"]
        if record["full"]:
            full = True
            break
        seconds += record["seconds"]
        utterances += record["utterances"]
        busy += record["busy"]
        elapsed = time.monotonic() - started
        actors = 1 if workers is None else min(workers.actors, len(todo))
        on_progress(
            Progress(
                len(there) + count,
                len(cache.shards),
                sum(len(shard.utterances) for shard in there) + utterances,
                cache.record["utterances"],
                sum(shard.seconds for shard in there) + seconds,
                cache.record["seconds"],
                seconds / elapsed,
                busy / elapsed / actors,
                elapsed,
            )
        )
        done += 1
    elapsed = time.monotonic() - started
    if full:
        raise CacheError(
            f"the disk of {cache.store.location} is full ({failures[-1]}); what is finished stays: make room and run again"
        )
    if failures:
        more = f" and {len(failures) - _FAILURES_SHOWN} more" if len(failures) > _FAILURES_SHOWN else ""
        raise CacheError(
            f"{len(failures)} utterances could not be cached: {'; '.join(failures[:_FAILURES_SHOWN])}{more}"
        )
    return BuildReport(len(todo), len(there), elapsed, seconds, busy)


def _records(
    cache: Cache, shards: list[Shard], teacher: str | Teacher, workers: Workers | None
) -> Iterator[dict[str, Any]]:
    if workers is None or isinstance(teacher, Teacher):
        threads = torch.get_num_threads()
        try:
            writer = ShardWriter(cache.store.location, teacher)
            for shard in shards:
                yield writer.write(shard)
        finally:
            torch.set_num_threads(threads)
        return
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    location = cache.store.location

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        decoded = decode_shard(Cache.open(location), shard_from_json(row["shard"]))
        return {
            "shard": row["shard"],
            "pcm": b"".join(to_pcm(waveform) for waveform in decoded.waveforms),
            "audio": decoded.embedded or [b""],
            "failures": json.dumps(decoded.failures),
        }

    dataset = ray.data.from_items(
        [{"shard": shard_to_json(shard)} for shard in shards], override_num_blocks=len(shards)
    ).map(decode, num_cpus=1)
    yield from dataset.map_batches(
        ShardWriter,
        fn_constructor_args=(location, teacher, workers.device),
        batch_size=1,
        batch_format="pyarrow",
        # Two shards at a time in one actor: one is at the teacher while the other is unpacked, written or synced.
        compute=ray.data.ActorPoolStrategy(
            size=min(workers.actors, len(shards)), max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_gpus=workers.gpus_per_actor,
        num_cpus=workers.cpus_per_actor,
    ).iter_rows()
