"""Long audio in overlapping windows, whose features are joined."""

import asyncio
from typing import NamedTuple

import numpy as np

from ray_distill.serve.inference.backends import Array, Space
from ray_distill.serve.inference.engine import FeatureEngine, Features
from ray_distill.serve.inference.schedule import Reservation
from ray_distill.serve.settings import Limits
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames


class Window(NamedTuple):
    """Samples of a window and the frames that are kept of it, both counted from the start of the audio."""

    samples: slice
    frames: slice


def split_windows(num_samples: int, window_seconds: float, overlap_seconds: float) -> list[Window]:
    """Split audio into windows that contain every frame once, in order.

    All windows have the same length, so the last one overlaps by more. They start at multiples of 320 samples, so that frames of a
    window are frames of the audio. Which frames are kept of a window does not depend on the audio behind it, so that a stream gives
    the same features; see `ray_distill.serve.streams.window_buffer`.

    Args:
        num_samples: Length of the audio in samples, at least 400.
        window_seconds: Length of a window.
        overlap_seconds: Least overlap of neighbouring windows, at most half of a window. Each contributes the frames of its half.
    """
    total = num_frames(num_samples)
    size, hop = size_and_hop(window_seconds, overlap_seconds)
    size = min(size, total)
    starts = [*range(0, total - size, hop), total - size]
    ends = [start + kept_frames(size, hop) for start in starts[:-1]]
    return [
        Window(slice(start * FRAME_SAMPLES, (start + size - 1) * FRAME_SAMPLES + RECEPTIVE_FIELD), slice(first, end))
        for start, first, end in zip(starts, [0, *ends], [*ends, total], strict=True)
    ]


def size_and_hop(window_seconds: float, overlap_seconds: float) -> tuple[int, int]:
    """Return the frames of a window and the frames between the starts of two windows."""
    size = _frames(window_seconds)
    return size, size - min(_frames(overlap_seconds), size - 1)


def kept_frames(size: int, hop: int) -> int:
    """Return the number of a window's first frames that it contributes, up to the middle of the overlap with the next window."""
    return (size + hop) // 2


def _frames(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE / FRAME_SAMPLES)


async def features_in_windows(
    engine: FeatureEngine,
    waveform: Array,
    limits: Limits,
    layer: int | None = None,
    space: Space = "student",
    reservation: Reservation | None = None,
) -> Features:
    """Compute the features of audio of any length in windows of ``limits.window_seconds``.

    They differ from the features of the audio as a whole; docs/in-depth/serving.md has measurements. The queue time is the longest
    of a window, the inference time the sum.

    Args:
        engine: Engine that runs the windows.
        waveform: (S,) float32, 16 kHz, in [-1, 1], at least 400 samples.
        limits: Length and overlap of windows.
        layer: Transformer layer counted from 1, or None for all layers.
        space: ``student`` for hidden states, ``teacher`` for predictions of the teacher's layers.
        reservation: Place of an admitted request for all windows. Default: they are admitted here, without a deadline.

    Raises:
        ExceptionGroup: with the errors of `FeatureEngine.features`.
    """
    windows = split_windows(len(waveform), limits.window_seconds, limits.overlap_seconds)
    if reservation is None:
        own = engine.admit([window.samples.stop - window.samples.start for window in windows], layer)
        try:
            return await features_in_windows(engine, waveform, limits, layer, space, own)
        finally:
            engine.release(own)
    # Enough windows at once to fill a batch, and one more.
    semaphore = asyncio.Semaphore(1 + int(engine.batch_seconds // limits.window_seconds))
    array: Array | None = None
    queue_seconds, inference_seconds, completed = 0.0, 0.0, 0.0

    async def run(window: Window) -> None:
        nonlocal array, queue_seconds, inference_seconds, completed
        async with semaphore:
            found = await engine.features(waveform[window.samples], layer, space, reservation)
        if array is None:
            shape = (*found.array.shape[:-2], windows[-1].frames.stop, found.array.shape[-1])
            array = np.empty(shape, np.float32)
        start = window.samples.start // FRAME_SAMPLES
        array[..., window.frames, :] = found.array[..., window.frames.start - start : window.frames.stop - start, :]
        queue_seconds = max(queue_seconds, found.queue_seconds)
        inference_seconds += found.inference_seconds
        completed = max(completed, found.completed)

    async with asyncio.TaskGroup() as group:
        for window in windows:
            group.create_task(run(window))
    assert array is not None
    return Features(array, queue_seconds, inference_seconds, len(windows), completed)
