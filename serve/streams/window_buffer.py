"""The windows of audio that is still arriving."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ray_distill.serve.inference.backends import Array
from ray_distill.serve.inference.windows import kept_frames, size_and_hop
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, num_frames


class StreamWindow(NamedTuple):
    """A window of a stream.

    Attributes:
        waveform: (S,) float32, valid until the next window is taken.
        first: First frame that is kept of it, counted from the start of the stream.
        kept: The kept frames, counted from the start of the window.
    """

    waveform: Array
    first: int
    kept: slice


class WindowBuffer:
    """Cuts the windows of `split_windows` out of audio whose length is not known yet.

    A window is complete as soon as there is audio behind it; only the last window depends on where the audio ends. The buffer holds
    at most two windows.

    Args:
        window_seconds, overlap_seconds: As in `split_windows`.
    """

    def __init__(self, window_seconds: float, overlap_seconds: float) -> None:
        self._size, self._hop = size_and_hop(window_seconds, overlap_seconds)
        self._buffer = np.empty((self._size + self._hop) * FRAME_SAMPLES + RECEPTIVE_FIELD, np.float32)
        self._origin = 0  # Frame of the stream with which the buffer begins.
        self._held = 0  # Samples in the buffer.
        self._start = 0  # First frame of the next window, unless it is the last one.
        self._first = 0  # First frame that no window has contributed yet.

    @property
    def nbytes(self) -> int:
        """Memory of the buffer, in bytes."""
        return self._buffer.nbytes

    @property
    def num_samples(self) -> int:
        """Samples that have arrived."""
        return self._origin * FRAME_SAMPLES + self._held

    def push(self, samples: Array) -> Iterator[StreamWindow]:
        """Add samples, and yield each window that is complete.

        Args:
            samples: (S,) float32 of any length.
        """
        while len(samples):
            # The window has its samples, and there is one frame behind it.
            needed = (self._start + self._size) * FRAME_SAMPLES + RECEPTIVE_FIELD - self.num_samples
            added = samples[:needed]
            self._buffer[self._held : self._held + len(added)] = added
            self._held += len(added)
            samples = samples[needed:]
            if len(added) < needed:
                return
            yield self._window(self._start, kept_frames(self._size, self._hop))
            self._start += self._hop
            # The last window begins behind the one that was just taken.
            dropped = self._start - self._hop + 1 - self._origin
            rest = self._buffer[dropped * FRAME_SAMPLES : self._held].copy()
            self._buffer[: len(rest)] = rest
            self._origin, self._held = self._origin + dropped, len(rest)

    def finish(self) -> StreamWindow | None:
        """Return the last window; None if the stream has no frame."""
        total = num_frames(self.num_samples)
        if not total:
            return None
        size = min(self._size, total)
        return self._window(total - size, size)

    def _window(self, start: int, end: int) -> StreamWindow:
        """Return the window that begins with a frame; it contributes its frames up to ``end``, counted from its start."""
        first, kept = self._first, slice(self._first - start, end)
        self._first = start + end
        at = (start - self._origin) * FRAME_SAMPLES
        size = min(self._size, num_frames(self.num_samples))
        return StreamWindow(self._buffer[at : at + (size - 1) * FRAME_SAMPLES + RECEPTIVE_FIELD], first, kept)
