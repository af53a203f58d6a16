"""The size of a teacher's batches while a cache is built. If ``cache.batch_seconds`` is ``auto``, the GPU memory decides."""

import gc
import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import DEFAULT_BATCH_SECONDS, CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import first_rows
from ray_distill.teacher_cache.targets.fitting_batch import (
    FittingBatch,
    find_fitting,
    largest_batches,
    plain,
    usable_bytes,
)

_NUMBERS = ("num_samples", "num_frames", "shard", "row")
"""Columns of a plan that are read together."""

RunPasses = Callable[[Sequence[int]], int]
"""Run all passes over a batch of utterances with so many samples, encode them, and return the bytes of the codes."""


class BatchSize:
    """The size of a worker's batches. Threads may share it.

    Args:
        spec: Specification of the cache.

    Attributes:
        is_auto: Whether the cache leaves the size to its workers. What they find then has no effect beyond rounding.
        seconds: Seconds of audio per batch, padding included: those of the cache or, if it is ``auto``, what was measured; the default
            before.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.is_auto = spec.batch_seconds == "auto"
        self.seconds = DEFAULT_BATCH_SECONDS if spec.batch_seconds == "auto" else spec.batch_seconds
        self._notes: list[str] = []
        self._lock = threading.Lock()

    def measure(self, cache: Cache, run_passes: RunPasses, device: torch.device, share: float) -> None:
        """Take what `find_fitting_passes` finds, and note it. The arguments and the error are its own."""
        found = find_fitting_passes(cache, run_passes, device, share)
        self.seconds = found.seconds
        self._notes.append(
            f"batches of {found.seconds:g} s of audio (auto) on {platform.node()}; the teacher's passes need "
            f"{found.peak_bytes / 1e9:.1f} of the {found.limit_bytes / 1e9:.1f} GB that they may use"
        )

    def halve(self, seconds: float, device: torch.device) -> None:
        """Halve a size for which memory ran out, unless another thread has done so, and give back unused memory."""
        with self._lock:
            if self.seconds == seconds:
                self.seconds = plain(seconds / 2)
                self._notes.append(
                    f"memory ran out on {platform.node()} with batches of {seconds:g} s of audio; the teacher goes on with "
                    f"{self.seconds:g} s"
                )
        _give_back(device)

    def take_notes(self) -> list[str]:
        """Return the sentences about the size since the last call."""
        with self._lock:
            notes, self._notes = self._notes, []
        return notes


def _give_back(device: torch.device) -> None:
    """Give back memory that is not used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def find_fitting_passes(cache: Cache, run_passes: RunPasses, device: torch.device, share: float = 1.0) -> FittingBatch:
    """Measure how many seconds of audio per batch a teacher's passes may have on a GPU, rounded down to a plain number.

    Args:
        cache: The cache that is built.
        run_passes: Function that runs them.
        device: The GPU.
        share: Share of the GPU that this process has. Default 1.

    Raises:
        CacheError: The longest utterance alone does not fit.
    """
    plan = cache.plan_columns(_NUMBERS)
    lengths = plan["num_samples"].to_numpy()
    starts = first_rows(plan["shard"].to_numpy())
    if share < 1:
        # Others measure on this GPU at the same time.
        torch.cuda.set_per_process_memory_fraction(share, device.index)
    memory = PassMemory(run_passes, lengths, device, share)
    shortest = float(lengths.max()) / SAMPLE_RATE
    # No batch has more than a shard, whose rows begin with its longest utterance.
    rows = np.diff(np.append(starts, len(lengths)))
    most = max(shortest, float((rows * lengths[starts]).max()) / SAMPLE_RATE)
    found = find_fitting(memory, memory.limit, shortest, most)
    _give_back(device)
    if found is None:
        more = "raise cache.gpus_per_actor, " if share < 1 else ""
        raise CacheError(
            f"cache.batch_seconds auto: the longest utterance ({shortest:.1f} s) alone needs more memory in the teacher's passes than "
            f"the GPU has left ({memory.limit / 1e9:.1f} GB); stop other work on that GPU, {more}or lower corpus.max_seconds and "
            "give a new cache.path"
        )
    return replace(found, seconds=plain(found.seconds))


class PassMemory:
    """The peak GPU memory of a teacher's passes by the seconds of audio per batch, which a call returns in bytes.

    Args:
        run_passes: Function that runs the passes over one batch.
        lengths: (N,) integers, samples of all utterances.
        device: The GPU.
        share: Share of the GPU that this process has. Default 1.

    Attributes:
        limit: Bytes that the passes may need; see `usable_bytes`.
    """

    def __init__(self, run_passes: RunPasses, lengths: np.ndarray, device: torch.device, share: float = 1.0) -> None:
        self._run_passes, self._lengths, self._device = run_passes, lengths, device
        self.limit = self._usable_bytes(share)

    def _usable_bytes(self, share: float) -> int:
        return usable_bytes(self._device, share)

    def __call__(self, seconds: float) -> int:
        return max(self._peak(self._lengths[rows].tolist()) for rows in largest_batches(self._lengths, seconds))

    def _peak(self, lengths: Sequence[int]) -> int:
        """Return the peak of one batch, in bytes."""
        _give_back(self._device)  # An error about memory holds what its passes have allocated.
        torch.cuda.reset_peak_memory_stats(self._device)
        codes = self._run_passes(lengths)
        # The codes of the batch before may still be on their way to the host.
        return torch.cuda.max_memory_allocated(self._device) + codes
