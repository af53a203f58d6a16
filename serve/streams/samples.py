"""Conversion of raw samples, as they arrive, to the waveform of the whole audio."""

import math
from typing import Any, Literal

import numpy as np
import torch
import torchaudio.functional

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.inference.backends import Array
from ray_distill.teacher_cache.audio import MAX_SAMPLE, resampling_ratio
from ray_distill.teacher_cache.frames import SAMPLE_RATE

Encoding = Literal["s16le", "f32le"]
_DTYPES: dict[Encoding, np.dtype[Any]] = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_LEAST_SECONDS = 0.1  # Audio that is resampled at a time, at least: each call tabulates the filter again.
_FILTER_WIDTH, _ROLLOFF = 6, 0.99  # Defaults of `torchaudio.functional.resample`.


def bytes_per_second(encoding: Encoding, rate: int, channels: int) -> int:
    """Return the bytes of a second of audio."""
    return _DTYPES[encoding].itemsize * rate * channels


class SampleReader:
    """Converts the bytes of a stream to 16 kHz, as `load_audio` converts a file with these samples.

    It holds a part of one sample, and audio that is not resampled yet, of a few tenths of a second.

    Args:
        encoding: ``s16le``, 16-bit integers, or ``f32le``, floats of which 1 is full scale; both little-endian.
        rate: Samples per second.
        channels: Number of interleaved channels, which are averaged. Default 1.
    """

    def __init__(self, encoding: Encoding, rate: int, channels: int = 1) -> None:
        self._dtype, self._channels = _DTYPES[encoding], channels
        self._rest = b""
        self._resampler = None if rate == SAMPLE_RATE else StreamedResampler(rate)

    def read(self, data: bytes) -> Array:
        """Return the (S,) float32 samples in [-1, 1] that further bytes complete; S may be 0.

        Raises:
            ServiceError: ``undecodable`` if a sample is not finite, or above 8 times full scale.
        """
        data = self._rest + data
        whole = len(data) - len(data) % (self._dtype.itemsize * self._channels)
        self._rest = data[whole:]
        values = np.frombuffer(data[:whole], self._dtype)
        samples: Array = values.astype(np.float32)
        if self._dtype.kind == "i":
            samples /= np.float32(32768)
        elif not (np.abs(samples) <= MAX_SAMPLE).all():  # False for NaN as well.
            message = (
                f"The stream has samples that are not finite or above {MAX_SAMPLE:g} times full scale, which is 1."
            )
            raise ServiceError("undecodable", message)
        if self._channels > 1:
            samples = samples.reshape(-1, self._channels).mean(axis=1)
        if self._resampler is not None:
            samples = self._resampler.push(samples)
        return np.clip(samples, -1.0, 1.0)

    def finish(self) -> Array:
        """Return the last samples.

        Raises:
            ServiceError: ``undecodable`` if the stream ended inside a sample.
        """
        if self._rest:
            raise ServiceError(
                "undecodable", f"The stream ended {len(self._rest)} bytes into a sample of all channels."
            )
        rest = np.zeros(0, np.float32) if self._resampler is None else self._resampler.finish()
        return np.clip(rest, -1.0, 1.0)


class StreamedResampler:
    """Resamples audio to 16 kHz in parts; together they are the resampled whole, up to rounding.

    Args:
        rate: Samples per second.
    """

    def __init__(self, rate: int) -> None:
        ratio = resampling_ratio(rate)
        # Every p samples become q. The filter reaches `width` samples to both sides, less than `context` times p.
        self._p, self._q = ratio.numerator, ratio.denominator
        width = math.ceil(_FILTER_WIDTH * self._p / (min(self._p, self._q) * _ROLLOFF))
        self._context = math.ceil(width / self._p) + 1
        self._least = max(1, round(_LEAST_SECONDS * rate / self._p))
        self._waiting: list[Array] = []
        self._waiting_samples = 0
        self._before = 0  # Steps of p samples in front that are resampled already, and held for the filter.

    def push(self, samples: Array) -> Array:
        """Return the resampled audio that further samples complete, (S,) float32; S may be 0."""
        self._waiting.append(samples)
        self._waiting_samples += len(samples)
        if self._waiting_samples // self._p - self._context - self._before < self._least:
            return np.zeros(0, np.float32)
        held = np.concatenate(self._waiting)
        steps = len(held) // self._p - self._context
        resampled = self._resample(held[: (steps + self._context) * self._p])[self._before * self._q : steps * self._q]
        first = max(0, steps - self._context)
        self._before = steps - first
        # Copied, so that the audio before it is freed.
        self._waiting = [held[first * self._p :].copy()]
        self._waiting_samples = len(self._waiting[0])
        return resampled

    def finish(self) -> Array:
        """Return the rest of the resampled audio."""
        if not self._waiting_samples:
            return np.zeros(0, np.float32)
        return self._resample(np.concatenate(self._waiting))[self._before * self._q :]

    def _resample(self, samples: Array) -> Array:
        return np.asarray(torchaudio.functional.resample(torch.from_numpy(samples), self._p, self._q).numpy())
