"""Shard files from decoded audio: the teacher and the codecs on the teacher's device, Parquet on the CPU.

An utterance that can't be decoded or encoded is left out and recorded; see `failed_utterances`.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ray_distill.memory import ran_out_of_memory
from ray_distill.teacher_cache.build.host_copy import copy_to_host
from ray_distill.teacher_cache.build.pass_memory import BatchSize
from ray_distill.teacher_cache.build.shard_audio import ShardAudio, load_shard_audio
from ray_distill.teacher_cache.build.shard_output import EncodedPart, ShardOutput, open_output, shard_record
from ray_distill.teacher_cache.codecs import ColumnCodec
from ray_distill.teacher_cache.embedded_audio import from_pcm
from ray_distill.teacher_cache.frames import SAMPLE_RATE, padding_mask
from ray_distill.teacher_cache.storage.build_statistics import PassTime, TeacherTime
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile
from ray_distill.teacher_cache.storage.cache_spec import CacheError, parts_of
from ray_distill.teacher_cache.storage.failed_utterances import reason_of
from ray_distill.teacher_cache.storage.shard_plan import Shard, Utterance, Utterances
from ray_distill.teacher_cache.targets.batch_sampler import cut_by_seconds
from ray_distill.teacher_cache.targets.frame_rate import teacher_mask
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher, load_teacher
from ray_distill.whole_files import is_disk_full

_PENDING_BATCHES = 4
"""Maximum number of encoded batches that wait for the disk."""
_HostArray = Callable[[], np.ndarray]
"""What `copy_to_host` returns."""


def shard_to_json(shard: Shard) -> str:
    """Serialise a shard for Ray Data."""
    return json.dumps(vars(shard) | {"utterances": [vars(utterance) for utterance in shard.utterances]})


def shard_from_json(text: str) -> Shard:
    """Deserialise the text of `shard_to_json`."""
    tree = json.loads(text)
    return Shard(**(tree | {"utterances": Utterances.of(Utterance(**u) for u in tree["utterances"])}))


class ShardWriter:
    """Runs the teacher over whole shards and writes their missing files, in a Ray Data actor or any other process.

    Several threads may call it. The teacher works for one thread at a time while the others read or write.

    Args:
        location: Location of a cache that has its ``cache.json``.
        teacher: A teacher, or a specification for `load_teacher`.
        device: ``cuda`` or ``cpu``: the teacher's, or where one given by its specification is loaded.
        max_failed: Maximum number of failed utterances of a shard; one with more is not finished. Default: no limit.
        gpu_share: Share of the GPU that this teacher has, up to 1. Default 1.

    Raises:
        CacheError: If the cache was made with another teacher, or the longest utterance does not fit on the GPU.
    """

    def __init__(
        self,
        location: str,
        teacher: str | Teacher,
        device: str = "cpu",
        *,
        max_failed: int | None = None,
        gpu_share: float = 1.0,
    ) -> None:
        self._cache = Cache.open(location)
        self._max_failed = max_failed
        if device == "cpu":
            torch.set_num_threads(self._cache.record["threads"])
        self._teacher = load_teacher(teacher, device) if isinstance(teacher, str) else teacher
        self._cache.check_teacher(self._teacher.name, self._teacher.fingerprint)
        if self._teacher.stated_rate != self._cache.spec.frame_rate:
            raise CacheError(
                f"the cache at {location} states {self._cache.spec.rate} frames per second, but {self._teacher.name} has "
                f"{self._teacher.frame_rate}; give a new cache.path (in Python, give CacheSpec the teacher's stated_rate)"
            )
        self._codecs = [self._cache.codecs(number) for number in range(len(self._cache.layer_sets))]
        self._teacher_lock = threading.Lock()
        self._size = BatchSize(self._cache.spec)
        if self._size.is_auto and device != "cpu":
            self._size.measure(self._cache, self._try_passes, self._teacher.device, gpu_share)

    def _try_passes(self, lengths: Sequence[int]) -> int:
        """Run all passes of the training split over noise, encode them, and return the bytes of the codes and masks."""
        noise = 0.1 * torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(0))
        outputs = [
            EncodedPart(part, self._codecs[part.layer_set] if part.features else (), {})
            for part in parts_of(self._cache.spec, len(self._codecs), "train")
        ]
        ids = [str(number) for number in range(len(lengths))]
        num_frames = [self._teacher.num_frames(length) for length in lengths]
        masks = self._masks(outputs, ids, lengths, num_frames)
        encoded = self._encode(outputs, ids, (noise, torch.tensor(lengths)), num_frames, masks, TeacherTime())
        arrays = [wait for codes, mask in encoded for wait in (*codes, *([] if mask is None else [mask]))]
        return sum(wait().nbytes for wait in arrays)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the decoded shards of a Ray Data batch and return one record for each; see `write`."""
        records = []
        for row in range(batch.num_rows):
            shard = shard_from_json(batch["shard"][row].as_py())
            samples = from_pcm(batch["pcm"][row].as_buffer())
            failed, problem = json.loads(batch["failed"][row].as_py()), batch["problem"][row].as_py()
            lengths = [0 if utterance.id in failed else utterance.num_samples for utterance in shard.utterances]
            waveforms = [] if problem else np.split(samples, np.cumsum(lengths)[:-1])
            embedded = [value.as_py() for value in batch["audio"][row]]
            records.append(self.write(shard, ShardAudio(list(waveforms), embedded, failed, problem)))
        return pa.Table.from_pylist(records)

    def write(self, shard: Shard, audio: ShardAudio | None = None) -> dict[str, Any]:
        """Write the missing files of a shard.

        Args:
            shard: A shard of the cache's plan.
            audio: Decoded audio. Default: read it here.

        Returns:
            Its `shard_record`. A shard with more failed utterances than are allowed is not finished either.

        Raises:
            CacheError: If the teacher's device has too little memory, so that other shards would fail too.
        """
        teacher_time = TeacherTime()
        missing = [file for file in self._cache.files(shard) if self._cache.store.size(file.commit) is None]
        failures: list[str] = []
        failed: dict[str, str] = {}
        full = False
        written = 0
        busy = seconds = 0.0
        if missing:
            audio = audio or load_shard_audio(self._cache, shard)
            failures = [audio.problem] if audio.problem else []
            try:
                if not failures:
                    busy, failed, seconds = self._write_fitting(shard, missing, audio, teacher_time)
                    written = sum(self._cache.store.size(file.name) or 0 for file in missing)
            except _TooManyFailedError as error:
                failed = error.failed
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                raise self._memory_error(audio) from error
            except ValueError as error:
                failures = [f"shard {shard.number}: {error}"]
            except OSError as error:
                full = is_disk_full(error)
                failures = [f"shard {shard.number} could not be written to {self._cache.store.location}: {error}"]
        return shard_record(
            shard,
            teacher_time,
            busy=busy,
            written=written,
            batch_seconds=seconds,
            failed=failed,
            failures=failures,
            notes=self._size.take_notes(),
            full=full,
        )

    def _memory_error(self, audio: ShardAudio) -> CacheError:
        """Return the error for a shard whose batches do not fit."""
        ran_out = f"{self._teacher.name} ran out of memory on {self._teacher.device} with"
        if self._size.is_auto:
            return CacheError(
                f"{ran_out} one utterance of {_longest(audio):.1f} s; stop other work on that device, or lower corpus.max_seconds and "
                "give a new cache.path, because a cache keeps it"
            )
        return CacheError(
            f"{ran_out} batches of {self._size.seconds:g} s of audio; stop other work on that device, or lower cache.batch_seconds, "
            "or corpus.max_seconds if one utterance is as long as a batch, and give a new cache.path, because a cache keeps both"
        )

    def _write_fitting(
        self, shard: Shard, files: list[ShardFile], audio: ShardAudio, teacher_time: TeacherTime
    ) -> tuple[float, dict[str, str], float]:
        """Write the files as `_write_files`, and return the size of the batches too.

        Where memory runs out with a size that was measured, the shard begins again with half of it.
        """
        while True:
            seconds = self._size.seconds
            try:
                return *self._write_files(shard, files, audio, teacher_time, seconds), seconds
            except (RuntimeError, MemoryError) as error:
                if not (self._size.is_auto and seconds > _longest(audio) and ran_out_of_memory(error)):
                    raise
            # The error is gone, and with it what held the memory of the passes.
            self._size.halve(seconds, self._teacher.device)

    def _write_files(
        self, shard: Shard, files: list[ShardFile], audio: ShardAudio, teacher_time: TeacherTime, seconds: float
    ) -> tuple[float, dict[str, str]]:
        """Write the files in batches of so many seconds.

        Returns:
            The seconds of the teacher and the codecs, and the failed utterances with reasons.
        """
        samples = np.array([len(waveform) for waveform in audio.waveforms])
        rows = [row for row, utterance in enumerate(shard.utterances) if utterance.id not in audio.failed]
        if any(shard.num_frames[row] != self._teacher.num_frames(int(samples[row])) for row in rows):
            raise CacheError(
                f"the cache at {self._cache.store.location} was planned for another teacher than {self._teacher.name}, because "
                "its numbers of frames differ; give a new cache.path (in Python, give plan_shards the teacher's num_frames)"
            )
        busy = 0.0
        with ExitStack() as stack:
            outputs = [
                stack.enter_context(open_output(self._cache, file, self._codecs, shard, audio)) for file in files
            ]
            # One thread for each file: its rows stay in order, and compression needs no interpreter lock.
            pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in outputs]
            waiting: list[Future[None]] = []
            for batch in cut_by_seconds(rows, samples, seconds):
                # While the teacher is at another batch.
                padded, lengths = pad_waveforms([audio.waveforms[i] for i in batch])
                if self._teacher.device.type == "cuda":
                    padded = padded.pin_memory()
                ids = [shard.utterances[i].id for i in batch]
                num_frames = [shard.num_frames[i] for i in batch]
                masks = self._masks(outputs, ids, lengths.tolist(), num_frames)
                with self._teacher_lock:
                    started = time.perf_counter()
                    encoded = self._encode(outputs, ids, (padded, lengths), num_frames, masks, teacher_time)
                    busy += time.perf_counter() - started
                waiting += [
                    pool.submit(_write, output, batch, *rest)
                    for pool, output, rest in zip(pools, outputs, encoded, strict=True)
                ]
                while len(waiting) > _PENDING_BATCHES * len(outputs):
                    waiting.pop(0).result()
            for future in waiting:
                future.result()
            failed = {name: reason for output in reversed(outputs) for name, reason in output.failed.items()}
            if self._max_failed is not None and len(failed) > self._max_failed:
                raise _TooManyFailedError(failed)
        return busy, failed

    def _masks(
        self, outputs: Sequence[EncodedPart], ids: list[str], lengths: Sequence[int], num_frames: list[int]
    ) -> dict[int, Tensor]:
        """Return the (B, T) masks of a batch on the CPU by the draws of the outputs."""
        spec, draws = self._cache.spec, dict.fromkeys(output.part.draw for output in outputs)
        return {
            draw: teacher_mask(spec.masks, spec.rate, draw, ids, lengths, num_frames)
            for draw in draws
            if draw is not None
        }

    def _encode(
        self,
        outputs: Sequence[EncodedPart],
        ids: list[str],
        waveforms: tuple[Tensor, Tensor],
        num_frames: list[int],
        masks: Mapping[int, Tensor],
        teacher_time: TeacherTime,
    ) -> list[tuple[list[_HostArray], _HostArray | None]]:
        """Return, per output, the codes of each column (frames of all utterances concatenated) and the (B, T) masks, all on their way
        to the host."""
        device = self._teacher.device
        padded, lengths = (tensor.to(device, non_blocking=True) for tensor in waveforms)
        real = ~padding_mask(torch.tensor(num_frames, device=device), max(num_frames))
        kinds = {output.part.kind for output in outputs if output.codecs}
        layers = sorted({layer for output in outputs for codec in output.codecs for layer in codec.layers})
        clean: Tensor | None = None
        if kinds & {"clean", "composite"}:
            clean = self._hidden_states(padded, lengths, None, layers, teacher_time.clean)
        encoded = []
        draw: int | None = None
        mask: Tensor | None = None
        masked: Tensor | None = None
        targets: Tensor | None = None
        for output in outputs:
            if output.part.draw is not None and output.part.draw != draw:
                draw = output.part.draw
                masked = targets = None  # The pass has their memory.
                mask = masks[draw].to(device)
                masked = self._hidden_states(padded, lengths, mask, layers, teacher_time.masked)
            targets, kept = clean, real
            if output.part.kind != "clean":
                assert mask is not None and masked is not None
                targets, kept = masked, real if output.part.at_masked else real & ~mask
                if output.part.kind == "composite":
                    assert clean is not None
                    targets, kept = torch.where(mask[:, None, :, None], clean, masked), real
            codes = []
            if output.codecs:
                assert targets is not None
                frames_NLD = targets.transpose(1, 2)[kept]
                targets = None
                for codec in output.codecs:
                    positions = [layers.index(layer) for layer in codec.layers]
                    coded, failed = _encoded(codec, frames_NLD[:, positions], kept)
                    codes.append(copy_to_host(coded))
                    output.fail({ids[b]: reason for b, reason in failed.items()})
                del frames_NLD
                if output.part.leads:
                    for other in outputs:
                        other.fail(output.failed)
            encoded.append((codes, None if output.part.kind == "clean" or mask is None else copy_to_host(mask)))
        return encoded

    def _hidden_states(
        self, padded: Tensor, lengths: Tensor, mask: Tensor | None, layers: Sequence[int], pass_time: PassTime
    ) -> Tensor:
        started = time.perf_counter()
        states = self._teacher(padded, lengths, mask, layers, precision=self._cache.spec.precision)
        if states.is_cuda:
            torch.cuda.synchronize(states.device)
        pass_time.add(time.perf_counter() - started, float(lengths.sum()) / SAMPLE_RATE)
        return states


def _longest(audio: ShardAudio) -> float:
    """Return the seconds of a shard's longest utterance."""
    return max(map(len, audio.waveforms), default=0) / SAMPLE_RATE


def _write(output: ShardOutput, rows: list[int], codes: list[_HostArray], masks: _HostArray | None) -> None:
    output.write(rows, [wait() for wait in codes], None if masks is None else masks())


def _encoded(codec: ColumnCodec, frames: Tensor, kept: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Encode the frames of a batch, and find the utterances that the codec can't represent.

    Args:
        codec: The codec.
        frames: (N, layers, D) float32, the kept frames of all utterances, concatenated.
        kept: (B, T) bool, True at frames that are kept.

    Returns:
        (N, bytes_per_frame) uint8, and the reasons by position in the batch for utterances that failed, whose codes mean nothing.
    """
    try:
        return codec.encode(frames), {}
    except ValueError:
        failed = {}
        usable = frames.clone()
        for b, values in enumerate(torch.split(usable, kept.sum(1).tolist())):
            try:
                codec.encode(values)
            except ValueError as error:
                failed[b] = reason_of(error)
                values.zero_()
        # The batch keeps its shape, so that the codes of the others don't change.
        return codec.encode(usable), failed


class _TooManyFailedError(Exception):
    """More utterances of a shard failed than the whole cache may lack."""

    def __init__(self, failed: dict[str, str]) -> None:
        super().__init__(f"{len(failed)} utterances failed")
        self.failed = failed


@contextmanager
def open_writer(
    cache: Cache, teacher: str | Teacher, device: str = "cpu", *, max_failed: int | None = None
) -> Iterator[ShardWriter]:
    """Yield a writer in this process. PyTorch uses the cache's number of threads until the block ends."""
    threads = torch.get_num_threads()
    try:
        yield ShardWriter(cache.store.location, teacher, device, max_failed=max_failed)
    finally:
        torch.set_num_threads(threads)
