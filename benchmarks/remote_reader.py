"""Reading a cache where every request waits: how many requests must be in flight?

An object store in miniature: the cache lies on the local disk, but each opening of a file and each read waits as a request over a
network does, and the bytes pass at a stated rate. No network, so the waiting is all there is.
"""

import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fsspec.implementations.local
import pyarrow as pa
import pyarrow.fs as pafs
import torch
import typer
from result_file import RESULTS, write_result
from small_speech import TRAIN, shared_data, utterances

from ray_distill.student.training.prefetch import TrainingPlan, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import load_teacher


class SlowFile(io.RawIOBase):
    """A file of which each read is a request."""

    def __init__(self, path: str, store: "SlowHandler") -> None:
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115
        self._store = store

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._store.request(len(data))
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


class SlowHandler(pafs.FSSpecHandler):
    """The local disk with a wait for each request."""

    def __init__(self, latency: float, bytes_per_second: float) -> None:
        super().__init__(fsspec.implementations.local.LocalFileSystem())
        self.latency, self.rate, self.requests = latency, bytes_per_second, 0

    def request(self, size: int = 0) -> None:
        self.requests += 1
        time.sleep(self.latency + size / self.rate)

    def open_input_file(self, path: str) -> pa.PythonFile:
        self.request()  # An object's size is asked for first.
        return pa.PythonFile(SlowFile(path, self), mode="r")


class SlowStore(Store):
    """A cache's folder as such a store."""

    def __init__(self, location: Path, latency: float, bytes_per_second: float) -> None:
        super().__init__(location)
        self.handler = SlowHandler(latency, bytes_per_second)
        self._fs, self.local = pafs.PyFileSystem(self.handler), None


def main(
    latencies: Annotated[str, typer.Option(help="Milliseconds a request, with commas.")] = "30",
    megabytes: Annotated[float, typer.Option(help="Per second and request.")] = 50,
    seconds: Annotated[float, typer.Option(help="Training audio.")] = 600,
    ways: Annotated[
        str, typer.Option(help="Reading threads x batches at once, with commas.")
    ] = "4x1,4x4,16x4,32x4,64x4",
    rounds: Annotated[int, typer.Option(help="Of which the medians are taken.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A moment: only tries the script.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "remote_reader.json",
) -> None:
    """What arrives through the training's own feed."""
    if quick:
        seconds, ways, rounds, latencies = 60, "4x1,32x4", 1, "5"
    torch.set_num_threads(1)
    checkpoint = str(shared_data() / "teacher" / "hubert_small.pt")
    teacher = load_teacher(checkpoint)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        spec = CacheSpec(
            teacher=teacher.fingerprint,
            num_layers=teacher.num_layers,
            dim=teacher.dim,
            layers=tuple(range(1, teacher.num_layers + 1)),
            masks=MaskDraws(policy=MaskPolicy(mask_prob=0.5), draws=1),
            codec="pca",
            corpus="small speech",
            shard_seconds=60,
            batch_seconds=60,
        )
        plan = plan_shards(utterances(TRAIN, seconds), spec.shard_seconds)
        build_cache(folder, spec, plan, checkpoint, teacher_name="hubert_small", workers=None)
        for latency in latencies.split(","):
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways.split(",")}
            for _ in range(rounds):
                for way, measured in found.items():
                    measured.append(read(Path(folder), float(latency) / 1e3, 1e6 * megabytes, way))
            for way, measured in found.items():
                median = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
                number, batches = map(int, way.split("x"))
                rows.append({"latency_ms": float(latency), "threads": number, "batches_at_once": batches} | median)
                print(rows[-1], flush=True)
    write_result(output, train_seconds=seconds, megabytes_per_second_and_request=megabytes, rows=rows)


def read(folder: Path, latency: float, rate: float, way: str) -> dict[str, float]:
    """Batches of six utterances, as published; of three epochs the first opens files and is not counted."""
    store = SlowStore(folder, latency, rate)
    threads, batches = map(int, way.split("x"))
    reader = CacheReader(store, "train", threads=threads)
    reader.batches_at_once = batches
    plan = TrainingPlan(reader.num_samples, TrainSettings(batch_size=6, epochs=3), 1)
    before, began, count, samples = 0, 0.0, 0, 0
    for micro in micro_batches(plan, reader, Rank(), 0, 1):
        if micro.epoch == 0:
            before, began = store.handler.requests, time.perf_counter()
            continue
        count += len(micro.num_samples)
        samples += int(micro.num_samples.sum())
    elapsed = time.perf_counter() - began
    return {
        "utterances_per_second": count / elapsed,
        "audio_hours_per_minute": samples / SAMPLE_RATE / 60 / elapsed,
        "requests_per_utterance": (store.handler.requests - before) / count,
    }


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
