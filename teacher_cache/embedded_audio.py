"""The audio a cache embeds: 16-bit samples of exactly what the teacher heard, as FLAC or plain."""

import io

import numpy as np
import soundfile

from ray_distill.teacher_cache.frames import SAMPLE_RATE

_SCALE = 32768.0


def quantize(waveform: np.ndarray) -> np.ndarray:
    """(S,) float32 in [-1, 1] → the nearest 16-bit values, as float32.

    Teachers hear this, so that the embedded audio is lossless with respect to the targets. Audio that came from 16-bit
    files at 16 kHz (LibriSpeech) is unchanged.
    """
    return (np.clip(np.round(waveform * _SCALE), -_SCALE, _SCALE - 1) / _SCALE).astype(np.float32)


def to_flac(waveform: np.ndarray) -> bytes:
    """(S,) float32 as `quantize` gives it → FLAC bytes at 16 kHz, mono, 16 bits."""
    buffer = io.BytesIO()
    samples = np.clip(np.round(waveform * _SCALE), -_SCALE, _SCALE - 1).astype(np.int16)
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def from_flac(data: bytes) -> np.ndarray:
    """FLAC bytes of `to_flac` → (S,) float32, equal to what was quantised."""
    samples, _ = soundfile.read(io.BytesIO(data), dtype="int16")
    waveform: np.ndarray = samples.astype(np.float32) / np.float32(_SCALE)
    return waveform


def to_pcm(waveform: np.ndarray) -> bytes:
    """(S,) float32 as `quantize` gives it → little-endian 16-bit samples."""
    return np.clip(np.round(waveform * _SCALE), -_SCALE, _SCALE - 1).astype("<i2").tobytes()


def from_pcm(data: bytes | memoryview) -> np.ndarray:
    """Samples of `to_pcm` → (S,) float32, equal to what was quantised."""
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(_SCALE)
