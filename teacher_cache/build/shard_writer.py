"""From audio to shard files: decoding on one side, the teacher and the codec in the middle, Parquet on the other."""

import errno
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import ColumnCodec
from ray_distill.teacher_cache.embedded_audio import from_flac, from_pcm, to_flac, to_pcm
from ray_distill.teacher_cache.frames import SAMPLE_RATE, padding_mask
from ray_distill.teacher_cache.storage.build_statistics import Passes, TeacherWork
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile, column_name, file_record, write_commit
from ray_distill.teacher_cache.storage.cache_spec import CacheError, Part
from ray_distill.teacher_cache.storage.shard_plan import Shard, Utterance
from ray_distill.teacher_cache.targets.batch_sampler import cut_by_seconds
from ray_distill.teacher_cache.targets.online_targets import load_source, masks_of
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher, load_teacher

_PENDING_BATCHES = 4
"""Encoded batches that may wait for the disk."""


@dataclass(frozen=True)
class ShardAudio:
    """A shard's audio, decoded.

    Attributes:
        waveforms: float32 in [-1, 1], in the shard's order.
        embedded: what goes into the ``audio`` column: FLAC or little-endian 16-bit PCM.
        failures: one sentence for each utterance that could not be read; the others are then useless.
    """

    waveforms: list[np.ndarray]
    embedded: list[bytes]
    failures: list[str]


def decode_shard(cache: Cache, shard: Shard) -> ShardAudio:
    """A shard's audio, from its finished clean part where there is one, else from the corpus. Runs where CPUs are."""
    holder = cache.files(shard)[0]
    if cache.store.size(holder.commit) is not None:
        return _embedded_audio(cache, holder)
    return corpus_audio(cache, shard)


def corpus_audio(cache: Cache, shard: Shard) -> ShardAudio:
    """A shard's audio, from the corpus."""
    encode = to_flac if cache.spec.audio == "flac" else to_pcm
    waveforms, embedded, failures = [], [], []
    for utterance in shard.utterances:
        try:
            waveform = load_source(utterance)
        except (ValueError, OSError) as error:
            failures.append(str(error))
            continue
        waveforms.append(waveform)
        embedded.append(encode(waveform))
    return ShardAudio(waveforms, embedded, failures)


def _embedded_audio(cache: Cache, holder: ShardFile) -> ShardAudio:
    decode = from_flac if cache.spec.audio == "flac" else from_pcm
    try:
        with pq.ParquetFile(cache.store.open(holder.name), page_checksum_verification=True) as file:
            embedded = file.read(columns=["audio"], use_threads=False)["audio"].to_pylist()
        return ShardAudio([decode(value) for value in embedded], embedded, [])
    except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        place = cache.store.at(holder.name)
        return ShardAudio([], [], [f"{place} is damaged ({error}); `python -m teacher_cache repair` rebuilds it"])


def shard_to_json(shard: Shard) -> str:
    """A shard as it travels through Ray Data."""
    return json.dumps(asdict(shard))


def shard_from_json(text: str) -> Shard:
    """The reverse of `shard_to_json`."""
    tree = json.loads(text)
    return Shard(**(tree | {"utterances": [Utterance(**u) for u in tree["utterances"]]}))


class ShardWriter:
    """Runs the teacher over whole shards and writes their missing files. Lives in a Ray Data actor, or anywhere else.

    Several threads may call it: the teacher works for one at a time, while the others read or write.

    Args:
        location: of an opened cache (``cache.json`` is there).
        teacher: a teacher, or what `load_teacher` takes.
        device: ``cuda`` or ``cpu``, for a teacher that is to be loaded.

    Raises:
        CacheError: it is another teacher's cache.
    """

    def __init__(self, location: str, teacher: str | Teacher, device: str = "cpu") -> None:
        self._cache = Cache.open(location)
        if device == "cpu":
            torch.set_num_threads(self._cache.record["threads"])
        self._teacher = load_teacher(teacher, device) if isinstance(teacher, str) else teacher
        if self._teacher.fingerprint != self._cache.spec.teacher:
            raise CacheError(f"{self._teacher.name} is not the teacher that the cache at {location} was made with")
        self._codecs = [self._cache.codecs(number) for number in range(len(self._cache.layer_sets))]
        self._working = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Ray Data's batch function: decoded shards in, one small record each out."""
        records = []
        for row in range(batch.num_rows):
            shard = shard_from_json(batch["shard"][row].as_py())
            samples = from_pcm(batch["pcm"][row].as_buffer())
            ends = np.cumsum([utterance.num_samples for utterance in shard.utterances])
            failures = json.loads(batch["failures"][row].as_py())
            waveforms = [] if failures else np.split(samples, ends[:-1])
            embedded = [value.as_py() for value in batch["audio"][row]]
            records.append(self.write(shard, ShardAudio(list(waveforms), embedded, failures)))
        return pa.Table.from_pylist(records)

    def write(self, shard: Shard, audio: ShardAudio | None = None) -> dict[str, Any]:
        """Writes a shard's missing files.

        Args:
            shard: of the cache's plan.
            audio: decoded; read here where it is not given.

        Returns:
            ``shard``, ``utterances``, ``seconds`` of audio, ``busy`` (seconds of the teacher and the codec), ``bytes`` written, the
            columns of `TeacherWork` and ``failures``: sentences; with any of them the shard is left unfinished. ``full`` is
            whether the disk was.

        Raises:
            CacheError: the teacher's device has too little memory, so that going on would be in vain.
        """
        record = {"shard": shard.number, "utterances": len(shard.utterances), "seconds": shard.seconds, "busy": 0.0}
        work = TeacherWork()
        missing = [file for file in self._cache.files(shard) if self._cache.store.size(file.commit) is None]
        failures: list[str] = []
        full = False
        written = 0
        if missing:
            audio = audio or decode_shard(self._cache, shard)
            failures = audio.failures
            try:
                if not failures:
                    record["busy"] = self._write_files(shard, missing, audio, work)
                    written = sum(self._cache.store.size(file.name) or 0 for file in missing)
            except torch.OutOfMemoryError as error:
                raise CacheError(
                    f"{self._teacher.name} ran out of memory on {self._teacher.device} with batches of "
                    f"{self._cache.spec.batch_seconds:g} s of audio; keep other work off that device, or lower "
                    "cache.batch_seconds and give another cache.path, as a cache keeps to its own"
                ) from error
            except ValueError as error:
                failures = [f"shard {shard.number}: {error}"]
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                failures = [f"shard {shard.number} could not be written to {self._cache.store.location}: {error}"]
        return record | work.flat() | {"bytes": written, "failures": failures, "full": full}

    def _write_files(self, shard: Shard, files: list[ShardFile], audio: ShardAudio, work: TeacherWork) -> float:
        samples = np.array([len(waveform) for waveform in audio.waveforms])
        if shard.num_frames != [self._teacher.num_frames(n) for n in samples.tolist()]:
            raise CacheError(
                f"its plan has other frames than {self._teacher.name} makes; plan_shards takes the teacher's num_frames"
            )
        busy = 0.0
        with ExitStack() as stack:
            outputs = [stack.enter_context(_output(self._cache, file, self._codecs, shard, audio)) for file in files]
            pool = stack.enter_context(ThreadPoolExecutor(1))
            waiting: list[Future[None]] = []
            for batch in cut_by_seconds(range(len(samples)), samples, self._cache.spec.batch_seconds):
                with self._working:
                    started = time.perf_counter()
                    encoded = self._encode(
                        outputs,
                        [shard.utterances[i].id for i in batch],
                        [audio.waveforms[i] for i in batch],
                        [shard.num_frames[i] for i in batch],
                        work,
                    )
                    busy += time.perf_counter() - started
                waiting += [
                    pool.submit(output.write, batch, *rest) for output, rest in zip(outputs, encoded, strict=True)
                ]
                while len(waiting) > _PENDING_BATCHES * len(outputs):
                    waiting.pop(0).result()
            for future in waiting:
                future.result()
        return busy

    def _encode(
        self,
        outputs: list["_Output"],
        ids: list[str],
        waveforms: list[np.ndarray],
        frames: list[int],
        work: TeacherWork,
    ) -> list[tuple[list[np.ndarray], np.ndarray | None]]:
        """For every output: each column's codes, frames of the batch one after the other, and the masks (B, T)."""
        device, masks = self._teacher.device, self._cache.spec.masks
        padded, lengths = (tensor.to(device) for tensor in pad_waveforms(waveforms))
        real = ~padding_mask(torch.tensor(frames, device=device), max(frames))
        kinds = {output.part.kind for output in outputs if output.codecs}
        clean = self._hidden(padded, lengths, None, work.clean) if kinds & {"clean", "composite"} else None
        encoded = []
        draw: int | None = None
        mask: Tensor | None = None
        masked: Tensor | None = None
        for output in outputs:
            if output.part.draw is not None and output.part.draw != draw:
                draw = output.part.draw
                mask = masks_of(masks, draw, ids, frames).to(device)
                masked = self._hidden(padded, lengths, mask, work.masked)
            targets, kept = clean, real
            if output.part.kind != "clean":
                assert mask is not None and masked is not None
                targets, kept = masked, real & ~mask
                if output.part.kind == "composite":
                    assert clean is not None
                    targets, kept = torch.where(mask[:, None, :, None], clean, masked), real
            codes = []
            if output.codecs:
                assert targets is not None
                frames_NLD = targets.transpose(1, 2)[kept]
                for codec in output.codecs:
                    layers = [layer - 1 for layer in codec.layers]
                    codes.append(codec.encode(frames_NLD[:, layers]).cpu().numpy())
            encoded.append((codes, None if output.part.kind == "clean" or mask is None else mask.cpu().numpy()))
        return encoded

    def _hidden(self, padded: Tensor, lengths: Tensor, mask: Tensor | None, passes: Passes) -> Tensor:
        started = time.perf_counter()
        states = hidden_states(self._teacher, self._cache.spec.precision, padded, lengths, mask)
        if states.is_cuda:
            torch.cuda.synchronize(states.device)
        passes.add(time.perf_counter() - started, float(lengths.sum()) / SAMPLE_RATE)
        return states


def hidden_states(teacher: Teacher, precision: str, padded: Tensor, lengths: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, T, D) float32 of all layers, the teacher computing in ``precision``."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    with nullcontext() if half is None else torch.autocast(teacher.device.type, half):
        return teacher.hidden_states(padded, lengths, mask)


class _Output:
    """One shard file being written: one row group per utterance, in the shard's order."""

    def __init__(
        self, path: Path, part: Part, codecs: tuple[ColumnCodec, ...], shard: Shard, audio: ShardAudio
    ) -> None:
        self.part, self.codecs = part, codecs
        self._shard = shard
        self._audio = audio.embedded if part.kind == "clean" and part.layer_set == 0 else None
        fields = [pa.field("id", pa.string(), nullable=False)]
        if self._audio is not None:
            fields += [
                pa.field("num_samples", pa.int64(), nullable=False),
                pa.field("num_frames", pa.int64(), nullable=False),
                pa.field("audio", pa.large_binary(), nullable=False),
            ]
        if part.kind != "clean":
            fields.append(pa.field("mask", pa.list_(pa.field("element", pa.bool_(), nullable=False)), nullable=False))
        compression = {field.name: "none" for field in fields}
        for codec in codecs:
            fields.append(pa.field(column_name(codec.layers), pa.large_binary(), nullable=False))
            compression[fields[-1].name] = codec.compression
        self._schema = pa.schema(fields)
        # Codes have no useful statistics; dictionaries would double the work.
        self.writer = pq.ParquetWriter(
            path,
            self._schema,
            compression=compression,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def write(self, rows: list[int], codes: list[np.ndarray], masks: np.ndarray | None) -> None:
        """Appends the shard's rows; codes hold their kept frames one after the other."""
        starts = [0] * len(codes)
        for b, row in enumerate(rows):
            frames = self._shard.num_frames[row]
            values: list[Any] = [self._shard.utterances[row].id]
            kept = frames
            if self._audio is not None:
                values += [self._shard.utterances[row].num_samples, frames, self._audio[row]]
            if masks is not None:
                values.append(masks[b, :frames])
                if self.part.kind == "masked":
                    kept -= int(masks[b, :frames].sum())
            for n, (codec, column) in enumerate(zip(self.codecs, codes, strict=True)):
                value = column[starts[n] : starts[n] + kept]
                starts[n] += kept
                values.append(np.ascontiguousarray(value.T if codec.planar else value).tobytes())
            arrays = [pa.array([value], field.type) for value, field in zip(values, self._schema, strict=True)]
            self.writer.write_table(pa.table(arrays, schema=self._schema), row_group_size=1)


@contextmanager
def _output(
    cache: Cache, file: ShardFile, codecs: list[tuple[ColumnCodec, ...]], shard: Shard, audio: ShardAudio
) -> Iterator[_Output]:
    """A shard file that is put in its place and committed when the block ends well."""
    chosen = codecs[file.part.layer_set] if file.part.features else ()
    with cache.store.create(file.name) as path:
        output = _Output(path, file.part, chosen, shard, audio)
        try:
            yield output
        finally:
            output.writer.close()
        record = file_record(path, len(shard.utterances), file.content)
    write_commit(cache.store, file, record)
