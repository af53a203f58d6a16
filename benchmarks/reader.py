"""Do targets arrive as fast as the student eats them, in an order as good as random?

``speed`` trains the same student in turns from a cache (each codec), from targets that are resident on the device, and with the
teacher in the loop, and compares steps; it also reads as fast as the reader can, and watches memory and what the first batch of an
epoch waits. ``order`` measures padding and how random epochs are, against a full shuffle and against fixed buckets by length.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import typer
from memory import forget_peak, peak_resident_bytes
from result_file import RESULTS, write_result
from small_speech import HELD_OUT, TRAIN, shared_data, small_student, utterances
from torch.nn.utils.rnn import pad_sequence

from ray_distill.student.training.prefetch import TrainingPlan, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.build.build_cache import build_cache
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
    """All that a cache holds, decoded, on the device."""

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
        """See TargetReader."""
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
    seconds: Annotated[float, typer.Option(help="Training audio.")] = 480,
    steps: Annotated[int, typer.Option(help="Of each training, in each round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Of which the medians are taken.")] = 5,
    batch_seconds: Annotated[float, typer.Option(help="Padded audio of a batch.")] = 30,
    codecs: Annotated[str, typer.Option(help="With commas.")] = "pca,fp16",
    width: Annotated[int, typer.Option(help="Of the student.")] = 96,
    threads: Annotated[int, typer.Option(help="Of PyTorch on the CPU.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A moment: only tries the script.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "reader_speed.json",
) -> None:
    """Training from the cache against resident and online targets."""
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
    """The same with another seed."""
    return settings.model_copy(update={"seed": seed})


def read_alone(way: str, reader: TargetReader, settings: TrainSettings) -> dict[str, Any]:
    """Three epochs as fast as can be, then three with 50 ms of work after each batch: does an epoch's first batch wait?"""
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


Epochs = Callable[[int], list[list[int]]]


def order(
    batch_size: Annotated[int, typer.Option(help="Of the fixed batches.")] = 24,
    batch_seconds: Annotated[float, typer.Option(help="Of the others, padded.")] = 300,
    count: Annotated[int, typer.Option(help="Utterances with LibriSpeech's lengths.")] = 28_539,
    epochs: Annotated[int, typer.Option()] = 8,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "reader_order.json",
) -> None:
    """Padding, and how random epochs are."""
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
    """Lengths in samples: three quarters around 14.5 s (LibriSpeech's cut), the rest spread from 1.5 s on; mean 12.7 s."""
    rng = np.random.default_rng(0)
    long = rng.normal(14.5, 1.2, count)
    short = rng.uniform(1.5, 14.5, count)
    seconds = np.where(rng.random(count) < 0.72, long, short).clip(1.4, 24.5)
    return (seconds * SAMPLE_RATE).astype(np.int64)


def measure_order(planned: list[list[list[int]]], lengths: np.ndarray) -> dict[str, float]:
    """Of some epochs' batches.

    Returns:
        ``padding_waste``: share of padded samples that are padding. ``meet_again``: of pairs that share a batch, the share that
        shares one in the next epoch too, over what a full shuffle gives. ``position_correlation``: of an utterance's step in
        successive epochs (0 for a full shuffle). ``length_autocorrelation``: of successive batches' mean lengths (0).
        ``left_out``: share of utterances that an epoch leaves out.
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
    for command in (speed, order):
        app.command()(command)
    app()
