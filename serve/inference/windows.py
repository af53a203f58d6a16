"""Audio too long to run whole: overlapping windows, whose features are put together again."""

import asyncio
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ray_distill.serve.inference.backends import Array, Space
from ray_distill.serve.inference.engine import FeatureEngine, Features
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames


class Window(NamedTuple):
    """Samples that are run, and the frames that are kept of them; all counted from the start of the audio."""

    samples: slice
    frames: slice


@dataclass(frozen=True)
class LongAudio:
    """How audio is run that is too long to be run whole.

    Attributes:
        max_seconds: longest audio accepted. Default 600.
        window_seconds: audio of a window. Default 30.
        overlap_seconds: audio that neighbouring windows share, at least; each gives the frames of its half. Default 4.
    """

    max_seconds: float = 600.0
    window_seconds: float = 30.0
    overlap_seconds: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.window_seconds < self.max_seconds < float("inf"):
            raise ValueError(
                f"A window must be at least 1 second and shorter than the longest audio, not {self.window_seconds:g} "
                f"seconds of {self.max_seconds:g}."
            )
        if not 0 <= self.overlap_seconds <= self.window_seconds / 2:
            raise ValueError(f"Windows must overlap by 0 seconds to half of one, not by {self.overlap_seconds:g}.")

    def windows(self, num_samples: int) -> list[Window]:
        """Windows that give every frame once, in order. All are equally long: the last overlaps by more.

        Starts are multiples of 320 samples, so that frames of a window are frames of the audio.
        """
        total = num_frames(num_samples)
        size = min(_frames(self.window_seconds), total)
        hop = size - min(_frames(self.overlap_seconds), size - 1)
        starts = [*range(0, total - size, hop), total - size]
        # Each hands over to the next in the middle of what they share.
        ends = [(start + size + following) // 2 for start, following in itertools.pairwise(starts)]
        return [
            Window(
                slice(start * FRAME_SAMPLES, (start + size - 1) * FRAME_SAMPLES + RECEPTIVE_FIELD), slice(first, end)
            )
            for start, first, end in zip(starts, [0, *ends], [*ends, total], strict=True)
        ]


def _frames(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE / FRAME_SAMPLES)


async def features_in_windows(
    engine: FeatureEngine, waveform: Array, long_audio: LongAudio, layer: int | None = None, space: Space = "student"
) -> Features:
    """As `FeatureEngine.features`, of audio of any length; see docs/in-depth/serving.md for how they differ from the whole's.

    The first window is refused where the queue is full; the others wait for room. Seconds in the queue are the longest of a
    window, those of inference the sum.
    """
    windows = long_audio.windows(len(waveform))
    # As many at once as fill a batch, and one to come.
    room = asyncio.Semaphore(1 + int(engine.batch_seconds // long_audio.window_seconds))
    array: Array | None = None
    queue_seconds, inference_seconds = 0.0, 0.0

    async def run(number: int, window: Window) -> None:
        nonlocal array, queue_seconds, inference_seconds
        async with room:
            run_window = engine.features if number == 0 else engine.patient_features
            found = await run_window(waveform[window.samples], layer, space)
        if array is None:
            shape = (*found.array.shape[:-2], windows[-1].frames.stop, found.array.shape[-1])
            array = np.empty(shape, np.float32)
        start = window.samples.start // FRAME_SAMPLES
        array[..., window.frames, :] = found.array[..., window.frames.start - start : window.frames.stop - start, :]
        queue_seconds = max(queue_seconds, found.queue_seconds)
        inference_seconds += found.inference_seconds

    async with asyncio.TaskGroup() as group:
        for number, window in enumerate(windows):
            group.create_task(run(number, window))
    assert array is not None
    return Features(array, queue_seconds, inference_seconds, len(windows))
