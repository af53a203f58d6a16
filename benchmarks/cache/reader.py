"""Measure whether targets arrive as fast as the student needs them, and in an order that is random enough.

``speed`` trains the same student in turns from a cache (with each codec), from targets that are resident on the device, and with the
teacher in the training loop, and compares the speed. It also reads as fast as the reader can, and records memory and the wait for
the first batch of an epoch. ``feed`` replaces the student by one that takes a fixed time per second of audio, as a GPU would, and
reports the share of the time spent waiting for data, with either format of the embedded audio. ``order`` measures padding and the
randomness of epochs, against a full shuffle and against fixed buckets by length.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn.utils.rnn import pad_sequence

from benchmarks.memory import forget_peak, peak_resident_bytes
from benchmarks.result_file import RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data, small_student, utterances
from ray_distill.student.training.prefetch import TrainingPlan, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.embedded_audio import DECODERS
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.targets.batch_sampler import cut_by_seconds, plan_epoch
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader
from ray_distill.teacher_cache.teachers import load_teacher

MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=10), draws=2)


class Resident:
    """All targets of a cache, decoded, on the device."""

    def __init__(self, reader: CacheReader, device: str) -> None:
        self.num_samples, self.num_frames, self.layers, self.dim, self.draws = (
            reader.num_samples,
            reader.num_frames,
            reader.layers,
            reader.dim,
            reader.draws,
        )
        self._rows = {
            (index, draw): reader.read([index], draw).to(device)
            for draw in (*range(reader.draws or 0), *(() if reader.draws else (None,)))
            for index in range(len(reader.ids))
        }

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See `TargetReader.read`."""
        rows = [self._rows[index, draw] for index in indices]
        targets = pad_sequence([row.targets[0].transpose(0, 1) for row in rows], batch_first=True).transpose(1, 2)
        masks = None
        if draw is not None:
            masks = pad_sequence([row.frame_mask[0] for row in rows if row.frame_mask is not None], batch_first=True)
        return Batch(
            [row.ids[0] for row in rows],
            pad_sequence([row.waveforms[0] for row in rows], batch_first=True),
            torch.cat([row.lengths for row in rows]),
            torch.cat([row.num_frames for row in rows]),
            targets,
            masks,
        )


def speed(
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Seconds of training audio.")] = 480,
    steps: Annotated[int, typer.Option(help="Steps of each training in each round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Number of rounds; medians over them are reported.")] = 5,
    batch_seconds: Annotated[float, typer.Option(help="Seconds of padded audio per batch.")] = 30,
    codecs: Annotated[str, typer.Option(help="Codecs, separated by commas.")] = "pca,fp16",
    width: Annotated[int, typer.Option(help="Width of the student.")] = 96,
    threads: Annotated[int, typer.Option(help="PyTorch threads on the CPU.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Run for a moment, only to try the script.")] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/reader_speed.json",
) -> None:
    """Compare training from the cache with resident and online targets."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        seconds, steps, rounds, codecs = 60, 3, 1, "pca"
    torch.set_num_threads(threads)
    checkpoint = str(shared_data() / "teacher" / "hubert_small.pt")
    teacher = load_teacher(checkpoint, device)
    members, held_out = utterances(TRAIN, seconds), utterances(HELD_OUT, 10)
    layers = tuple(range(1, teacher.num_layers + 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        readers: dict[str, TargetReader] = {}
        for codec in codecs.split(","):
            spec = CacheSpec(
                teacher=teacher.fingerprint,
                num_layers=teacher.num_layers,
                dim=teacher.dim,
                layers=layers,
                masks=MASKS,
                codec=codec,
                corpus="small speech",
                shard_seconds=120,
                batch_seconds=60,
            )
            plan = plan_shards(members, spec.shard_seconds)
            build_cache(folder / codec, spec, plan, checkpoint, teacher_name="hubert_small", workers=None)
            readers[f"cached, {codec}"] = CacheReader(folder / codec, "train")
        first = CacheReader(folder / codecs.split(",")[0], "train")
        by_id = {u.id: u for u in members}
        readers["resident"] = Resident(first, device)
        readers["online"] = OnlineReader([by_id[i] for i in first.ids], teacher, MASKS, layers)
        validation = OnlineReader(held_out[:1], teacher, MASKS, layers)
        settings = TrainSettings(
            epochs=10_000, max_steps=steps, batch_seconds=batch_seconds, validate_every=10**6, log_every=1
        )
        student = small_student(teacher.num_layers, teacher.dim, width)
        rank = Rank(device=torch.device(device))
        found: dict[str, list[dict[str, float]]] = {way: [] for way in readers}
        for number in range(rounds + 1):  # The first round warms up.
            for way in list(readers) if number % 2 else reversed(list(readers)):
                run = folder / f"{way}-{number}"
                train(student, replace_seed(settings, number), readers[way], validation, run, rank=rank)
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                rows = [line for line in lines if line["kind"] == "train"][1:]
                if number:
                    keys = ("audio_hours_per_minute", "data_wait", "padding_waste", "bytes_per_second")
                    found[way].append({key: statistics.mean(row.get(key, 0.0) for row in rows) for key in keys})
                    rate = statistics.harmonic_mean([row["audio_hours_per_minute"] for row in rows])
                    found[way][-1]["audio_hours_per_minute"] = rate
                    print(
                        f"{way:16} {rate:.3f} h of audio per minute, waiting {found[way][-1]['data_wait']:.1%}",
                        flush=True,
                    )
        result: list[dict[str, Any]] = []
        for way, measured in found.items():
            ratios = {
                other: statistics.median(
                    a["audio_hours_per_minute"] / b["audio_hours_per_minute"]
                    for a, b in zip(measured, found[other], strict=True)
                )
                for other in ("resident", "online")
            }
            row = {"way": way, "against_resident": ratios["resident"], "against_online": ratios["online"]}
            row |= {key: statistics.median(m[key] for m in measured) for key in measured[0]}
            result.append(row)
            print(f"{way:16} {ratios['resident']:.3f} of resident, {ratios['online']:.2f} x online")
        alone = [read_alone(way, readers[way], settings) for way in readers if way.startswith("cached")]
    write_result(
        output,
        device=device,
        teacher="hubert_small",
        train_seconds=sum(u.num_samples for u in members) / SAMPLE_RATE,
        student=student.model_dump(mode="json"),
        batch_seconds=batch_seconds,
        threads=threads,
        rows=result,
        reading_alone=alone,
    )


def replace_seed(settings: TrainSettings, seed: int) -> TrainSettings:
    """Return the settings with another seed."""
    return settings.model_copy(update={"seed": seed})


def read_alone(way: str, reader: TargetReader, settings: TrainSettings) -> dict[str, Any]:
    """Read three epochs at full speed, then three with 50 ms of work per batch to see whether an epoch's first batch is late."""
    assert isinstance(reader, CacheReader)
    plan = TrainingPlan(
        reader.num_samples, replace_seed(settings, 0).model_copy(update={"epochs": 3, "max_steps": None}), 1
    )
    forget_peak()
    before, began = reader.bytes_read, time.perf_counter()
    samples = 0
    peaks: list[float] = []
    for micro in micro_batches(plan, reader, Rank(), 0, 1):
        samples += int(micro.num_samples.sum())
        _ = micro.batch.targets
        if not peaks or micro.epoch == len(peaks):
            peaks.append(peak_resident_bytes() / 2**20)
    elapsed = time.perf_counter() - began
    peaks.append(peak_resident_bytes() / 2**20)
    waits: dict[bool, list[float]] = {True: [], False: []}
    epoch = 0
    mark = time.perf_counter()
    for micro in micro_batches(plan, reader, Rank(), 0, 1):
        if micro.step:
            waits[micro.epoch != epoch].append(time.perf_counter() - mark)
        epoch = micro.epoch
        time.sleep(0.05)
        mark = time.perf_counter()
    row = {
        "way": way,
        "audio_hours_per_minute": samples / SAMPLE_RATE / 60 / elapsed,
        "megabytes_per_second": (reader.bytes_read - before) / elapsed / 1e6,
        "peak_mebibytes_after_each_epoch": peaks,
        "first_batch_of_an_epoch_waits_ms": 1e3 * statistics.mean(waits[True]),
        "other_batches_wait_ms": 1e3 * statistics.mean(waits[False]),
    }
    print(row)
    return row


def feed(
    seconds: Annotated[float, typer.Option(help="Seconds of training audio.")] = 480,
    rounds: Annotated[int, typer.Option(help="Number of rounds; medians over them are reported.")] = 5,
    rates: Annotated[
        str, typer.Option(help="Seconds of audio per second of a rank, separated by commas.")
    ] = "2000,7300,20000",
    rank_cores: Annotated[
        int, typer.Option(help="Cores of such a rank; its rate is scaled to the cores used here.")
    ] = 16,
    cores: Annotated[int, typer.Option(help="Cores used here.")] = 2,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/reader_feed.json",
) -> None:
    """Measure the CPU time of reading, and how long a student of fixed speed waits for it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(1)
    checkpoint = str(shared_data() / "teacher" / "hubert_small.pt")
    teacher = load_teacher(checkpoint, "cpu")
    members = utterances(TRAIN, seconds)
    settings = TrainSettings(epochs=2, batch_seconds=60, validate_every=10**6)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        readers = {}
        for audio in ("flac", "pcm"):
            spec = CacheSpec(
                teacher=teacher.fingerprint,
                num_layers=teacher.num_layers,
                dim=teacher.dim,
                layers=tuple(range(1, teacher.num_layers + 1)),
                masks=MASKS,
                codec="pca",
                audio=audio,
                corpus="small speech",
                shard_seconds=120,
                batch_seconds=60,
            )
            folder = Path(name) / audio
            plan = plan_shards(members, spec.shard_seconds)
            build_cache(folder, spec, plan, checkpoint, teacher_name="hubert_small", workers=None)
            readers[audio] = CacheReader(folder, "train", threads=cores)
        for number in range(rounds + 1):  # The first round warms up.
            for audio in list(readers) if number % 2 else reversed(list(readers)):
                measured = measure_feed(
                    readers[audio], settings, [float(r) * cores / rank_cores for r in rates.split(",")]
                )
                if number:
                    for key, value in measured.items():
                        found.setdefault(audio, {}).setdefault(key, []).append(value)
    rows = [{"audio": audio} | {key: statistics.median(v) for key, v in kept.items()} for audio, kept in found.items()]
    ratio = statistics.median(
        a / b for a, b in zip(*(found[audio]["audio_seconds_per_cpu_second"] for audio in ("pcm", "flac")), strict=True)
    )
    for row in rows:
        print(row)
    write_result(output, teacher="hubert_small", rank_cores=rank_cores, cores=cores, rows=rows, pcm_over_flac=ratio)


def measure_feed(reader: CacheReader, settings: TrainSettings, rates: Sequence[float]) -> dict[str, float]:
    """Return the speed of reading per CPU second, the share of decoding audio in it, and the shares of time spent waiting.

    Args:
        reader: Reader of the training split.
        settings: Settings of the training, which give the batches.
        rates: Seconds of audio per second that the student takes, one measurement each.
    """
    plan = TrainingPlan(reader.num_samples, settings, 1)
    decode, spent = DECODERS[reader.cache.spec.audio], [0.0]

    def timed(data: bytes | memoryview) -> np.ndarray:
        began = time.thread_time()
        waveform = decode(data)
        spent[0] += time.thread_time() - began
        return waveform

    DECODERS[reader.cache.spec.audio] = timed
    try:
        began, samples = time.process_time(), 0
        for micro in micro_batches(plan, reader, Rank(), 0, 1):
            samples += int(micro.num_samples.sum())
        cpu = time.process_time() - began
    finally:
        DECODERS[reader.cache.spec.audio] = decode
    found = {"audio_seconds_per_cpu_second": samples / SAMPLE_RATE / cpu, "share_of_decoding_audio": spent[0] / cpu}
    for rate in rates:
        waited = 0.0
        begun = mark = time.perf_counter()
        for micro in micro_batches(plan, reader, Rank(), 0, 1):
            waited += time.perf_counter() - mark
            time.sleep(micro.num_samples.sum() / SAMPLE_RATE / rate)
            mark = time.perf_counter()
        found[f"waiting_at_{rate:g}"] = waited / (time.perf_counter() - begun)
    return found


Epochs = Callable[[int], list[list[int]]]


def order(
    batch_size: Annotated[int, typer.Option(help="Utterances per batch where that number is fixed.")] = 24,
    batch_seconds: Annotated[float, typer.Option(help="Seconds of padded audio per batch elsewhere.")] = 300,
    count: Annotated[int, typer.Option(help="Number of utterances with LibriSpeech-like lengths.")] = 28_539,
    epochs: Annotated[int, typer.Option()] = 8,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/reader_order.json",
) -> None:
    """Measure padding and the randomness of epochs."""
    lengths = librispeech_like(count)
    rng = np.random.default_rng(1)
    buckets = np.argsort(lengths, kind="stable").tolist()

    def ours(size: int | None, budget: float | None) -> Epochs:
        def plan(epoch: int) -> list[list[int]]:
            steps = plan_epoch(
                lengths, batch_size=size, batch_seconds=budget, world_size=1, accumulate=1, seed=0, epoch=epoch
            )
            return [batch for step in steps for micro in step for batch in micro]

        return plan

    def shuffled(epoch: int) -> list[list[int]]:
        members = rng.permutation(len(lengths)).tolist()
        return [members[i : i + batch_size] for i in range(0, len(members), batch_size)]

    def bucketed(epoch: int) -> list[list[int]]:
        batches = cut_by_seconds(buckets, lengths, batch_seconds)
        return [batches[i] for i in rng.permutation(len(batches))]

    ways: dict[str, Epochs] = {
        f"ours, {batch_size} utterances": ours(batch_size, None),
        f"ours, {batch_seconds:g} s": ours(None, batch_seconds),
        f"full shuffle, {batch_size} utterances": shuffled,
        f"fixed buckets by length, {batch_seconds:g} s": bucketed,
    }
    rows = []
    for way, plan in ways.items():
        planned = [plan(epoch) for epoch in range(epochs)]
        rows.append({"way": way} | measure_order(planned, lengths))
        print(rows[-1])
    write_result(output, utterances=count, hours=float(lengths.sum() / SAMPLE_RATE / 3600), epochs=epochs, rows=rows)


def librispeech_like(count: int) -> np.ndarray:
    """Return lengths in samples: 72 % around 14.5 s (where LibriSpeech was cut), the rest uniform from 1.5 s; mean 12.7 s."""
    rng = np.random.default_rng(0)
    long = rng.normal(14.5, 1.2, count)
    short = rng.uniform(1.5, 14.5, count)
    seconds = np.where(rng.random(count) < 0.72, long, short).clip(1.4, 24.5)
    return (seconds * SAMPLE_RATE).astype(np.int64)


def measure_order(planned: list[list[list[int]]], lengths: np.ndarray) -> dict[str, float]:
    """Measure the batches of several epochs.

    Returns:
        ``padding_waste``: share of all samples that are padding. ``meet_again``: share of the pairs in one batch that share a batch
        in the next epoch too, divided by the same share of a full shuffle. ``position_correlation``: correlation of an utterance's
        step in successive epochs (0 for a full shuffle). ``length_autocorrelation``: autocorrelation of the mean length of
        successive batches (0 for a full shuffle). ``left_out``: share of utterances that an epoch leaves out.
    """
    real = sum(int(lengths[batch].sum()) for batches in planned for batch in batches)
    padded = sum(int(lengths[batch].max()) * len(batch) for batches in planned for batch in batches)
    where = [{i: step for step, batch in enumerate(batches) for i in batch} for batches in planned]
    again = pairs = 0
    expected = []
    for batches, following in zip(planned, where[1:], strict=False):
        for batch in batches[:400]:
            for one, other in combinations(batch, 2):
                pairs += 1
                again += following.get(one, -1) == following.get(other, -2)
        expected.append(statistics.mean(len(batch) - 1 for batch in batches) / (len(lengths) - 1))
    positions, autocorrelations = [], []
    for now, later in pairwise(where):
        common = sorted(now.keys() & later.keys())
        positions.append(np.corrcoef([now[i] for i in common], [later[i] for i in common])[0, 1])
    for batches in planned:
        means = [lengths[batch].mean() for batch in batches]
        autocorrelations.append(np.corrcoef(means[:-1], means[1:])[0, 1])
    return {
        "padding_waste": 1 - real / padded,
        "meet_again": again / pairs / statistics.mean(expected),
        "position_correlation": float(np.mean(positions)),
        "length_autocorrelation": float(np.mean(autocorrelations)),
        "left_out": 1 - statistics.mean(len(found) for found in where) / len(lengths),
        "batches": statistics.mean(len(batches) for batches in planned),
    }


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    for command in (speed, feed, order):
        app.command()(command)
    app()
