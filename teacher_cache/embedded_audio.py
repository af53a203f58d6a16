"""Audio embedded in a cache: 16-bit samples, exactly as the teacher received them, as FLAC or PCM."""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
import soundfile

from ray_distill.teacher_cache.frames import SAMPLE_RATE

AudioFormat = Literal["flac", "pcm"]

MAX_SAMPLES = 4 * 3600 * SAMPLE_RATE
"""Maximum number of samples of an utterance in a cache: four hours."""

_SCALE = 32768.0


def quantize(waveform: np.ndarray) -> np.ndarray:
    """Round a waveform, (S,) float32 in [-1, 1], to 16-bit values and return it as float32.

    Teachers receive the rounded waveform, so the embedded audio is lossless with respect to the targets. Audio from 16-bit
    files at 16 kHz (LibriSpeech) does not change.
    """
    return (np.clip(np.round(waveform * _SCALE), -_SCALE, _SCALE - 1) / _SCALE).astype(np.float32)


def to_flac(waveform: np.ndarray) -> bytes:
    """Encode a waveform, (S,) float32 from `quantize`, as 16-bit mono FLAC at 16 kHz."""
    buffer = io.BytesIO()
    soundfile.write(buffer, _to_int16(waveform), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def from_flac(data: bytes | memoryview) -> np.ndarray:
    """Decode the bytes of `to_flac` to the same (S,) float32 waveform.

    Raises:
        ValueError: If the bytes are not FLAC of this kind. The length in the header is checked before memory is allocated.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if (file.format, file.samplerate, file.channels) != ("FLAC", SAMPLE_RATE, 1):
                raise ValueError(f"the audio is not mono FLAC at {SAMPLE_RATE} Hz")
            if not 0 <= file.frames <= MAX_SAMPLES:
                raise ValueError(f"the audio has {file.frames} samples by its header; the limit is {MAX_SAMPLES}")
            # libsndfile divides 16-bit samples by 32768, which is exact.
            waveform: np.ndarray = file.read(dtype="float32")
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(f"the audio can't be decoded: {error}") from error
    return waveform


def to_pcm(waveform: np.ndarray) -> bytes:
    """Encode a waveform, (S,) float32 from `quantize`, as little-endian 16-bit samples."""
    return _to_int16(waveform).astype("<i2").tobytes()


def from_pcm(data: bytes | memoryview) -> np.ndarray:
    """Decode the bytes of `to_pcm` to the same (S,) float32 waveform."""
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(_SCALE)


ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {"flac": to_flac, "pcm": to_pcm}
DECODERS: dict[str, Callable[[bytes | memoryview], np.ndarray]] = {"flac": from_flac, "pcm": from_pcm}


def _to_int16(waveform: np.ndarray) -> np.ndarray:
    return np.clip(np.round(waveform * _SCALE), -_SCALE, _SCALE - 1).astype(np.int16)
