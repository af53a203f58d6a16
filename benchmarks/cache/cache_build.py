"""Measure what building a cache costs beyond the teacher itself.

Four ways take turns on the same speech, teacher and device, with the same number of PyTorch threads: the bare teacher (waveforms in
memory, batches sorted by length, hidden states discarded), a build without Ray, a build with Ray, and a port of the usual way
(files decoded one by one in their order, fixed batches padded to the longest, float32, every layer written uncompressed). Each
makes one clean pass and one masked pass per draw. The rate of a build is taken between its first and its last finished shard. The
time before that (starting workers, loading the teacher, fitting the codec on at most about 7 minutes of speech) is reported
separately. Finally, the peak memory is measured for a build of the corpus and for a build of a corpus three times as long.
"""

import importlib.util
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.memory import peak_resident_bytes
from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import TRAIN, shared_data, utterances
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.build.shard_workers import Workers
from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.targets.batch_sampler import cut_by_seconds
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms
from ray_distill.teacher_cache.teachers import load_teacher

MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=10), draws=2)
BATCH_SECONDS = 60.0
PORT_BATCH = 8
"""Utterances per batch; about BATCH_SECONDS of this speech."""


class Bench:
    """The ways of running one teacher over one corpus."""

    def __init__(
        self, checkpoint: str, members: list[Utterance], device: str, codec: str, shard_seconds: float
    ) -> None:
        self.checkpoint, self.members, self.device = checkpoint, members, device
        self.teacher = load_teacher(checkpoint, device)
        self.seconds = sum(u.num_samples for u in members) / 16_000
        self.spec = CacheSpec(
            teacher=self.teacher.fingerprint,
            num_layers=self.teacher.num_layers,
            dim=self.teacher.dim,
            layers=tuple(range(1, self.teacher.num_layers + 1)),
            masks=MASKS,
            codec=codec,
            corpus="small speech",
            shard_seconds=shard_seconds,
            batch_seconds=BATCH_SECONDS,
            precision="fp16" if device == "cuda" else "fp32",
        )
        self.waveforms = [load_waveform(u) for u in members]

    def passes(self, precision: Precision, rows: list[int], keep: Callable[[torch.Tensor], None]) -> None:
        """Run the clean pass and all masked passes over a batch."""
        padded, lengths = (x.to(self.device) for x in pad_waveforms([self.waveforms[i] for i in rows]))
        ids, frames = [self.members[i].id for i in rows], [num_frames(len(self.waveforms[i])) for i in rows]
        keep(self.teacher(padded, lengths, precision=precision))
        for draw in range(MASKS.draws):
            mask = MASKS.frame_mask(draw, ids, frames).to(self.device)
            keep(self.teacher(padded, lengths, mask, precision=precision))

    def bare(self, folder: Path) -> tuple[float, float]:
        """Run only the teacher. Like all ways, return seconds of audio per second, and the seconds before that rate was reached."""
        began = time.perf_counter()
        samples = np.array([len(waveform) for waveform in self.waveforms])
        order = np.argsort(-samples, kind="stable").tolist()
        for rows in cut_by_seconds(order, samples, BATCH_SECONDS):
            self.passes(self.spec.precision, rows, lambda states: None)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.seconds / (time.perf_counter() - began), 0.0

    def without_ray(self, folder: Path) -> tuple[float, float]:
        """Build in this process."""
        return self._build(folder, None)

    def with_ray(self, folder: Path) -> tuple[float, float]:
        """Build with one Ray actor."""
        gpus = 1 if self.device == "cuda" else 0
        return self._build(folder, Workers(1, gpus, torch.get_num_threads()))

    def _build(self, folder: Path, workers: Workers | None) -> tuple[float, float]:
        began = time.perf_counter()
        marks: list[tuple[float, float]] = []
        build_cache(
            folder,
            self.spec,
            plan_shards(self.members, self.spec.shard_seconds),
            self.checkpoint,
            teacher_name="benchmark",
            workers=workers,
            on_progress=lambda progress: marks.append((time.perf_counter(), progress.seconds_done)),
        )
        (first, done_first), (last, done_last) = marks[0], marks[-1]
        rate = (done_last - done_first) / (last - first)
        return rate, first - began - done_first / rate

    def port(self, folder: Path) -> tuple[float, float]:
        """Build in the usual way."""
        began = time.perf_counter()
        folder.mkdir()
        names = ["clean", *(f"masked {draw}" for draw in range(MASKS.draws))]
        for number in range(0, len(self.members), PORT_BATCH):
            rows = list(range(number, min(number + PORT_BATCH, len(self.members))))
            for i in rows:
                load_waveform(self.members[i])  # `passes` has the waveforms in memory; this way has to read them.
            values: list[list[bytes]] = []
            keep = values.append
            self.passes("fp32", rows, lambda x, keep=keep: keep([row.numpy().tobytes() for row in x.cpu()]))  # type: ignore[misc]
            table = pa.table(dict(zip(names, values, strict=True)))
            pq.write_table(table, folder / f"{number}.parquet", compression="none")
        return self.seconds / (time.perf_counter() - began), 0.0


def peak_bytes(checkpoint: str, seconds: float, device: str, codec: str, copies: int, threads: int) -> int:
    """Return the peak resident memory of a build of ``copies`` times the speech. Call it in a fresh process."""
    torch.set_num_threads(threads)
    members = utterances(TRAIN, seconds)
    members = [replace(u, id=f"{u.id}-{copy}") for copy in range(copies) for u in members]
    bench = Bench(checkpoint, members[:1], device, codec, seconds / 8)
    bench.members = members
    with tempfile.TemporaryDirectory() as folder:
        bench.without_ray(Path(folder) / "cache")
    return peak_resident_bytes()


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    teacher: Annotated[str, typer.Option(help="Teacher for load_teacher. Default: the small trained HuBERT.")] = "",
    seconds: Annotated[float, typer.Option(help="Seconds of speech.")] = 900,
    rounds: Annotated[int, typer.Option(help="Number of rounds; medians over them are reported.")] = 5,
    codec: Annotated[str, typer.Option()] = "pca",
    threads: Annotated[int, typer.Option(help="PyTorch threads on the CPU.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run for a moment and without Ray, only to try the script.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/cache_build.json",
) -> None:
    """Time cache builds against the bare teacher and the usual way."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        seconds, rounds = 40, 1
    torch.set_num_threads(threads)
    checkpoint = teacher or str(shared_data() / "teacher" / "hubert_small.pt")
    bench = Bench(checkpoint, utterances(TRAIN, seconds), device, codec, seconds / 8)
    ways: dict[str, Callable[[Path], tuple[float, float]]] = {
        "bare teacher": bench.bare,
        "build without Ray": bench.without_ray,
    }
    if not quick and importlib.util.find_spec("ray"):
        import ray

        ray.init(
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(threads)}},
        )
        ways["build with Ray"] = bench.with_ray
    ways["usual way"] = bench.port
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        bench.bare(Path(folder))
        for number in range(rounds):
            for name in list(ways) if number % 2 else reversed(list(ways)):
                place = Path(folder) / "cache"
                measured[name].append(ways[name](place))
                shutil.rmtree(place, ignore_errors=True)
                print(f"{name:18} {measured[name][-1][0]:7.1f} s of audio per second", flush=True)
    rows: list[dict[str, Any]] = []
    for name, found in measured.items():
        rates, before = zip(*found, strict=True)
        shares = [ours / bare for (bare, _), ours in zip(measured["bare teacher"], rates, strict=True)]
        rows.append(
            {
                "way": name,
                "audio_per_second": statistics.median(rates),
                "share_of_bare": statistics.median(shares),
                "seconds_before": statistics.median(before),
                "rates": rates,
            }
        )
        print(
            f"{name:18} {rows[-1]['audio_per_second']:7.1f} s of audio per second, {rows[-1]['share_of_bare']:.2f} of bare"
        )
    peaks = {}
    for copies in (1, 3):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            job = process.submit(peak_bytes, checkpoint, seconds, device, codec, copies, threads)
            peaks[f"{copies}x"] = job.result()
        print(f"peak memory of a build of {copies} x the speech: {peaks[f'{copies}x'] / 2**20:.0f} MiB")
    write_result(
        output,
        device=device,
        teacher=Path(checkpoint).name,
        seconds=bench.seconds,
        passes=1 + MASKS.draws,
        codec=codec,
        threads=threads,
        rows=rows,
        peak_bytes=peaks,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
