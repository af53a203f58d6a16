"""Measure training's reading from an object store: requests, rates, and the share of time that a training waits for data.

The object store is simulated: the cache is on the local disk, but each request waits as long as one over a network, and bytes pass
at a fixed rate. A fake student takes a fixed time per second of audio: it stands for a card that trains on 7,300 s of audio per second
with 16 cores, scaled to the cores of this machine. No real network is involved.
"""

import os
import statistics
import tempfile
import time
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.cache.slow_store import SlowStore
from benchmarks.result_file import RESULTS, write_result
from benchmarks.small_speech import TRAIN, shared_data, utterances
from ray_distill.student.training.prefetch import TrainingPlan, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.targets.batch_sampler import plan_epoch
from ray_distill.teacher_cache.targets.window_sampler import plan_window_epoch
from ray_distill.teacher_cache.teachers import load_teacher

EPOCHS = 16
THREADS, BATCHES = 32, 4
"""Reading threads and batches at a time: the defaults for an object store, also for the disk, so that only the storage differs."""
FULL_RATE, FULL_CORES = 7_300.0, 16


def main(
    latency: Annotated[float, typer.Option(help="Milliseconds per request.")] = 30,
    megabytes: Annotated[float, typer.Option(help="Megabytes per second of one request.")] = 50,
    seconds: Annotated[float, typer.Option(help="Seconds of training audio.")] = 600,
    shard_seconds: Annotated[float, typer.Option(help="Seconds of audio per shard.")] = 600,
    codec: Annotated[str, typer.Option(help="Codec of the cache.")] = "int8",
    rounds: Annotated[int, typer.Option(help="Number of rounds; medians over them are reported.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Run for a moment, only to try the script.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Record that other work ran on the machine.")] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/remote_reader.json",
) -> None:
    """Read a cache from a disk, row by row from a bucket, and from a bucket with local copies."""
    if quick:
        seconds, shard_seconds, rounds, latency = 60, 30, 1, 5
    torch.set_num_threads(1)
    checkpoint = str(shared_data() / "teacher" / "hubert_small.pt")
    teacher = load_teacher(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = CacheSpec(
            teacher=teacher.fingerprint,
            num_layers=teacher.num_layers,
            dim=teacher.dim,
            layers=tuple(range(1, teacher.num_layers + 1)),
            masks=MaskDraws(policy=MaskPolicy(mask_prob=0.5), draws=1),
            codec=codec,
            corpus="small speech",
            shard_seconds=shard_seconds,
            batch_seconds=60,
        )
        plan = plan_shards(utterances(TRAIN, seconds), spec.shard_seconds)
        build_cache(folder / "cache", spec, plan, checkpoint, teacher_name="hubert_small", workers=None)
        size = cache_bytes(CacheReader(folder / "cache", "train").cache)
        print(f"{size / 1e6:.0f} MB in {len(np.unique(plan['shard']))} shards", flush=True)
        rates = [FULL_RATE * (os.cpu_count() or 1) / FULL_CORES, float("inf")]
        found: dict[tuple[str, float], list[dict[str, float]]] = {}
        for number in range(rounds):
            for rate in rates:
                for way in ("disk", "bucket by rows", "bucket with copies"):
                    place = folder / f"copies-{number}-{rate}"
                    measured = read(folder / "cache", way, place, latency / 1e3, 1e6 * megabytes, rate)
                    found.setdefault((way, rate), []).append(measured)
                    print(way, rate, measured, flush=True)
        rows = [
            {"way": way, "student_rate": None if rate == float("inf") else rate}
            | {key: float(statistics.median(row[key] for row in measured)) for key in measured[0]}
            for (way, rate), measured in found.items()
        ]
    write_result(
        output,
        contended_machine=shared,
        train_seconds=seconds,
        cache_megabytes=size / 1e6,
        latency_ms=latency,
        megabytes_per_second_and_request=megabytes,
        rows=rows,
        order=[order(count, *shape) for count in ([2_000] if quick else [28_500]) for shape in ((6, 48), (48, 48))],
    )


def read(folder: Path, way: str, copies: Path, latency: float, rate: float, student: float) -> dict[str, float]:
    """Read epochs in batches of six utterances, as published, for a student that trains on ``student`` seconds of audio a second."""
    store = None if way == "disk" else SlowStore(folder, latency, rate)
    local = copies if way == "bucket with copies" else None
    reader = CacheReader(store or folder, "train", threads=THREADS, local=local)
    reader.batches_at_once = BATCHES
    opening = 0 if store is None else store.handler.requests
    shards = reader.shards if way == "bucket with copies" else None
    plan = TrainingPlan(reader.num_samples, TrainSettings(batch_size=6, epochs=EPOCHS), 1, shards)
    waited, audio, count = np.zeros(EPOCHS), np.zeros(EPOCHS), 0
    requests = np.zeros(EPOCHS)
    sent = np.zeros(EPOCHS)
    marks = np.zeros(EPOCHS + 1)
    cpu = time.process_time()
    marks[0] = mark = time.perf_counter()
    for micro in micro_batches(plan, reader, Rank(), 0, 1):
        arrived = time.perf_counter()
        waited[micro.epoch] += arrived - mark
        seconds = float(micro.num_samples.sum()) / SAMPLE_RATE
        audio[micro.epoch] += seconds
        count += len(micro.num_samples)
        time.sleep(seconds / student)
        mark = marks[micro.epoch + 1] = time.perf_counter()
        if store is not None:
            requests[micro.epoch] = store.handler.requests - opening - requests[: micro.epoch].sum()
            sent[micro.epoch] = store.handler.sent - sent[: micro.epoch].sum()
    epochs = np.diff(marks)
    return {
        "opening_requests": opening,
        "requests_per_utterance": requests.sum() / count,
        "first_epoch_requests_per_8_mb": requests[0] / max(1.0, sent[0] / (8 << 20)),
        "later_requests": requests[1:].sum(),
        "first_epoch_waiting": waited[0] / epochs[0],
        "later_waiting": waited[1:].sum() / epochs[1:].sum(),
        "later_audio_per_second": audio[1:].sum() / epochs[1:].sum(),
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": epochs.sum(),
    }


def order(count: int, batch_size: int, per_shard: int) -> dict[str, float]:
    """Compare the order by windows with the full shuffle, over four epochs of utterances of one length in shards.

    Returns:
        For each order, the share of the pairs in batches that are of one shard, the number of shards per batch, and the share of
        pairs of an epoch's batches that meet again in a batch of the next epoch.
    """
    lengths, shards = np.full(count, 12 * SAMPLE_RATE), np.arange(count) // per_shard
    found: dict[str, float] = {"utterances": count, "batch_size": batch_size, "utterances_per_shard": per_shard}
    for name in ("full", "window"):
        pairs: list[set[tuple[int, int]]] = []
        of_one_shard, spread = [], []
        for epoch in range(4):
            arguments: dict[str, Any] = {"batch_size": batch_size, "batch_seconds": None, "world_size": 1}
            arguments |= {"accumulate": 2, "seed": 0, "epoch": epoch}
            steps = (
                plan_epoch(lengths, **arguments) if name == "full" else plan_window_epoch(lengths, shards, **arguments)
            )
            batches = [sorted(batch) for step in steps for micro in step for batch in micro]
            pairs.append({pair for batch in batches for pair in combinations(batch, 2)})
            of_one_shard.append(np.mean([shards[a] == shards[b] for a, b in pairs[-1]]))
            spread.append(np.mean([len(set(shards[batch].tolist())) for batch in batches]))
        again = [len(one & other) / len(one) for one, other in pairwise(pairs)]
        found |= {
            f"{name}_pairs_of_one_shard": float(np.mean(of_one_shard)),
            f"{name}_shards_per_batch": float(np.mean(spread)),
            f"{name}_pairs_that_meet_in_the_next_epoch": float(np.mean(again)),
        }
    return found


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
