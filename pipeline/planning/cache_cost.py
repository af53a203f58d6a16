"""The cost of a cache before it is built, estimated from the corpus and a short run of the teacher on this machine."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import SEEK_END
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.table import Table
from torch import Tensor

from ray_distill.pipeline.ray_session import counted
from ray_distill.teacher_cache.audio import read_header
from ray_distill.teacher_cache.build.codec_fit import CodecSample, codec_pass_seconds, sample_order
from ray_distill.teacher_cache.codecs import check_codec, discrete_bytes, is_joint, is_learned, open_codec
from ray_distill.teacher_cache.embedded_audio import to_flac
from ray_distill.teacher_cache.frames import SAMPLE_RATE, shown_audio
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec, Targets
from ray_distill.teacher_cache.storage.shard_assignment import count_frames
from ray_distill.teacher_cache.storage.shard_plan import Utterance, Utterances
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.frame_rate import teacher_mask
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher

_MASKS_SAMPLED = 200
_SECONDS_SAMPLED = 40.0
"""Seconds of audio for timing the teacher and trying the codecs."""
_ROW_BYTES, _COLUMN_BYTES = 370, 60
"""Bytes of a row of a shard beside its codes and audio, and those that each column of codes adds. Most are Parquet's metadata, since
each utterance is a row group of its own."""
_TARGETS: tuple[Targets, ...] = ("clean_and_masked", "composite_only", "clean_only")
_COMPARED = ("fp16", "int8", "layer-pca", "pca")
TYPICAL_BYTES_PER_VALUE = {"fp16": 2.0, "int8": 0.81, "layer-pca": 0.17, "pca": 0.073}
"""Stored bytes of a value by codec, after compression, as measured for Whisper-small (12 layers of width 768) by
``benchmarks/cache/codec_rate_distortion.py``."""


def typical_bytes_per_hour(layers: int, width: int, frame_rate: float) -> dict[str, float]:
    """Return the size in bytes of the features of one hour of audio in one pass, without the audio, by codec.

    It is exact for fp16. The other codecs depend on the features; `plan_cost` measures them for a teacher and a corpus.

    Args:
        layers: Number of cached layers.
        width: Width D of the layers.
        frame_rate: Frames per second.
    """
    values = 3600.0 * frame_rate * layers * width
    return {codec: size * values for codec, size in TYPICAL_BYTES_PER_VALUE.items()}


@dataclass(frozen=True)
class CostPlan:
    """Expected cost of a cache. Bytes and hours are estimated from a sample; counts are exact.

    Attributes:
        hours: Hours of audio.
        utterances, frames: Numbers of utterances and frames of the corpus.
        train_share: Share of the training split, the only one with masked passes, in the frames.
        train_utterances: Number of utterances in it.
        draws: Number of mask draws.
        masked_fraction: Fraction of masked frames, from the masks of a sample of utterances; 0 without draws.
        bytes_per_frame: Size of a frame of all layers of one pass, by codec.
        audio_bytes: Size of the audio, in the cache or where it refers to; with ``audio`` ``source`` that of the corpus's files.
        audio_per_second: Seconds of audio per second that one teacher processes on ``device`` in one pass.
        device: Device of that measurement.
        spec: Specification of the cache that is needed.
        free_bytes: Free space of the cache's disk; None for an object store.
        there_bytes: Size of the shard files of the cache if it exists already, else 0.
        lacking: What an existing cache lacks, in words; None if there is none.
        teacher_seconds: Seconds of audio, summed over the teacher's passes, that it processes to build what is missing.
        fit_seconds: Seconds of audio, summed likewise, that it processes before that to fit the codec.
        source_per_second: Seconds of audio that a core of this machine reads per second from the corpus; None unless the audio is read
            there.
    """

    hours: float
    utterances: int
    frames: int
    train_share: float
    train_utterances: int
    draws: int
    masked_fraction: float
    bytes_per_frame: dict[str, float]
    audio_bytes: float
    audio_per_second: float
    device: str
    spec: CacheSpec
    free_bytes: int | None
    there_bytes: int
    lacking: str | None
    teacher_seconds: float
    fit_seconds: float
    source_per_second: float | None = None

    def total_bytes(self, codec: str, targets: Targets) -> float:
        """Return the size of the whole cache for a codec and a choice of targets, without audio that it refers to."""
        masked = self.train_share * self.draws
        passes = {
            "clean_only": 1.0,
            "clean_and_masked": 1 + masked * (1 - self.masked_fraction),
            "masked_everywhere": 1 + masked,
            "composite_only": 1 - self.train_share + masked if self.draws else 1.0,
        }[targets]
        held = self.audio_bytes if self.spec.embeds_audio else 0.0
        rows = self.utterances + (0 if targets == "clean_only" else self.draws * self.train_utterances)
        columns = 1 if is_joint(codec) else len(self.spec.layers)
        codes = self.frames * self.bytes_per_frame[codec] * passes
        return held + codes + rows * (_ROW_BYTES + columns * _COLUMN_BYTES)

    @property
    def bytes_per_epoch(self) -> float:
        """Bytes that one epoch of training reads: the audio, and what the targets of one draw need."""
        passes = 1.0
        if self.draws and self.spec.targets == "clean_and_masked":
            passes += self.train_share * (1 - self.masked_fraction)
        return self.audio_bytes + self.frames * self.bytes_per_frame[self.spec.codec] * passes

    @property
    def teacher_passes(self) -> int:
        """Number of teacher passes over the training split that building the whole cache takes."""
        return 1 if self.spec.targets == "clean_only" else 1 + self.draws

    @property
    def teacher_hours(self) -> float:
        """Hours of one device that the teacher takes for what is missing, the fit of the codec included."""
        return (self.teacher_seconds + self.fit_seconds) / 3600 / self.audio_per_second

    @property
    def pays_after(self) -> int:
        """Number of epochs after which a teacher in the loop has needed more passes than building the cache."""
        online = 1 if self.spec.targets in ("clean_only", "masked_everywhere") or not self.draws else 2
        return math.ceil(self.teacher_passes / online)


def plan_cost(
    utterances: Sequence[Utterance],
    spec: CacheSpec,
    teacher: Teacher,
    location: str,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> CostPlan:
    """Estimate the cost of a cache, by running the teacher and the codecs on about 40 s of its audio.

    Args:
        utterances: Utterances of the corpus.
        spec: Specification of the cache.
        teacher: Teacher, on the device to time it on.
        location: Folder or URI of the cache.
        progress: Called with the numbers of finished and of all measurements, and what is measured next. Default: nothing is called.
    """
    utterances = Utterances.of(utterances)
    frames = count_frames(utterances.num_samples, teacher.num_frames)
    masked = 0.0
    if spec.masks.draws:
        step = max(1, len(utterances) // _MASKS_SAMPLED)
        chosen, counts = utterances[::step], frames[::step].tolist()
        lengths = [u.num_samples for u in chosen]
        mask = teacher_mask(spec.masks, spec.rate, 0, [u.id for u in chosen], lengths, counts)
        masked = float(mask.sum()) / sum(counts)
    waveforms: list[np.ndarray] = []
    sample: list[Utterance] = []
    problem: ValueError | None = None
    train = utterances.of_split("train")
    for utterance in sample_order(train):  # As in the build, whose codec is fitted to the first of them.
        try:
            waveforms.append(load_waveform(utterance))
            sample.append(utterance)
        except ValueError as error:  # The build leaves it out and counts it.
            problem = error
        if sum(map(len, waveforms)) > _SECONDS_SAMPLED * SAMPLE_RATE:
            break
    if not waveforms and problem is not None:
        raise problem
    seconds = sum(len(w) for w in waveforms) / SAMPLE_RATE
    source_per_second = None
    if spec.audio == "source":
        per_second = sum(map(_source_bytes, sample)) / seconds
        source_per_second = seconds / _read_seconds(sample)
    elif spec.audio == "pcm":
        per_second = 32_000.0
    else:
        per_second = sum(len(to_flac(w)) for w in waveforms) / seconds
    codecs = list(dict.fromkeys([spec.codec, *_COMPARED]))
    progress(0, 1 + len(codecs), teacher.name)
    hidden, audio_per_second = _timed(teacher, spec, [pad_waveforms([w]) for w in waveforms])
    frames_of_codec = CodecSample()
    for number, states in enumerate(hidden, start=1):
        frames_of_codec.add(states, last=number == len(train))
    bytes_per_frame = {}
    for done, codec in enumerate(codecs, start=1):
        progress(done, 1 + len(codecs), f"codec {codec}")
        bytes_per_frame[codec] = _bytes_per_frame(codec, frames_of_codec, hidden)
    store = Store(location)
    total = utterances.seconds
    existing = Cache.open(store) if Cache.exists(store) else None
    new_layers = set(spec.layers) - set(existing.spec.layers if existing else ())
    # A cache that has all layers gets more draws, which need the clean pass of the training split only if they are composite.
    draws = spec.masks.draws if spec.targets != "clean_only" else 0
    if existing is None or new_layers:
        seconds_of_teacher = total + draws * train.seconds
    else:
        added = max(0, draws - existing.spec.masks.draws)
        seconds_of_teacher = (added + (1 if added and spec.targets == "composite_only" else 0)) * train.seconds
    fits = is_learned(spec.codec) and bool(new_layers)
    return CostPlan(
        hours=total / 3600,
        utterances=len(utterances),
        frames=int(frames.sum()),
        train_utterances=len(train),
        train_share=float(count_frames(train.num_samples, teacher.num_frames).sum() / frames.sum()),
        draws=spec.masks.draws,
        masked_fraction=masked,
        bytes_per_frame=bytes_per_frame,
        audio_bytes=total * per_second,
        audio_per_second=audio_per_second,
        device=str(teacher.device),
        spec=spec,
        free_bytes=store.free_bytes(),
        there_bytes=cache_bytes(existing) if existing else 0,
        lacking=None if existing is None else existing.spec.lacking(spec),
        teacher_seconds=seconds_of_teacher,
        fit_seconds=codec_pass_seconds(spec, len(new_layers), train.seconds, masked) if fits else 0.0,
        source_per_second=source_per_second,
    )


def _source_bytes(utterance: Utterance) -> float:
    """Return the number of bytes that the audio of an utterance has in the corpus; of a piece, its share of the whole."""
    address = utterance.address
    with address.opened() as stream:
        size = stream.stat().st_size if isinstance(stream, Path) else stream.seek(0, SEEK_END)
    header = read_header(address)
    if (address.start, address.end) == (None, None) or not header.frames:
        return float(size)
    return size * min(1.0, utterance.num_samples / SAMPLE_RATE * header.rate / header.frames)


def _read_seconds(sample: Sequence[Utterance]) -> float:
    """Return the CPU time that reading some utterances from the corpus takes, in seconds, when they have been read before."""
    began = time.process_time()
    for utterance in sample:
        load_waveform(utterance)
    return max(time.process_time() - began, 1e-6)


def _timed(teacher: Teacher, spec: CacheSpec, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], float]:
    """Return each utterance's (T, L, D) on the CPU, and seconds of audio per second, after one batch to warm up."""

    def run(padded: Tensor, lengths: Tensor) -> Tensor:
        states = teacher(padded, lengths, layers=spec.layers, precision=spec.precision)
        return states[0].transpose(0, 1).cpu()

    run(*batches[0])
    started = time.perf_counter()
    hidden = [run(*batch) for batch in batches]
    elapsed = time.perf_counter() - started
    # The build leaves out utterances that are not finite. If all are, the codecs say so.
    hidden = [states for states in hidden if bool(states.isfinite().all())] or hidden
    return hidden, sum(int(lengths.sum()) for _, lengths in batches) / SAMPLE_RATE / elapsed


def _bytes_per_frame(name: str, sample: CodecSample, hidden: list[Tensor]) -> float:
    """Return the stored bytes of a frame of all layers, from encoding some utterances one by one as in a shard.

    Args:
        name: Name of the codec.
        sample: Frames to fit it to.
        hidden: (T, L, D) hidden states of each utterance.
    """
    _, layers, dim = hidden[0].shape
    if (size := discrete_bytes(name)) is not None:
        return float(layers * size)
    state = sample.fit(check_codec(name))
    zstd = pa.Codec("zstd")
    stored = 0
    for codec in open_codec(name, range(1, layers + 1), dim, state):
        for utterance in hidden:
            codes = codec.encode(utterance[:, [layer - 1 for layer in codec.layers]]).numpy()
            if codec.compression == "none":
                stored += codes.size
            else:
                stored += len(zstd.compress((codes.T if codec.planar else codes).tobytes(), asbytes=True))
    return stored / sum(map(len, hidden))


def shown_bytes(number: float) -> str:
    """Return a number of bytes in the largest decimal unit of which it has one, such as ``19.10 MB``."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number / 1e3:,.2f} kB"


def shown_hours(hours: float) -> str:
    """Return a duration in hours, or in minutes if it is less than one hour."""
    return f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.2g} min"


def cost_table(plan: CostPlan) -> Table:
    """Return a table of the sizes of the cache by codec and targets; an arrow marks the configured ones."""
    spec = plan.spec
    draws = f", with {counted(plan.draws, 'mask draw')}" if plan.draws else ""
    beside = "" if spec.embeds_audio else ", beside the audio"
    table = Table(title=f"estimated size of the cache{draws}{beside}", show_lines=False)
    table.add_column("codec")
    kinds = _TARGETS if spec.targets in _TARGETS else (spec.targets, *_TARGETS[1:])
    for targets in kinds:
        table.add_column(targets, justify="right", no_wrap=True)
    table.add_column("kB per s", justify="right", no_wrap=True)  # Per second of audio; the table has to fit 80 columns.
    for codec in plan.bytes_per_frame:
        chosen = codec == spec.codec
        cells = [
            shown_bytes(plan.total_bytes(codec, targets)) + (" <-" if chosen and targets == spec.targets else "")
            for targets in kinds
        ]
        rate = plan.total_bytes(codec, spec.targets) / plan.hours / 3600 / 1e3
        table.add_row(codec, *cells, f"{rate:.1f}", style="bold" if chosen else None)
    return table


def cost_lines(plan: CostPlan) -> list[str]:
    """Return the estimates that are not in the table, one sentence each."""
    spec = plan.spec
    subset = (
        "a run that needs only some of these layers still reads all of them" if spec.codec.startswith("pca") else ""
    )
    beside = "" if spec.embeds_audio else f" beside {shown_bytes(plan.audio_bytes)} of audio"
    source = []
    if plan.source_per_second is not None:
        beside += " in the corpus"
        source = [
            f"the audio is read from the corpus in each epoch: {plan.source_per_second:,.0f} s of audio per CPU second, measured now; "
            "if that is too slow for the student, set cache.audio=store"
        ]
    if plan.lacking is None:
        passes = counted(plan.teacher_passes, "teacher pass", "teacher passes")
        pays = f"; this pays off after {counted(plan.pays_after, 'epoch')}, compared with a teacher in the loop"
    else:
        passes = f"the cache has {shown_bytes(plan.there_bytes)} and lacks {plan.lacking}, which the teacher adds"
        pays = ""
    masks = f"{counted(plan.draws, 'mask draw')} ({plan.masked_fraction:.0%} masked), " if plan.draws else ""
    fit = f", with {shown_audio(plan.fit_seconds)} of audio to fit the codec" if plan.fit_seconds else ""
    return [
        f"{shown_audio(plan.hours * 3600)}, {plan.frames} frames, {counted(len(spec.layers), 'layer')} x {spec.dim}, "
        f"{masks}{spec.codec}: "
        f"about {shown_bytes(plan.total_bytes(spec.codec, spec.targets))}{beside}, {shown_bytes(plan.bytes_per_epoch)} read per epoch"
        + (f"; {subset}" if subset else ""),
        f"{passes}{fit}: about {shown_hours(plan.teacher_hours)} on one {plan.device} "
        f"({plan.audio_per_second:.0f} s of audio per second, measured now){pays}",
        *source,
    ]
