"""Measure how long a reader takes to open a large cache, its memory and its requests, on metadata without any audio or features.

The folder has the real ``cache.json``, ``plan.parquet``, ``manifest.parquet`` and commit records of a synthetic plan; shard files are
sparse files of their committed size. Beyond ``--files-up-to`` utterances, only the first three files are written, because a reader
does not list or read others. Each opening is a process of its own.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from benchmarks.result_file import RESULTS, write_result
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reading.commit_manifest import rewrite_manifest, write_rows
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec, content_key, parts_of
from ray_distill.teacher_cache.storage.create import create_cache
from ray_distill.teacher_cache.storage.json_record import encode_record
from ray_distill.teacher_cache.storage.shard_plan import PLAN_SCHEMA
from ray_distill.teacher_cache.storage.store import Store

_ROWS = 1 << 19
"""Number of utterances that are made up at a time."""
SPEC = CacheSpec(
    teacher="0" * 64,
    num_layers=12,
    dim=768,
    layers=tuple(range(1, 13)),
    masks=MaskDraws(policy=MaskPolicy(mask_prob=0.5), draws=1),
    codec="fp16",
    corpus="synthetic",
    shard_seconds=600,
    batch_seconds=120,
)


def synthetic_plan(utterances: int) -> pa.Table:
    """Return a plan of utterances of 2 to 25 seconds in shards of 600 s, with ids and paths as long as LibriSpeech's."""
    rng = np.random.default_rng(0)
    samples = rng.integers(2 * SAMPLE_RATE, 25 * SAMPLE_RATE, utterances)
    shard = (np.cumsum(samples) / (SPEC.shard_seconds * SAMPLE_RATE)).astype(np.int32)
    row = (np.arange(utterances) - np.searchsorted(shard, shard)).astype(np.int32)
    tables = []
    for begin in range(0, utterances, _ROWS):
        end = min(begin + _ROWS, utterances)
        ids = [f"{n // 5000}-{n // 50}-{n % 50:04d}-{n:08d}" for n in range(begin, end)]
        hashes = rng.bytes(32 * len(ids)).hex()
        columns = {
            "id": ids,
            "split": pa.array(["train"]).take(pa.array(np.zeros(len(ids), np.int32))),
            "path": [f"/data/corpus/train-clean-100/{name}.flac" for name in ids],
            "sha256": [hashes[64 * n : 64 * n + 64] for n in range(len(ids))],
            "num_samples": samples[begin:end],
            "num_frames": (samples[begin:end] - 400) // 320 + 1,
            "shard": shard[begin:end],
            "row": row[begin:end],
        }
        tables.append(pa.table(columns, schema=PLAN_SCHEMA))
    return pa.concat_tables(tables)


def make(folder: Path, utterances: int, *, files: bool) -> None:
    """Write the metadata of a cache, with commit records and shard files if ``files``."""
    cache = create_cache(
        Store(folder),
        SPEC,
        synthetic_plan(utterances),
        teacher_name="synthetic",
        teacher_spec="random:12x768",
        state={},
    )
    _, counts = np.unique(cache.plan["shard"].to_numpy(), return_counts=True)
    rows = []
    for part in parts_of(SPEC, 1, "train"):
        for shard, count in enumerate(counts.tolist()):
            content = content_key(SPEC, cache.layer_sets[0], part, shard, "train") if files else f"{shard:064x}"
            record = {"rows": count, "bytes": 1 << 20, "sha256": f"{shard:064x}", "content": content}
            if files:
                for name in (f"commits/{part.folder}/part-{shard:05d}.json", f"{part.folder}/part-{shard:05d}.parquet"):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / f"commits/{part.folder}/part-{shard:05d}.json").write_bytes(encode_record(record))
                with (folder / f"{part.folder}/part-{shard:05d}.parquet").open("wb") as file:
                    file.truncate(record["bytes"])
            rows.append((part.folder, shard, record))
    if files:
        rewrite_manifest(folder)
    else:
        write_rows(cache.store, rows)


OPEN = """
import json, sys, time
from pathlib import Path
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.targets.several_caches import SeveralCaches

def gigabytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e6

place = Path(sys.argv[1])
if sys.argv[2] != "local":
    from benchmarks.cache.slow_store import SlowStore
    place = SlowStore(place, float(sys.argv[2]), 50e6)
Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
before = gigabytes("VmRSS")
began, cpu = time.perf_counter(), time.process_time()
reader = CacheReader(place, "train")
if int(sys.argv[3]) > 1:
    others = [CacheReader(place, "train") for _ in range(1, int(sys.argv[3]))]
    reader = SeveralCaches({str(number): one for number, one in enumerate([reader, *others])})
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "cpu_seconds": time.process_time() - cpu,
    "peak_gigabytes": gigabytes("VmHWM") - before,
    "gigabytes": gigabytes("VmRSS") - before,
    "requests": None if isinstance(place, Path) else place.handler.requests,
    "utterances": len(reader),
}))
"""


def opened(folder: Path, store: str, teachers: int = 1) -> dict[str, Any]:
    """Open a cache, or as many as there are teachers, in a new process.

    ``store`` is ``local``, or the latency of a simulated bucket in seconds.
    """
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), store, str(teachers)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(
    utterances: Annotated[str, typer.Option(help="Numbers of utterances, separated by commas.")] = "300000,3000000",
    files_up_to: Annotated[int, typer.Option(help="Utterances up to which all files are written.")] = 300_000,
    latency: Annotated[float, typer.Option(help="Milliseconds per request of the simulated bucket.")] = 30,
    quick: Annotated[bool, typer.Option("--quick", help="Run for a moment, only to try the script.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Record that other work ran on the machine.")] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/opening.json",
) -> None:
    """Measure the opening of caches of several sizes, from a disk and from a simulated bucket."""
    rows = []
    for count in [2_000] if quick else map(int, utterances.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder, began = Path(name), time.perf_counter()
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # Its memory is free again afterwards.
                pool.apply(make, (folder, count), {"files": count <= files_up_to})
            print(f"{count} utterances written in {time.perf_counter() - began:.0f} s", flush=True)
            for store in ("local", str(latency / 1e3)):
                with_manifest = opened(folder, store)
                rows.append({"manifest": True, "store": store, "teachers": 1} | with_manifest)
                print(rows[-1], flush=True)
            rows.append({"manifest": True, "store": "local", "teachers": 3} | opened(folder, "local", 3))
            print(rows[-1], flush=True)
            if count <= files_up_to:
                (folder / "manifest.parquet").unlink()
                rows.append({"manifest": False, "store": "local", "teachers": 1} | opened(folder, "local"))
                print(rows[-1], flush=True)
    write_result(output, contended_machine=shared, latency_ms=latency, megabytes_per_second_and_request=50, rows=rows)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
