"""Decoding of audio files of any rate and channel count to 16 kHz mono."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
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
# Decoders of these encodings compute with floats, and their results differ between processors and versions of libsndfile.
_LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")


class AudioError(ValueError):
    """Audio that can't be used.

    Attributes:
        reason: ``undecodable``, ``empty``, ``too_short`` or ``too_long``.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


@dataclass(frozen=True)
class AudioHeader:
    """What the header of an audio file says; nothing of it is proven by the content.

    Attributes:
        format, subtype: Names of libsndfile, such as ``FLAC`` and ``PCM_16``.
        rate: Samples per second.
        channels: Number of channels.
        frames: Samples of each channel: exact for wav and flac, an estimate for mp3, and enormous if the length is unknown.
    """

    format: str
    subtype: str
    rate: int
    channels: int
    frames: int


def read_header(source: Path | str | BinaryIO) -> AudioHeader:
    """Return the header of an audio file, without decoding its samples.

    Args:
        source: Path, or a seekable binary file.

    Raises:
        AudioError: ``empty`` or ``undecodable``.
    """
    with _open(source, _name(source)) as file:
        return AudioHeader(file.format, file.subtype, file.samplerate, file.channels, file.frames)


def load_audio(
    source: Path | str | BinaryIO, max_seconds: float | None = None, on_block: Callable[[int], None] | None = None
) -> np.ndarray:
    """Decode a wav, flac, ogg, mp3 or other file that libsndfile reads to the waveform that teachers and students take.

    Untrusted files are safe: they are decoded in blocks, and memory is limited by ``max_seconds``, or by the real content of
    the file. A wav file shorter than its header says (a stream, or a truncated file) is decoded as far as it goes. Float
    samples between 1 and 8 times full scale are clipped; larger ones have another scale, such as that of 16-bit integers, and are
    refused.

    Args:
        source: Path, or a seekable binary file.
        max_seconds: Maximum duration. It is checked in the header, if that has a length, and while decoding. Default: no
            limit.
        on_block: Called with the number of values, over all channels, of each decoded block; an exception of it stops the
            decoding. Default: nothing is called.

    Returns:
        (S,) float32 at 16 kHz, averaged over channels and clipped to [-1, 1], with S >= 400.

    Raises:
        AudioError: If the audio can't be used; see its ``reason``.
    """
    name = _name(source)
    return _waveform(_decode(source, name, max_seconds, on_block), name)


def load_identified_audio(path: Path, max_seconds: float | None = None) -> tuple[np.ndarray, str]:
    """Return the waveform of a file, as `load_audio`, and an identity of its audio that no rounding can change.

    The identity is the same on every machine:

    - Audio in an encoding without floats (PCM, FLAC, ALAC, ADPCM, ...) and PCM of floats are decoded exactly: integers of up to
      24 bits are float32 numbers, and the mean of one or two channels, or of any number with 16 bits, is rounded once. With
      more channels the order of the sum is fixed. The identity is the SHA-256 of the mean of the channels as little-endian
      float32 samples, clipped to [-1, 1], before they are resampled, since resampling rounds differently with another number
      of threads or another processor. So tags may change, and a lossless copy in another format has the same identity. At
      16 kHz this is the hash of the waveform itself, which indexes and caches of earlier versions contain; at other rates it
      is ``RATE:SHA-256``.
    - Lossy audio (mp3, Vorbis, Opus) is decoded with floats, whose rounding depends on the processor and on the version of
      libsndfile. Its identity is ``file:SHA-256`` of the file's bytes, so a changed tag makes another file.

    Raises:
        AudioError: As `load_audio`.
    """
    decoded = _decode(path, str(path), max_seconds)
    waveform = _waveform(decoded, str(path))
    if decoded.lossy:
        with path.open("rb") as file:
            return waveform, f"file:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    digest = hashlib.sha256(np.clip(decoded.samples, -1.0, 1.0).astype("<f4", copy=False).tobytes()).hexdigest()
    return waveform, digest if decoded.rate == SAMPLE_RATE else f"{decoded.rate}:{digest}"


@dataclass(frozen=True)
class _Decoded:
    """Audio as decoded.

    Attributes:
        samples: (N,) float32, mean of the channels.
        rate: Samples per second.
        peak: Largest absolute value of any channel.
        lossy: Whether the decoder computes with floats, so that the samples depend on the machine.
    """

    samples: np.ndarray
    rate: int
    peak: float
    lossy: bool


def _waveform(decoded: _Decoded, name: str) -> np.ndarray:
    """Check decoded audio and return the (S,) float32 waveform at 16 kHz."""
    if len(decoded.samples) == 0:
        raise AudioError("empty", f"{name} has no samples")
    if not np.isfinite(decoded.samples).all():
        raise AudioError("undecodable", f"{name} has samples that are not finite numbers")
    if decoded.peak > _MAX_SAMPLE:
        raise AudioError(
            "undecodable",
            f"{name} has float samples up to {decoded.peak:.6g}, which are not in [-1, 1]; divide them by their full scale, such as "
            "32768 for 16-bit integers",
        )
    waveform: np.ndarray = np.clip(_resample(decoded.samples, decoded.rate), -1.0, 1.0)
    if len(waveform) < RECEPTIVE_FIELD:
        raise AudioError(
            "too_short", f"{name} has {len(waveform)} samples at 16 kHz; at least {RECEPTIVE_FIELD} (25 ms) are needed"
        )
    return waveform


def _name(source: Path | str | BinaryIO) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the audio"


def _open(source: Path | str | BinaryIO, name: str) -> soundfile.SoundFile:
    try:
        if _num_bytes(source) == 0:
            raise AudioError("empty", f"{name} is an empty file")
        return soundfile.SoundFile(source)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        detail = "unknown format" if isinstance(error, TypeError) else _detail(error)
        raise AudioError("undecodable", f"{name} can't be decoded as audio ({detail})") from error


def _decode(
    source: Path | str | BinaryIO,
    name: str,
    max_seconds: float | None,
    on_block: Callable[[int], None] | None = None,
) -> _Decoded:
    with _open(source, name) as file:
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
                if on_block is not None:
                    on_block(block.size)
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
        lossy = file.subtype in _LOSSY
    return _Decoded(np.concatenate(blocks), rate, peak, lossy)


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
