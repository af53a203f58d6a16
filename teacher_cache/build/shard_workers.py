"""The workers that write the shards of a cache: Ray Data actors with one teacher each, or this process."""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_distill.memory import memory_named, ran_out_of_memory
from ray_distill.teacher_cache.build.shard_audio import ReferredAudio, ShardAudio, load_shard_audio
from ray_distill.teacher_cache.build.shard_writer import ShardWriter, open_writer, shard_from_json, shard_to_json
from ray_distill.teacher_cache.embedded_audio import to_pcm
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.shard_plan import Shard

_SHARDS_AT_ONCE = 20_000
"""Number of shards, with the addresses of their audio, that are given to Ray at a time."""


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


@contextmanager
def ray_errors_as_cache_errors(*, auto: bool = False) -> Iterator[None]:
    """Turn Ray's errors about failed workers into a CacheError of one sentence.

    Args:
        auto: Whether workers find their batches themselves. Default False.
    """
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
            advice += f"{' (a number below what auto found)' if auto else ''} with a new cache.path"
        raise CacheError(
            f"the cache stage stopped because a worker failed ({line}); finished files are kept: {advice}, and run the same command "
            "again"
        ) from error


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
        if failed := len(record["failures"]) + len(json.loads(record["failed"])):
            self._failures.inc(failed)
        if record["bytes"]:
            self._shard.observe(seconds)
            for field, counter in self._counters.items():
                counter.inc(record[field])


class ShardWriterActor:
    """`ShardWriter` in a Ray Data actor. It returns a user's mistake as a record, because Ray would retry after an exception."""

    def __init__(self, location: str, teacher_spec: str, device: str, max_failed: int, gpu_share: float = 1.0) -> None:
        self._metrics = _ShardMetrics()
        self._refused = ""
        try:
            with memory_named("a worker of the cache stage", "lower cache.actors"):
                self._writer = ShardWriter(location, teacher_spec, device, max_failed=max_failed, gpu_share=gpu_share)
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


def records_of(
    cache: Cache,
    shards: Sequence[Shard],
    teacher_spec: str,
    workers: Workers | None,
    max_failed: int,
    audio: str | None = None,
    device: str = "cpu",
) -> Generator[dict[str, Any], None, None]:
    """Write the missing files of shards, and yield the `shard_record` of each as it is finished.

    Args:
        cache: The cache.
        shards: The shards.
        teacher_spec: Specification of the teacher for `load_teacher`.
        workers: Ray Data actors. None writes in this process.
        max_failed: Maximum number of failed utterances of a shard.
        audio: Where the audio is that the cache refers to. Default: the recorded place.
        device: Device of the teacher in this process, without workers. Default ``cpu``.

    Raises:
        CacheError: If a worker failed too often, or there is no such audio.
    """
    if not shards:
        return
    referred = ReferredAudio(cache, audio) if cache.spec.refers_to_store else None
    if workers is None:
        with open_writer(cache, teacher_spec, device, max_failed=max_failed) as writer:
            for shard in shards:
                yield writer.write(shard, load_shard_audio(cache, shard, referred))
        return
    with ray_errors_as_cache_errors(auto=cache.spec.batch_seconds == "auto"):
        for begin in range(0, len(shards), _SHARDS_AT_ONCE):
            some = shards[begin : begin + _SHARDS_AT_ONCE]
            yield from _records_on_ray(cache.store.location, some, teacher_spec, workers, max_failed, referred)


def map_on_ray(
    shards: Sequence[Shard], task: Callable[[dict[str, Any]], dict[str, Any]]
) -> Generator[dict[str, Any], None, None]:
    """Yield the results of a task for each shard, run on one core each, in the order in which they are finished.

    Args:
        shards: The shards.
        task: Function of a row with ``shard``, the text of `shard_to_json`.

    Raises:
        CacheError: If a worker failed too often.
    """
    import ray.data

    _quiet_ray_data()
    with ray_errors_as_cache_errors():
        for begin in range(0, len(shards), _SHARDS_AT_ONCE):
            items = [{"shard": shard_to_json(shard)} for shard in shards[begin : begin + _SHARDS_AT_ONCE]]
            yield from ray.data.from_items(items, override_num_blocks=len(items)).map(task, num_cpus=1).iter_rows()


def _quiet_ray_data() -> None:
    """Keep Ray Data from printing progress bars and plans."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _records_on_ray(
    location: str,
    shards: Sequence[Shard],
    teacher_spec: str,
    workers: Workers,
    max_failed: int,
    referred: ReferredAudio | None,
) -> Iterator[dict[str, Any]]:
    import ray.data

    _quiet_ray_data()
    holder = None if referred is None else referred.location

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        shard = shard_from_json(row["shard"])
        try:
            cache = Cache.open(location)
            elsewhere = (
                None if holder is None else ReferredAudio(cache, holder, {shard.number: json.loads(row["numbers"])})
            )
            decoded = load_shard_audio(cache, shard, elsewhere)
        except (ValueError, OSError) as error:
            decoded = ShardAudio([], [], {}, f"shard {shard.number}: {error}")
        return {
            "shard": row["shard"],
            "pcm": b"".join(to_pcm(waveform) for waveform in decoded.waveforms),
            "audio": decoded.embedded or [b""],
            "failed": json.dumps(decoded.failed),
            "problem": decoded.problem,
        }

    items = [
        {"shard": shard_to_json(shard), "numbers": json.dumps([] if referred is None else referred.numbers(shard))}
        for shard in shards
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(shards)).map(decode, num_cpus=1)
    yield from dataset.map_batches(
        ShardWriterActor,
        fn_constructor_args=(location, teacher_spec, workers.device, max_failed, min(1.0, workers.gpus_per_actor)),
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
