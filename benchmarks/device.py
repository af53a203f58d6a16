"""Measure teacher, build, training, codecs, reader and student on one device, and check what only a GPU can get wrong.

``python -m benchmarks.device`` needs neither Ray nor a network. The teacher has random weights and the audio is synthetic, since speed
depends on neither. ``--quick`` tries it with small sizes, also on a CPU. ``--only`` measures some of it, where the time on a device is
short. A measurement that fails is named with its error, and the others follow. The result file is written before that, or a failed
check, ends the script.
"""

import hashlib
import itertools
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import forget_peak, peak_resident_bytes, resident_bytes
from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from ray_distill.pipeline.config import load_config
from ray_distill.student import Student, StudentConfig
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.student.training.validation import batch_loss, make_distiller
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.build.build_cache import BuildReport, build_cache
from ray_distill.teacher_cache.codecs import fit_codec, open_codec, relative_error
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader
from ray_distill.teacher_cache.teachers import Teacher, load_teacher

RECIPES = ("armhubert-960", "armhubert-s-960", "maskhubert-960")
CODECS = ("pca", "layer-pca", "int8", "fp16")
MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=10), draws=1)
SMALL = {
    "conv_layers": ((16, 10, 5), *((16, 3, 2),) * 4, *((24, 2, 2),) * 2),
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
"""What ``--quick`` changes in a student."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        teacher: The teacher.
        corpus_seconds: Seconds of audio in the caches.
        batch_seconds: Seconds of audio in a batch.
        memory_batches: Seconds of audio in the batches whose memory is measured.
        steps: Training steps of a measurement.
        rounds: Repetitions, of which the median counts.
        codec_frames: Frames for the rates of codecs.
    """

    teacher: str
    corpus_seconds: float
    batch_seconds: float
    memory_batches: tuple[float, ...]
    steps: int
    rounds: int
    codec_frames: int


FULL = Sizes("random:12x768", 1200, 240, (120, 240, 480, 960), 40, 5, 20_000)
QUICK = Sizes("random:2x32", 12, 4, (4,), 4, 1, 400)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Bench:
    """Everything that the measurements share.

    Args:
        device: Device to measure.
        sizes: How much is measured.
        folder: Folder for audio, caches and runs.
    """

    def __init__(self, device: torch.device, sizes: Sizes, folder: Path) -> None:
        self.device, self.sizes, self.folder = device, sizes, folder
        self.on_gpu = device.type == "cuda"
        self.teacher: Teacher = load_teacher(sizes.teacher, device)
        self.layers = tuple(range(1, self.teacher.num_layers + 1))
        self.utterances = list(self.synthesise())
        self.numbers = itertools.count()

    def synthesise(self) -> Iterator[Utterance]:
        """Write noise with a changing envelope, of 4 to 16 s (1 to 3 s in small sizes), as 16-bit FLAC."""
        rng = np.random.default_rng(0)
        shortest, longest = (4, 16) if self.sizes is FULL else (1, 3)
        total = 0.0
        while total < self.sizes.corpus_seconds:
            seconds = rng.uniform(shortest, longest)
            envelope = np.repeat(rng.uniform(0, 0.3, int(seconds * 10) + 1), SAMPLE_RATE // 10)
            samples = (rng.standard_normal(len(envelope)) * envelope).clip(-1, 1).astype(np.float32)
            path = self.folder / f"noise-{total:09.3f}.flac"
            soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
            digest = hashlib.sha256(load_audio(path).tobytes()).hexdigest()
            yield Utterance(path.stem, str(path), len(samples), "train" if total else "validation", digest)
            total += seconds

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the median time of a call, after one that warms up."""
        times = []
        for number in range(self.sizes.rounds + 1):
            self.wait()
            began = time.perf_counter()
            function()
            self.wait()
            if number:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def waveforms(self, seconds: float, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return (0.1 * torch.randn(rows, int(seconds * SAMPLE_RATE), generator=generator)).to(self.device)

    def student(self, recipe: str) -> StudentConfig:
        shape = load_config(REPOSITORY / f"configs/{recipe}.yaml").resolve_student(12, 768)
        small = SMALL | {"encoder_layers": len(self.layers), "target_dim": self.teacher.dim}
        return shape if self.sizes is FULL else StudentConfig.model_validate(shape.model_dump() | small)

    def settings(self, **changes: Any) -> TrainSettings:
        steps = self.sizes.steps
        values: dict[str, Any] = {"epochs": 10_000, "max_steps": steps, "batch_seconds": self.sizes.batch_seconds}
        values |= {"validate_every": 10**6, "log_every": 10**6, "precision": "bf16" if self.on_gpu else "fp32"}
        return TrainSettings.model_validate(values | {"use_gpu": self.on_gpu} | changes)

    def train(self, config: StudentConfig, reader: TargetReader, **changes: Any) -> list[dict[str, Any]]:
        """Train and return the rows of metrics."""
        run = self.folder / f"run-{next(self.numbers)}"
        validation = OnlineReader(self.utterances[:1], self.teacher, MASKS)
        train(config, self.settings(**changes), reader, validation, run, rank=Rank(device=self.device))
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def cache(
        self, name: str, codec: str, precision: Precision = "fp32", *, auto: bool = False, times: int = 1
    ) -> tuple[BuildReport, list[str]]:
        """Build a cache on the device, and return the report, whose time is without fitting the codec, and what the teacher noted.

        Args:
            name: Name of its folder.
            codec: Its codec.
            precision: Precision of the teacher.
            auto: Whether the size of batches is found. All utterances of a split are then in one shard, which limits it.
            times: How many times it has each utterance.
        """
        spec = CacheSpec(
            teacher=self.teacher.fingerprint,
            num_layers=self.teacher.num_layers,
            dim=self.teacher.dim,
            layers=self.layers,
            masks=MASKS,
            codec=codec,
            corpus="noise",
            shard_seconds=1e9 if auto else max(60.0, self.sizes.corpus_seconds / 4),
            batch_seconds="auto" if auto else self.sizes.batch_seconds,
            precision=precision,
        )
        copies = [replace(one, id=one.id + copy * "+") for copy in range(times) for one in self.utterances]
        plan, teacher, notes = plan_shards(copies, spec.shard_seconds), self.sizes.teacher, list[str]()
        how: dict[str, Any] = {"workers": None, "device": self.device.type, "on_note": notes.append}
        return build_cache(self.folder / name, spec, plan, teacher, teacher_name=teacher, **how), notes

    def cached(self) -> Path:
        """Return a cache of codec pca, which is built at the first call."""
        if not (self.folder / "cache-pca-fp32").exists():
            self.cache("cache-pca-fp32", "pca")
        return self.folder / "cache-pca-fp32"


class Repeated:
    """A corpus that has each utterance of a reader several times, since one that fits into a batch as a whole says little."""

    def __init__(self, reader: CacheReader, times: int) -> None:
        self.num_samples, self.num_frames = np.tile(reader.num_samples, times), np.tile(reader.num_frames, times)
        self.layers, self.dim, self.draws = reader.layers, reader.dim, reader.draws
        self._reader = reader

    def read(self, indices: Any, draw: int | None) -> Batch:
        """See `TargetReader.read`."""
        return self._reader.read([index % len(self._reader) for index in indices], draw)


class Resident:
    """The batches of a reader, read once and kept decoded on the device."""

    def __init__(self, reader: CacheReader, device: torch.device) -> None:
        self.num_samples, self.num_frames, self.layers = reader.num_samples, reader.num_frames, reader.layers
        self.dim, self.draws = reader.dim, reader.draws
        self._reader, self._device = reader, device
        self._batches: dict[tuple[int, ...], Batch] = {}

    def read(self, indices: Any, draw: int | None) -> Batch:
        """See `TargetReader.read`. A batch that was not read yet is read."""
        key = (*indices, -1 if draw is None else draw)
        if key not in self._batches:
            self._batches[key] = self._reader.read(indices, draw).to(self._device)
        return self._batches[key]


def measure_teacher(bench: Bench) -> list[dict[str, Any]]:
    """Return for each arithmetic: seconds of audio per second of one pass, and the error against fp32 (the last layer)."""
    rows = max(1, int(bench.sizes.batch_seconds / 4))
    waveforms = bench.waveforms(4, rows)
    with tf32(False):
        exact = bench.teacher(waveforms)[:, -1].flatten(0, 1)
    found = []
    ways: list[tuple[str, Precision, bool]] = [("fp32", "fp32", False), ("bf16", "bf16", False)]
    if bench.on_gpu:
        ways[1:] = [("tf32", "fp32", True), ("fp16", "fp16", False), ("bf16", "bf16", False)]
    for name, precision, allowed in ways:
        with tf32(allowed):
            output = bench.teacher(waveforms, precision=precision)[:, -1].flatten(0, 1)
            seconds = bench.seconds(lambda precision=precision: bench.teacher(waveforms, precision=precision))
        error = float(relative_error(exact[:, None], output[:, None]))
        found.append({"arithmetic": name, "audio_seconds_per_second": 4 * rows / seconds, "relative_error": error})
    if bench.on_gpu:
        model: Any = bench.teacher.model
        compiled = torch.compile(model.extract_features, dynamic=True)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            seconds = bench.seconds(lambda: compiled(waveforms))
            plain = bench.seconds(lambda: model.extract_features(waveforms))
        found.append({"arithmetic": "bf16, compiled", "audio_seconds_per_second": 4 * rows / seconds})
        found.append({"arithmetic": "bf16, same code, not compiled", "audio_seconds_per_second": 4 * rows / plain})
    return found


def measure_build(bench: Bench) -> list[dict[str, Any]]:
    """Return for each arithmetic the seconds of audio per second of a build with two passes, and its part of the bare teacher's."""
    audio = sum(utterance.num_samples for utterance in bench.utterances) / SAMPLE_RATE
    batch = bench.waveforms(8, max(1, int(bench.sizes.batch_seconds / 8)))
    found = []
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16") if bench.on_gpu else ("fp32",)
    for precision in precisions:
        seconds = bench.cache(f"cache-pca-{precision}", "pca", precision)[0].elapsed
        alone = bench.seconds(lambda precision=precision: bench.teacher(batch, precision=precision))
        bare = batch.numel() / SAMPLE_RATE / alone / 2
        rate = audio / seconds
        found.append(
            {"precision": precision, "audio_seconds_per_second": rate, "relative_to_bare_teacher": rate / bare}
        )
    return found


def measure_steps(bench: Bench) -> list[dict[str, Any]]:
    """Return for each student and source of targets the seconds of audio that a training takes in a second."""
    found = []
    cached = CacheReader(bench.cached(), "train")
    by_id = {utterance.id: utterance for utterance in bench.utterances}
    online = OnlineReader(
        [by_id[name] for name in cached.ids], bench.teacher, MASKS, precision="bf16" if bench.on_gpu else "fp32"
    )
    for recipe in RECIPES if bench.sizes is FULL else RECIPES[1:2]:
        config = bench.student(recipe)
        resident = Resident(cached, bench.device)
        ways: dict[str, tuple[TargetReader, bool]] = {
            "resident": (resident, False),
            "cached": (cached, False),
            "online": (online, False),
        }
        if bench.on_gpu and recipe == RECIPES[1]:
            ways["cached, compiled"] = (cached, True)
        for way, (reader, compiled) in ways.items():
            # Rows before the last warm up; the resident batches are read in the first run, which has the same order.
            for _ in range(2 if way == "resident" else 1):
                rows = bench.train(config, reader, log_every=bench.sizes.steps // 2, compile=compiled)
            row = [row for row in rows if row["kind"] == "train"][-1]
            rate = 3600 / 60 * row["audio_hours_per_minute"]
            measured = {"audio_seconds_per_second": rate, "data_wait": row["data_wait"]}
            found.append({"student": recipe, "targets": way} | measured)
    return found


def measure_calls(bench: Bench) -> dict[str, float]:
    """Return kernels (on a CPU: operators) and reads by the host per training step, without those of rows of metrics."""
    reader = CacheReader(bench.cached(), "train")
    config = bench.student(RECIPES[1])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    counts: list[dict[str, int]] = []
    short = bench.sizes.steps // 4
    # Starts and validations are the same in both runs, so the difference is that of the steps.
    for steps in (short, 2 * short):
        with profile(activities=activities) as found:
            bench.train(config, reader, max_steps=steps)
        events = [(event.device_type.name, event.name) for event in found.events()]
        host = [name for where, name in events if where == "CPU"]
        names = [name for where, name in events if where == "CUDA"] if bench.on_gpu else host
        counts.append(
            {
                "kernels": len([name for name in names if not name.startswith("Mem")]),
                "synchronisations": len([name for name in host if name.endswith("Synchronize")]),
                "reads_by_the_host": host.count("aten::_local_scalar_dense"),
            }
        )
    return {name: (counts[1][name] - counts[0][name]) / short for name in counts[0]}


def measure_memory(bench: Bench) -> list[dict[str, float]]:
    """Return the peak memory of a training step, beyond weights and batch, by the seconds of audio in the batch."""
    settings = bench.settings()
    student = Student(bench.student(RECIPES[1])).to(bench.device).train()
    distiller = make_distiller(student, settings)
    found = []
    for seconds in bench.sizes.memory_batches:
        rows = max(1, int(seconds / 8))
        waveforms = bench.waveforms(seconds / rows, rows)
        lengths = torch.full((rows,), waveforms.shape[1], device=bench.device)
        frames = student.num_frames(lengths)
        targets = torch.randn(rows, len(bench.layers), int(frames[0]), bench.teacher.dim, device=bench.device)
        batch = Batch(["noise"] * rows, waveforms, lengths, frames, targets, None)
        student.zero_grad(set_to_none=True)
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats(bench.device)
            before = torch.cuda.memory_allocated(bench.device)
        else:
            forget_peak()
            before = resident_bytes()
        batch_loss(distiller, batch, settings, lengths=[waveforms.shape[1]] * rows).total.backward()
        peak = torch.cuda.max_memory_allocated(bench.device) if bench.on_gpu else peak_resident_bytes()
        found.append({"batch_seconds": seconds, "peak_bytes": peak - before})
    return found


def measure_auto(bench: Bench) -> list[dict[str, Any]]:
    """Return what ``train.batch_seconds=auto`` finds for each student, and the memory of a training with it; nothing on a CPU."""
    found: list[dict[str, Any]] = []
    corpus = Repeated(CacheReader(bench.cached(), "train"), 20)
    for recipe in RECIPES if bench.on_gpu else ():
        config, steps = bench.student(recipe), max(1, bench.sizes.steps // 4)
        began = time.perf_counter()
        rows = bench.train(config, corpus, batch_seconds="auto", max_steps=1)
        (row,) = ({"student": recipe} | row for row in rows if row.pop("kind") == "batch")
        seconds = time.perf_counter() - began
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        bench.train(config, corpus, batch_seconds=row["batch_seconds"], max_steps=steps)
        allocated, reserved = (
            torch.cuda.max_memory_allocated(bench.device),
            torch.cuda.max_memory_reserved(bench.device),
        )
        row |= {"training_allocated_bytes": allocated, "training_reserved_bytes": reserved}
        found.append(row | {"seconds_with_one_step": seconds})
    return found


def measure_auto_build(bench: Bench) -> list[dict[str, Any]]:
    """Return what ``cache.batch_seconds=auto`` finds for each arithmetic, and the memory and speed of the build; nothing on a CPU."""
    found: list[dict[str, Any]] = []
    precisions: tuple[Precision, ...] = ("fp32", "fp16") if bench.on_gpu else ()
    for precision in precisions:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        # The search goes on until a shard as a whole fits, so there must be much.
        report, notes = bench.cache(f"cache-auto-{precision}", "int8", precision, auto=True, times=8)
        found.append(
            {
                "precision": precision,
                "batch_seconds": list(report.batch_seconds),
                "notes": notes,
                "audio_seconds_per_second": report.seconds / report.elapsed,
                "search_allocated_bytes": torch.cuda.max_memory_allocated(bench.device),
                "search_reserved_bytes": torch.cuda.max_memory_reserved(bench.device),
            }
        )
    return found


def measure_codecs(bench: Bench) -> list[dict[str, Any]]:
    """Return the seconds of audio per second that each codec encodes and decodes, and decodes if three layers are wanted."""
    count, dim = bench.sizes.codec_frames, bench.teacher.dim
    mixing = torch.randn(dim, len(bench.layers) * dim, generator=torch.Generator().manual_seed(0)) / dim**0.5
    scale = torch.linspace(0, -3, dim).exp()
    frames = (torch.randn(count, dim, generator=torch.Generator().manual_seed(1)) * scale) @ mixing
    frames = frames.view(count, len(bench.layers), dim).to(bench.device)
    found = []
    for name in CODECS:
        columns = open_codec(name, bench.layers, dim, fit_codec(name, frames[::2].cpu(), frames[1::2].cpu()))
        parts = [frames[:, [layer - 1 for layer in column.layers]] for column in columns]
        codes = [column.encode(part) for column, part in zip(columns, parts, strict=True)]
        row: dict[str, Any] = {"codec": name}
        audio = count / 50
        encode = bench.seconds(lambda c=columns, p=parts: [a.encode(b) for a, b in zip(c, p, strict=True)])
        decode = bench.seconds(lambda c=columns, p=codes: [a.decode(b) for a, b in zip(c, p, strict=True)])
        row |= {"encode_audio_seconds_per_second": audio / encode, "decode_audio_seconds_per_second": audio / decode}
        on_host = columns[0].decode(codes[0].cpu())
        row["difference_from_cpu"] = float(relative_error(on_host, columns[0].decode(codes[0]).cpu()).max())
        row["stated_error"] = float(columns[0].error.max())
        found.append(row)
    return found


def measure_reader(bench: Bench) -> list[dict[str, float]]:
    """Return the seconds of audio per second that the reader reads with one thread, two, four, up to the number of cores."""
    cores = len(os.sched_getaffinity(0))
    found = []
    threads = 1
    while threads <= cores:
        reader = CacheReader(bench.cached(), "train", threads=threads)
        audio = float(reader.num_samples.sum()) / SAMPLE_RATE
        began = time.process_time()
        seconds = bench.seconds(lambda reader=reader: reader.read(range(len(reader)), 0))
        cpu = (time.process_time() - began) / (bench.sizes.rounds + 1)
        found.append(
            {
                "threads": threads,
                "audio_seconds_per_second": audio / seconds,
                "audio_seconds_per_cpu_second": audio / cpu,
            }
        )
        threads *= 2
    return found


def measure_inference(bench: Bench) -> list[dict[str, Any]]:
    """Return the seconds of audio per second of the student's features, beside those of the teacher, in fp32."""
    student = Student(bench.student(RECIPES[1])).to(bench.device).eval()
    found = []
    length = 10 if bench.sizes is FULL else 2
    for rows in (1, 16) if bench.sizes is FULL else (1,):
        waveforms = bench.waveforms(length, rows)
        with torch.inference_mode():
            ours = bench.seconds(lambda waveforms=waveforms: student.encode(waveforms))
        theirs = bench.seconds(lambda waveforms=waveforms: bench.teacher(waveforms))
        rate = rows * length / ours
        found.append({"rows": rows, "audio_seconds_per_second": rate, "relative_to_teacher": theirs / ours})
    return found


def large_batches(bench: Bench, rows: int = 90, seconds: int = 16) -> Iterator[tuple[str, float, float]]:
    """Yield checks of batches in which the first convolution has more values than an int32 counts.

    Args:
        bench: The measurement.
        rows, seconds: Size of the batch. Default: 1,440 s, 2.4 billion values.

    Yields:
        The name, the difference and its limit.
    """
    waveforms = bench.waveforms(seconds, rows)
    student = Student(bench.student(RECIPES[1])).to(bench.device).eval()
    with torch.inference_mode():
        for name, run in (("teacher", bench.teacher), ("student", lambda x: student.encode(x)[0])):
            together, alone = run(waveforms)[-1, -1], run(waveforms[-1:])[-1, -1]
            difference = float(relative_error(alone[:, None], together[:, None]))
            yield f"{name} in a batch of {rows * seconds} s against alone", difference, 1e-4
    settings = bench.settings()
    distiller, weight = make_distiller(student, settings).eval(), student.conv_blocks[1].conv.weight
    count = student.config.num_frames(waveforms.shape[1])
    targets = torch.randn(rows, len(bench.layers), count, bench.teacher.dim, device=bench.device)

    def gradient(some: slice) -> Tensor:
        student.zero_grad(set_to_none=True)
        lengths = [waveforms.shape[1]] * len(waveforms[some])
        given = torch.tensor(lengths, device=bench.device)
        frames = student.num_frames(given)
        batch = Batch(["noise"] * len(lengths), waveforms[some], given, frames, targets[some], None)
        batch_loss(distiller, batch, settings, rows * count, lengths=lengths).total.backward()
        return weight.grad.flatten()

    half = rows // 2
    parts = gradient(slice(half)) + gradient(slice(half, None))
    difference = float((gradient(slice(None)) - parts).norm() / parts.norm())
    yield f"gradient of a batch of {rows * seconds} s against its halves", difference, 3e-2


def check(bench: Bench, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each numerical check with its value and its limit."""
    found: list[dict[str, Any]] = []

    def add(name: str, value: float, limit: float) -> None:
        found.append({"check": name, "value": value, "limit": limit, "passed": value <= limit})

    limits = {"fp32": 1e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 1e-1}
    for row in measured.get("teacher", ()):
        if row["arithmetic"] in limits:
            add(f"teacher in {row['arithmetic']} against fp32", row["relative_error"], limits[row["arithmetic"]])
    for row in measured.get("codecs", ()):
        add(
            f"{row['codec']} on the device against a CPU", row["difference_from_cpu"], 0.01 * row["stated_error"] + 1e-6
        )
    bench.cache("cache-fp32", "fp32")
    cached = CacheReader(bench.folder / "cache-fp32", "train")
    by_id = {utterance.id: utterance for utterance in bench.utterances}
    online = OnlineReader([by_id[name] for name in cached.ids], bench.teacher, MASKS)
    one, other = (reader.read([0, 1], 0).to(bench.device) for reader in (cached, online))
    real = ~(torch.arange(one.targets.shape[2], device=bench.device) >= one.num_frames[:, None])
    ours, theirs = (batch.targets.transpose(1, 2)[real] for batch in (one, other))
    add("cached targets against online ones", float(relative_error(theirs, ours).max()), 1e-3)
    long, short = int(1.5 * SAMPLE_RATE), SAMPLE_RATE
    waveforms = bench.waveforms(1.5, 2)
    student = Student(bench.student(RECIPES[1])).to(bench.device).eval()
    with tf32(bench.on_gpu), torch.inference_mode():
        for name, run in (("teacher", bench.teacher), ("student", lambda x, n: student.encode(x, n)[0])):
            for precision in (torch.float32, torch.bfloat16) if name == "student" else (torch.float32,):
                with torch.autocast(bench.device.type, precision, enabled=precision != torch.float32):
                    together = run(waveforms, torch.tensor([short, long]))[0, -1, :49].float()
                    alone = run(waveforms[:1, :short], torch.tensor([short]))[0, -1].float()
                limit = (1e-2 if bench.on_gpu else 1e-4) if precision == torch.float32 else 5e-2
                difference = float(relative_error(alone[:, None], together[:, None]))
                add(f"{name} in a batch against alone, {str(precision).removeprefix('torch.')}", difference, limit)
    if bench.on_gpu and bench.sizes is FULL:
        for name, difference, limit in large_batches(bench):
            add(name, difference, limit)
    rows = bench.train(bench.student(RECIPES[1]), cached, precision="fp16", use_gpu=True, max_skipped_steps=40)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    causes = {row["cause"] for row in rows if row["kind"] == "skipped"} - {"loss scale"}
    add("steps of fp16 that were skipped for another cause than the loss scale", float(len(causes)), 0)
    add("loss of fp16 against that of the first step", losses[-1] / losses[0], 1.5)
    return found


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Use small sizes, only to try the script.")] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "device.json",
    only: Annotated[list[str] | None, typer.Option(help="Measure this, and others that are given.")] = None,
) -> None:
    """Measure everything on one device, print it, and write it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = QUICK if quick else FULL
    measures: dict[str, Callable[[Bench], Any]] = {
        "teacher": measure_teacher,
        "build": measure_build,
        "steps": measure_steps,
        "per_step": measure_calls,
        "memory": measure_memory,
        "auto": measure_auto,
        "auto_build": measure_auto_build,
        "codecs": measure_codecs,
        "reader": measure_reader,
        "inference": measure_inference,
    }
    measured: dict[str, Any] = {}
    if unknown := {*(only or ())} - {*measures, "checks"}:
        raise typer.BadParameter(f"--only {unknown.pop()} is none of {', '.join(measures)} and checks")
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(torch.device(device), sizes, Path(folder))
        # Last, since they look at what was measured.
        for name, measure in (measures | {"checks": lambda bench: check(bench, measured)}).items():
            if only and name not in only:
                continue
            began = time.perf_counter()
            try:
                measured[name] = measure(bench)
            except Exception as error:  # Time on a GPU is short, so what else there is to measure follows.
                traceback.print_exc()
                failed.append(f"{name} ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
                continue
            seconds = time.perf_counter() - began
            print(f"{name} ({seconds:.0f} s)", json.dumps(measured[name], indent=1), flush=True)
    write_result(output, device=device, sizes=vars(sizes), failed=failed, **measured)
    failed += [row["check"] for row in measured.get("checks", ()) if not row["passed"]]
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
