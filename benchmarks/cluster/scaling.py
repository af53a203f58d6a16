"""Compare the simulation in `simulation` with small real runs, and apply it to large ones.

``measure`` builds the small corpus with one Ray actor, with two, and with two of which one is killed half-way. Two ranks then read a
cache with the real reader and prefetching from a throttled store of fixed bandwidth, with a pause in place of the computation. The
rate, spread and start-up time of a worker are fitted to the builds by one actor, and all other runs are predicted from them. It also
measures the unit costs in `configs/clusters` that no other benchmark measures. ``plot`` draws the figures of the page on scaling.
"""

import json
import math
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.cluster.simulation import BuildWorkers, Trainers, simulate_build, simulate_training
from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import TRAIN, shared_data, utterances
from ray_distill.pipeline.planning.cluster import load_cluster
from ray_distill.pipeline.planning.cluster_plan import HOURS, plan_cluster
from ray_distill.student.training.prefetch import PREFETCH, TrainingPlan, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.build.shard_workers import Workers
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.targets.target_batch import Batch
from ray_distill.teacher_cache.teachers import load_teacher

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=10), draws=2)


def build(
    folder: Path, members: list[Utterance], actors: int | None, shard_seconds: float, kill_at: float | None = None
) -> dict[str, Any]:
    """Build a cache. Return the times at which shards were finished, and the audio of each."""
    checkpoint = str(shared_data() / "teacher" / "hubert_small.pt")
    teacher = load_teacher(checkpoint)
    spec = CacheSpec(
        teacher=teacher.fingerprint,
        num_layers=teacher.num_layers,
        dim=teacher.dim,
        layers=tuple(range(1, teacher.num_layers + 1)),
        masks=MASKS,
        codec="int8",  # It needs little fitting; one-time costs of a build are not measured here.
        corpus="small speech",
        shard_seconds=shard_seconds,
        batch_seconds=30.0,
    )
    plan = plan_shards(members, shard_seconds)
    finished: list[float] = []
    killed: list[float] = []
    began = time.perf_counter()

    def on_progress(progress: Any) -> None:
        finished.append(time.perf_counter() - began)
        if kill_at is not None and not killed and progress.seconds_done >= kill_at * progress.seconds:
            # Only descendants of this process, since another Ray may run on this machine.
            own = psutil.Process().children(recursive=True)
            next(process for process in own if _is_actor(process)).kill()
            killed.append(time.perf_counter() - began)

    build_cache(
        folder,
        spec,
        plan,
        checkpoint,
        teacher_name="benchmark",
        workers=None if actors is None else Workers(actors),
        on_progress=on_progress,
    )
    cache = Cache.open(folder)
    ids = [utterance.id for shard in cache.shards for utterance in shard.utterances]
    assert len(ids) == len(set(ids)) == len(members) and not cache.missing()
    return {
        "actors": actors,
        "shards": [shard.seconds for shard in cache.shards],
        "finished": finished,
        "killed_at": killed[0] if killed else None,
    }


def _is_actor(process: psutil.Process) -> bool:
    return process.is_running() and "ShardWriterActor" in " ".join(process.cmdline())


def fit_worker(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Fit the rate, spread and start-up time of a worker to builds by one actor."""
    rates, spreads, starts = [], [], []
    for run in runs:
        ends, audio = run["finished"], run["shards"]
        rate = sum(audio[1:]) / (ends[-1] - ends[0])
        rates.append(rate)
        logs = [math.log((b - a) * rate / s) for a, b, s in zip(ends, ends[1:], audio[1:], strict=False)]
        spreads.append(statistics.pstdev(logs))
        starts.append(ends[0] - audio[0] / rate)
    return {
        "audio_per_second": statistics.median(rates),
        "straggling": statistics.median(spreads),
        "start_seconds": statistics.median(starts),
    }


class Throttled:
    """A reader that shares one store of fixed bandwidth with other readers."""

    def __init__(self, reader: CacheReader, store: "Store") -> None:
        self._reader, self._store = reader, store
        self.num_samples, self.num_frames, self.draws = reader.num_samples, reader.num_frames, reader.draws
        self.read_seconds = 0.0
        self.batches = 0

    def read(self, indices: list[int], draw: int | None) -> Batch:
        began, before = time.perf_counter(), self._reader.bytes_read
        batch = self._reader.read(indices, draw)
        self.read_seconds += time.perf_counter() - began
        self.batches += 1
        self._store.take(self._reader.bytes_read - before)
        return batch


class Store:
    """A store with fixed bandwidth, first come, first served."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate, self._lock, self._free = bytes_per_second, threading.Lock(), time.perf_counter()

    def take(self, count: int) -> None:
        """Return when ``count`` bytes have passed."""
        with self._lock:
            self._free = max(self._free, time.perf_counter()) + count / self._rate
            until = self._free
        time.sleep(max(0.0, until - time.perf_counter()))


def train(cache: Path, steps: int, step_seconds: float, bytes_per_second: float) -> dict[str, float]:
    """Run two ranks in threads with the real reader and prefetching, a pause in place of the computation, and a barrier per step."""
    settings = TrainSettings(epochs=1000, max_steps=steps, batch_seconds=20.0, workers=2)
    store, barrier = Store(bytes_per_second), threading.Barrier(2)
    readers = [Throttled(CacheReader(cache, "train", threads=1), store) for _ in range(2)]
    plan = [TrainingPlan(reader.num_samples, settings, 2) for reader in readers]
    began = time.perf_counter()

    def rank(index: int) -> None:
        feed = micro_batches(plan[index], readers[index], Rank(index, 2, torch.device("cpu")), 0, 1)
        for _ in feed:
            barrier.wait()
            time.sleep(step_seconds)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    batches = sum(reader.batches for reader in readers)
    return {
        "step_seconds": step_seconds,
        "store_bytes_per_second": bytes_per_second,
        "steps": steps,
        "seconds": seconds,
        "batch_bytes": sum(reader._reader.bytes_read for reader in readers) / batches,
        "unpack_seconds": sum(reader.read_seconds for reader in readers) / batches,
    }


@app.command()
def measure(
    seconds: Annotated[float, typer.Option(help="Seconds of speech.")] = 600,
    rounds: Annotated[int, typer.Option(help="Rounds in which all ways of building take turns.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run for a moment and without Ray, only to try the script.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cluster/scaling.json",
) -> None:
    """Compare the simulation with real builds and reads."""
    torch.set_num_threads(1)
    shard, rounds, steps = (4.0, 1, 20) if quick else (seconds / 30, rounds, 300)
    members = utterances(TRAIN, 40 if quick else seconds)
    audio_seconds = sum(u.num_samples for u in members) / 16_000
    began = time.perf_counter()
    for member in members:
        load_audio(Path(member.path))
    decoded = audio_seconds / (time.perf_counter() - began)
    ways: list[tuple[int | None, float | None]] = [(None, None)] if quick else [(1, None), (2, None), (2, 0.4)]
    if not quick:
        import ray

        ray.init(
            num_cpus=4,  # One CPU per teacher and one for decoding share the machine's cores, as on a real node.
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}},
        )
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for round_ in range(rounds):
            for actors, kill_at in ways:
                folder = Path(name) / f"{round_}-{actors}-{kill_at}"
                runs.append({"round": round_} | build(folder, members, actors, shard, kill_at))
                print(f"{actors} actors, killed {kill_at}: {runs[-1]['finished'][-1]:.1f} s", flush=True)
        single = [run for run in runs if run["actors"] in (None, 1)]
        worker = fit_worker(single)
        builds = []
        for run in runs:
            kills = [] if run["killed_at"] is None else [(run["killed_at"], 0)]
            workers = BuildWorkers(run["actors"] or 1, **worker)
            simulated = [simulate_build(run["shards"], workers, seed=s, kills=kills).seconds for s in range(200)]
            builds.append(run | {"seconds": run["finished"][-1], "simulated_seconds": statistics.median(simulated)})
        cache = Path(name) / f"0-{ways[0][0]}-{ways[0][1]}"
        stored = Cache.open(cache)
        free = train(cache, steps, 0.0, 1e12)
        reads = []
        # From a store that is fast enough to one that is twice too slow.
        for share in (4.0, 1.2, 0.8, 0.5):
            step = 0.05
            real = train(cache, steps, step, share * 2 * free["batch_bytes"] / step)
            trainers = Trainers(
                ranks=2,
                step_seconds=step,
                batch_bytes=real["batch_bytes"],
                store_bytes_per_second=real["store_bytes_per_second"],
                unpack_seconds=free["unpack_seconds"],
                prefetch=PREFETCH,
            )
            simulated = simulate_training(steps, trainers).seconds
            reads.append(real | {"share_of_need": share, "simulated_seconds": simulated})
            print(f"store with {share:g} of the need: {real['seconds']:.1f} s, simulated {simulated:.1f} s", flush=True)
        flac = sum(Path(u.path).stat().st_size for u in members) / audio_seconds
        audio_bytes = _audio_bytes(stored)
    write_result(
        output,
        seconds_of_audio=audio_seconds,
        source_bytes_per_second=flac,
        audio_bytes_per_second=audio_bytes,
        utterance_seconds=audio_seconds / len(members),
        decode_audio_per_second=decoded,
        passes=1 + MASKS.draws,
        worker=worker,
        builds=builds,
        reads=reads,
    )


def _audio_bytes(cache: Cache) -> float:
    """Return the bytes of audio in the shards per second of audio."""
    import pyarrow.parquet as pq

    total = 0
    for shard in cache.shards:
        file = cache.files(shard)[0]
        metadata = pq.ParquetFile(cache.store.at(file.name)).metadata
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                if chunk.path_in_schema == "audio":
                    total += chunk.total_compressed_size
    return total / sum(shard.seconds for shard in cache.shards)


@app.command()
def plot(
    source: Annotated[Path, typer.Option(help="Result file of `measure`.")] = RESULTS / "cluster/scaling.json",
    cluster: Annotated[Path, typer.Option(help="Description of the cluster for the large corpora.")] = REPOSITORY
    / "configs"
    / "clusters"
    / "h100-object-store.yaml",
    output: Annotated[Path, typer.Option(help="Folder of the figures.")] = REPOSITORY / "docs" / "pictures",
    shards: Annotated[int, typer.Option(help="Shards of the simulated build.")] = 360_000,
) -> None:
    """Plot real against simulated runs, and the cost of failures and stragglers in a large build and a large training."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "scaling", "font.size": 9}
    from matplotlib import pyplot

    record = json.loads(source.read_text())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    kinds = {(None, False): "this process", (1, False): "1 actor (fitted)", (2, False): "2 actors"}
    kinds[2, True] = "2 actors, one killed"
    for number, (kind, name) in enumerate(kinds.items()):
        found = [row for row in record["builds"] if (row["actors"], row["killed_at"] is not None) == kind]
        if found:
            left.plot(
                [row["simulated_seconds"] for row in found],
                [row["seconds"] for row in found],
                "o",
                color=f"C{number}",
                label=name,
            )
            errors = [100 * (row["simulated_seconds"] / row["seconds"] - 1) for row in found]
            real, simulated = _median(found, "seconds"), _median(found, "simulated_seconds")
            print(f"| build, {name} | {real:.1f} | {simulated:.1f} | {statistics.median(errors):+.0f} % |")
    for row in record["reads"]:
        error = 100 * (row["simulated_seconds"] / row["seconds"] - 1)
        print(
            f"| reads, store with {row['share_of_need']:g} of the need | {row['seconds']:.1f} | "
            f"{row['simulated_seconds']:.1f} | {error:+.0f} % |"
        )
    rows = record["reads"]
    left.plot(
        [r["simulated_seconds"] for r in rows], [r["seconds"] for r in rows], "s", color="C4", label="reads of trainers"
    )
    ends = [0, 1.1 * max(row["seconds"] for row in [*record["builds"], *rows])]
    left.plot(ends, ends, color="grey", linewidth=0.8)
    left.set(xlabel="simulated seconds", ylabel="real seconds", title="fit")
    left.legend()
    described = load_cluster(cluster)
    rate = described.build.number("teacher_audio_per_second", RESULTS) / (1 + described.speech.draws)
    ideal = simulate_build([600.0] * shards, BuildWorkers(16, rate)).seconds
    failures = (0.0, 0.1, 1.0, 10.0, 60.0)
    for number, start in enumerate((30, 120, 600)):
        walls = []
        for often in failures:
            workers = BuildWorkers(16, rate, record["worker"]["straggling"], often, start_seconds=start)
            walls.append(simulate_build([600.0] * shards, workers, seed=1).seconds / ideal)
        right.plot(failures, walls, "o-", color=f"C{number}", label=f"{start} s to start a worker")
        print(f"{start} s: " + ", ".join(f"{f:g}/h {w:.3f}" for f, w in zip(failures, walls, strict=True)))
    right.set(xlabel="failures of each worker per hour", ylabel="wall time / ideal wall time", yscale="log")
    right.set(title=f"build of {shards * 10 / 60:,.0f} h by 16 workers")
    right.set_xscale("symlog", linthresh=0.1)
    right.legend()
    figure.tight_layout()
    figure.savefig(output / "scaling-build.svg", metadata={"Date": None})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    counts = [8, 16, 32, 64, 128, 256]
    for number, hours in enumerate(HOURS):
        more = [
            described.model_copy(update={"build": described.build.model_copy(update=_more(count))}) for count in counts
        ]
        plans = [plan_cluster(one, hours) for one in more]
        left.plot(counts, [plan.build_wall for plan in plans], "o-", color=f"C{number}", label=f"{hours:,.0f} h")
    left.set(xscale="log", yscale="log", xlabel="teachers (8 to a node)", ylabel="minimum hours to build")
    left.set(title="builds: flat where the store is saturated")
    left.legend()
    student = described.train.number("student_audio_per_second", RESULTS)
    plan = plan_cluster(described, 960)
    batch = 240.0
    requests = batch / described.speech.number("utterance_seconds", RESULTS) * 2
    for number, (seconds, threads) in enumerate(((0.002, 4), (0.03, 4), (0.03, 32), (0.03, 128))):
        walls = []
        for ranks in counts:
            trainers = Trainers(
                ranks,
                batch / student,
                batch * plan.epoch_bytes / (960 * 3600),
                described.store.number("bytes_per_second", RESULTS),
                latency_seconds=seconds * max(1.0, requests / threads),
                latency_spread=0.3,
                straggling=0.05,
                prefetch=PREFETCH,
            )
            walls.append(simulate_training(1000, trainers).seconds / (1000 * batch / student))
        name = f"{seconds * 1000:.0f} ms a request, {threads} threads"
        right.plot(counts, walls, "o-", color=f"C{number}", label=name)
        print(f"{name}: " + ", ".join(f"{n} {w:.2f}" for n, w in zip(counts, walls, strict=True)))
    right.set(xscale="log", xlabel="trainers", ylabel="step time / computation time")
    right.set(yscale="log", title="reads from one store, batches of 240 s, prefetch 4")
    right.legend()
    figure.tight_layout()
    figure.savefig(output / "scaling-train.svg", metadata={"Date": None})


def _more(accelerators: int) -> dict[str, int]:
    return {"accelerators": accelerators, "nodes": max(1, accelerators // 8), "cores": 12 * accelerators}


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


if __name__ == "__main__":
    app()
