"""Audio of any rate and channel count becomes 16 kHz mono; what can't be used is refused with the reason."""

from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import torch
import torchaudio.functional

from teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE

Reason = Literal["undecodable", "empty", "too_short", "too_long"]

_BLOCK_SECONDS = 10
_MAX_RATE = 768_000
_MAX_CHANNELS = 64


class AudioError(ValueError):
    """Audio that can't be used.

    Attributes:
        reason: ``undecodable``, ``empty``, ``too_short`` or ``too_long``.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def load_audio(source: Path | str | BinaryIO, max_seconds: float | None = None) -> np.ndarray:
    """Decodes wav, flac, ogg or mp3 to what teachers and students hear.

    Args:
        source: a path, or a seekable binary file (untrusted bytes are fine: they are only decoded).
        max_seconds: refuse longer audio; from the header where it is honest, and while decoding in any case.

    Returns:
        (S,) float32 at 16 kHz, channels averaged, clipped to [-1, 1]; S >= 400.

    Raises:
        AudioError: see its reasons.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the audio"
    try:
        file = soundfile.SoundFile(source)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError("undecodable", f"{name} can't be decoded as audio ({error})") from error
    with file:
        rate, channels = file.samplerate, file.channels
        if not 1 <= rate <= _MAX_RATE or not 1 <= channels <= _MAX_CHANNELS:
            raise AudioError("undecodable", f"{name} claims {channels} channels at {rate} Hz, which is not audio")
        limit = None if max_seconds is None else int(max_seconds * rate)
        too_long = AudioError("too_long", f"{name} is longer than the {max_seconds} s allowed")
        if limit is not None and file.frames > limit and file.format != "MP3":
            raise too_long
        blocks: list[np.ndarray] = []
        count = 0
        try:
            while len(block := file.read(_BLOCK_SECONDS * rate, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
                count += len(block)
                if limit is not None and count > limit:
                    raise too_long
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise AudioError("undecodable", f"{name} is damaged ({error})") from error
        if file.format not in ("MP3", "OGG") and count < file.frames:
            raise AudioError("undecodable", f"{name} is damaged (its header says {file.frames} samples, it holds {count})")
    if count == 0:
        raise AudioError("empty", f"{name} holds no samples")
    waveform = np.concatenate(blocks)
    if not np.isfinite(waveform).all():
        raise AudioError("undecodable", f"{name} holds samples that are not numbers")
    if rate != SAMPLE_RATE:
        waveform = torchaudio.functional.resample(torch.from_numpy(waveform), rate, SAMPLE_RATE).numpy()
    if len(waveform) < RECEPTIVE_FIELD:
        raise AudioError(
            "too_short", f"{name} has {len(waveform)} samples at 16 kHz; at least {RECEPTIVE_FIELD} (25 ms) are needed"
        )
    return np.clip(waveform, -1.0, 1.0)
