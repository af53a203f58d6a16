"""Decoding of audio files of any rate and channel count to 16 kHz mono."""

from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import torch
import torchaudio.functional

from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE

Reason = Literal["undecodable", "empty", "too_short", "too_long"]

# Rates outside this range mean a damaged header, or need too much memory for resampling.
_RATES = (2_000, 768_000)
_MAX_CHANNELS = 64
# Number of values decoded at a time, over all channels. A length in a header allocates no memory before it is read.
_BLOCK_VALUES = 1 << 20
# Largest sample, where 1 is full scale. Overshoots of recordings are far below it, and 16-bit integers stored as floats far above.
_MAX_SAMPLE = 8.0


class AudioError(ValueError):
    """Audio that can't be used.

    Attributes:
        reason: ``undecodable``, ``empty``, ``too_short`` or ``too_long``.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def load_audio(source: Path | str | BinaryIO, max_seconds: float | None = None) -> np.ndarray:
    """Decode a wav, flac, ogg, mp3 or other file that libsndfile reads to the waveform that teachers and students take.

    Untrusted files are safe: they are decoded in blocks, and memory is limited by ``max_seconds``, or by the real content of
    the file. A wav file shorter than its header says (a stream, or a truncated file) is decoded as far as it goes. Float
    samples between 1 and 8 times full scale are clipped; larger ones have another scale, such as that of 16-bit integers, and are
    refused.

    Args:
        source: Path, or a seekable binary file.
        max_seconds: Maximum duration. It is checked in the header, if that has a length, and while decoding. Default: no
            limit.

    Returns:
        (S,) float32 at 16 kHz, averaged over channels and clipped to [-1, 1], with S >= 400.

    Raises:
        AudioError: If the audio can't be used; see its ``reason``.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the audio"
    samples, rate, peak = _decode(source, name, max_seconds)
    if len(samples) == 0:
        raise AudioError("empty", f"{name} has no samples")
    if not np.isfinite(samples).all():
        raise AudioError("undecodable", f"{name} has samples that are not finite numbers")
    if peak > _MAX_SAMPLE:
        raise AudioError(
            "undecodable",
            f"{name} has float samples up to {peak:.6g}, which are not in [-1, 1]; divide them by their full scale, such as 32768 for "
            "16-bit integers",
        )
    waveform: np.ndarray = np.clip(_resample(samples, rate), -1.0, 1.0)
    if len(waveform) < RECEPTIVE_FIELD:
        raise AudioError(
            "too_short", f"{name} has {len(waveform)} samples at 16 kHz; at least {RECEPTIVE_FIELD} (25 ms) are needed"
        )
    return waveform


def _decode(source: Path | str | BinaryIO, name: str, max_seconds: float | None) -> tuple[np.ndarray, int, float]:
    """Return the (N,) float32 mean of the channels, the rate in Hz, and the largest absolute value of any channel."""
    try:
        if _num_bytes(source) == 0:
            raise AudioError("empty", f"{name} is an empty file")
        file = soundfile.SoundFile(source)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        detail = "unknown format" if isinstance(error, TypeError) else _detail(error)
        raise AudioError("undecodable", f"{name} can't be decoded as audio ({detail})") from error
    with file:
        # soundfile seeks after each read of a seekable file. That fails in FLAC streams of unknown length.
        file.seekable = lambda: False
        rate, channels = file.samplerate, file.channels
        if not _RATES[0] <= rate <= _RATES[1] or not 1 <= channels <= _MAX_CHANNELS:
            raise AudioError(
                "undecodable",
                f"{name} has {channels} channels at {rate} Hz according to its header; the limits are {_MAX_CHANNELS} channels and "
                f"{_RATES[0]} to {_RATES[1]} Hz",
            )
        # MP3 headers have an estimate, and FLAC and Ogg streams the largest possible number.
        length_known = file.format in ("WAV", "WAVEX", "FLAC") and file.frames < 2**62
        limit = None if max_seconds is None else int(max_seconds * rate)
        too_long = AudioError("too_long", f"{name} is longer than the {max_seconds} s allowed")
        if limit is not None and length_known and file.frames > limit:
            raise too_long
        blocks = [np.zeros(0, np.float32)]
        count, peak = 0, 0.0
        try:
            while len(block := file.read(_BLOCK_VALUES // channels, dtype="float32", always_2d=True)):
                count += len(block)
                if limit is not None and count > limit:
                    raise too_long
                peak = max(peak, float(np.abs(block).max()))
                blocks.append(block.mean(axis=1))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise AudioError("undecodable", f"{name} is damaged ({_detail(error)})") from error
        if length_known and count < file.frames:
            raise AudioError(
                "undecodable", f"{name} is damaged (its header says {file.frames} samples, but it has {count})"
            )
        if count == 0 and file.format in ("WAV", "WAVEX") and (rest := _bytes_after_data(source)):
            raise AudioError(
                "undecodable",
                f"{name} is an unfinished recording or stream: its header says 0 samples, but {rest} bytes follow; rewrite its "
                "header, for example with sox --ignore-length",
            )
    return np.concatenate(blocks), rate, peak


def _bytes_after_data(source: Path | str | BinaryIO) -> int:
    """Return the number of bytes behind a WAV header's empty data chunk that are not chunks themselves."""
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            return _bytes_after_data(file)
    source.seek(0)
    head = source.read(1 << 16)
    at = head.find(b"data\0\0\0\0")
    rest = head[at + 8 : at + 12]
    is_chunk = rest.strip().isalnum()  # LIST, bext, ...
    return 0 if at < 0 or is_chunk else source.seek(0, 2) - (at + 8)


def _num_bytes(source: Path | str | BinaryIO) -> int:
    if isinstance(source, (str, Path)):
        return Path(source).stat().st_size
    start = source.tell()
    end = source.seek(0, 2)
    source.seek(start)
    return end - start


def _detail(error: Exception) -> str:
    # The full messages of soundfile repeat the path or the address of the file object.
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).rstrip(".")


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample (N,) samples to 16 kHz.

    torchaudio tabulates p x q values for the ratio p / q in lowest terms, which would be gigabytes for 44,101 Hz. Unusual
    ratios are therefore rounded, by about 1 in 10,000 at most. All rates of common recorders are exact.
    """
    if rate == SAMPLE_RATE:
        return samples
    ratio = Fraction(rate, SAMPLE_RATE).limit_denominator(640 if rate <= 48_000 else 160)
    resampled = torchaudio.functional.resample(torch.from_numpy(samples), ratio.numerator, ratio.denominator)
    return np.asarray(resampled.numpy())
