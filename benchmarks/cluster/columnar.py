"""Time and memory that a driver needs for the index and the plan of a large corpus.

``python -m benchmarks.cluster.columnar`` writes indexes of made-up utterances (13.5 s each on average), reads them, plans a cache of
four mask draws, writes the plan and finds which shard files are missing when half of them are committed. Nothing is decoded, and no
shard file exists: the store lists made-up names, so the time of listing a bucket is not included. Each size has a process of its own,
which is killed when it takes more memory than ``--memory``.
"""

import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.memory import forget_peak, peak_resident_bytes, resident_bytes
from benchmarks.result_file import RESULTS, write_result
from ray_distill.pipeline.corpus.index import INDEX, SKIPPED, CorpusIndex
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.create import create_cache
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.storage.store import Store

DRAWS = 4
_ROWS = 100_000
"""Number of utterances that are made up at a time."""
_WATCHED = 0.2
"""Seconds between two looks at the memory of a process."""

app = typer.Typer(add_completion=False)


class HalfCommitted(Store):
    """A store whose listing of commits has every second shard."""

    shards = 0

    def names(self, prefix: str = "") -> list[str]:
        if prefix != "commits":
            return super().names(prefix)
        folders = ["clean", *(f"masked/draw={draw}" for draw in range(DRAWS))]
        return [f"commits/{folder}/part-{n:05d}.json" for folder in folders for n in range(0, self.shards, 2)]


def write_index(folder: Path, utterances: int) -> None:
    """Write an index with the ids, paths and lengths of a corpus like LibriSpeech."""
    rng = np.random.default_rng(utterances)
    texts = [(name, pa.string()) for name in ("id", "path", "split", "sha256")]
    schema = pa.schema([*texts[:2], ("num_samples", pa.int64()), *texts[2:]])
    with pq.ParquetWriter(folder / INDEX, schema) as writer:
        for begin in range(0, utterances, _ROWS):
            numbers = range(begin, min(begin + _ROWS, utterances))
            ids = [f"{n // 5000:05d}-{n // 50:06d}-{n % 50:04d}" for n in numbers]
            columns = {
                "id": ids,
                "path": [f"/data/corpora/speech/train/{'/'.join(id.split('-')[:2])}/{id}.flac" for id in ids],
                "num_samples": rng.integers(2 * SAMPLE_RATE, 25 * SAMPLE_RATE, len(ids)),
                "split": ["validation" if n % 100 == 0 else "train" for n in numbers],
                "sha256": [hashlib.sha256(id.encode()).hexdigest() for id in ids],
            }
            writer.write_table(pa.table(columns, schema=schema))
    (folder / SKIPPED).write_text("path,reason,message\n")


def cache_spec(fingerprint: str, shard_seconds: float) -> CacheSpec:
    """Return the specification of a cache of HuBERT Base."""
    return CacheSpec(
        teacher="0" * 64,
        num_layers=12,
        dim=768,
        layers=tuple(range(1, 13)),
        masks=MaskDraws(policy=MaskPolicy(mask_prob=0.8, mask_length=10), draws=DRAWS, seed=0),
        codec="fp16",
        corpus=fingerprint,
        shard_seconds=shard_seconds,
        batch_seconds=120,
    )


def measure_size(utterances: int, shard_minutes: float) -> dict[str, Any]:
    """Return the seconds and the peak resident memory of each step for a number of utterances."""
    steps: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        forget_peak()
        began, cpu = time.perf_counter(), time.process_time()
        yield
        taken, cpu = time.perf_counter() - began, time.process_time() - cpu
        steps[name] = {"seconds": taken, "cpu_seconds": cpu, "peak_bytes": peak_resident_bytes()}
        print(f"{utterances:>10,}  {name:20s} {taken:7.2f} s, {cpu:7.2f} of CPU  {peak_resident_bytes() / 1e9:6.2f} GB")

    with tempfile.TemporaryDirectory() as place:
        write_index(Path(place), utterances)
        pa.default_memory_pool().release_unused()
        at_start = resident_bytes()
        with step("read the index"):
            index = CorpusIndex.load(Path(place))
        with step("fingerprint"):
            spec = cache_spec(index.fingerprint, shard_minutes * 60)
        with step("plan the shards"):
            plan = plan_shards(index.utterances, spec.shard_seconds)
        store = HalfCommitted(Path(place) / "cache")
        with step("write the plan"):
            cache = create_cache(store, spec, plan, teacher_name="", teacher_spec="", state={})
        store.shards = cache.record["shards"]
        with step("find what is missing"):
            missing = cache.missing()
        files = store.shards * (1 + DRAWS)
        assert len(missing) >= store.shards // 2
    return {
        "utterances": utterances,
        "hours": cache.record["seconds"] / 3600,
        "shards": store.shards,
        "files": files,
        "resident_at_start": at_start,
        "seconds": sum(figures["seconds"] for figures in steps.values()),
        "cpu_seconds": sum(figures["cpu_seconds"] for figures in steps.values()),
        "peak_bytes": max(figures["peak_bytes"] for figures in steps.values()),
        "steps": steps,
    }


def alone(function: Callable[..., dict[str, Any]], *arguments: object, memory: float) -> dict[str, Any]:
    """Call a function in a new process, which is ended if it takes more than ``memory`` bytes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(function, *arguments)
        (process,) = pool._processes.values()
        while not wait([future], _WATCHED).done:
            if resident_bytes(process.pid) > memory:
                process.kill()
        return future.result()


@app.command()
def measure(
    count: Annotated[str, typer.Option(help="Numbers of utterances, separated by commas.")] = "300000,3000000,17000000",
    shard_minutes: Annotated[float, typer.Option(help="Minutes of audio per shard.")] = 10,
    memory: Annotated[float, typer.Option(help="Gigabytes of resident memory that a process may take.")] = 8,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cluster/columnar.json",
) -> None:
    """Measure all sizes, and write the result file."""
    counts = [int(number) for number in count.split(",")]
    rows = [alone(measure_size, utterances, shard_minutes, memory=memory * 1e9) for utterances in counts]
    write_result(output, shard_minutes=shard_minutes, draws=DRAWS, rows=rows)


if __name__ == "__main__":
    app()
