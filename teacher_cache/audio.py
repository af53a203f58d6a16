"""Decoding of audio files of any rate and channel count to 16 kHz mono."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import torch
import torchaudio.functional

from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.sources.claimed_length import TOLERANCE, bytes_after_data, refused_length
from ray_distill.teacher_cache.sources.mp3_length import wrong_mp3_length

Reason = Literal["undecodable", "empty", "too_short", "too_long", "no_channel", "outside"]

# Rates outside this range mean a damaged header, or need too much memory for resampling.
_RATES = (2_000, 768_000)
_MAX_CHANNELS = 64
# Number of values decoded at a time, over all channels. A length in a header allocates no memory before it is read.
_BLOCK_VALUES = 1 << 20
MAX_SAMPLE = 8.0
"""Largest sample, where 1 is full scale. Overshoots of recordings are far below it, and 16-bit integers stored as floats far above."""
# Decoders of these encodings compute with floats, and their results differ between processors and versions of libsndfile.
_LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")


class AudioError(ValueError):
    """Audio that can't be used.

    Attributes:
        reason: ``undecodable``, ``empty``, ``too_short``, ``too_long``, ``no_channel`` (the audio lacks the channel), or ``outside``
            (the piece is outside the audio).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def load_audio(
    source: AudioAddress | Path | str | BinaryIO,
    max_seconds: float | None = None,
    on_block: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Decode a wav, flac, ogg, mp3 or other file that libsndfile reads to the waveform that teachers and students take.

    Untrusted files are safe: they are decoded in blocks, and memory is limited by ``max_seconds``, or by the real content of
    the file. A wav file shorter than its header says (a stream, or a truncated file) is decoded as far as it goes. Float
    samples between 1 and 8 times full scale are clipped; larger ones have another scale, such as that of 16-bit integers, and are
    refused.

    Args:
        source: Path, address or its text, or a seekable binary file. A text that begins with a brace is an address; see
            `AudioAddress`.
        max_seconds: Maximum duration of the audio, or of the piece. It is checked in the header, if that has a length, and while
            decoding. Default: no limit.
        on_block: Called with the number of values, over all channels, of each decoded block; an exception of it stops the
            decoding. Default: nothing is called.

    Returns:
        (S,) float32 at 16 kHz, clipped to [-1, 1], with S >= 400: the address's channel, or the mean of all channels.

    Raises:
        AudioError: If the audio can't be used; see its ``reason``.
    """
    with _opened(source) as opened:
        return _waveform(_decode(opened, max_seconds, on_block), opened.name)


def load_identified_audio(source: AudioAddress | Path, max_seconds: float | None = None) -> tuple[np.ndarray, str]:
    """Return the waveform of a file or address, as `load_audio`, and an identity of its audio that no rounding can change.

    A piece is decoded alone, after seeking. That is exact for all encodings but lossy ones, where decoding starts one second
    earlier: then Vorbis and Opus give the samples that decoding the whole file gives, and mp3 gives them up to rounding.

    The identity is the same on every machine:

    - Audio in an encoding without floats (PCM, FLAC, ALAC, ADPCM, ...) and PCM of floats are decoded exactly: integers of up to
      24 bits are float32 numbers, and the mean of one or two channels, or of any number with 16 bits, is rounded once. With
      more channels the order of the sum is fixed. The identity is the SHA-256 of the piece's mean of the channels, or of its
      one channel, as little-endian float32 samples, clipped to [-1, 1], before they are resampled, since resampling rounds
      differently with another number of threads or another processor. So tags may change, and a lossless copy in another
      format has the same identity. At 16 kHz this is the hash of the waveform itself, which indexes and caches of earlier
      versions contain; at other rates it is ``RATE:SHA-256``.
    - Lossy audio (mp3, Vorbis, Opus) is decoded with floats, whose rounding depends on the processor and on the version of
      libsndfile. Its identity is ``file:SHA-256`` of the file's bytes, so a changed tag makes another file. That of a piece or
      channel is followed by its bounds and channel, as ``:16000-32000:0``.

    Raises:
        AudioError: As `load_audio`.
    """
    with _opened(source) as opened:
        decoded, address = _decode(opened, max_seconds), opened.address
    waveform = _waveform(decoded, opened.name)
    if decoded.lossy:
        piece = "" if (address.start, address.end) == (None, None) else f":{address.start or 0}-{address.end or ''}"
        channel = f":{address.channel}" if isinstance(address.channel, int) else ""
        return waveform, f"file:{_digest(address)}{piece}{channel}"
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
    if decoded.peak > MAX_SAMPLE:
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


@dataclass(frozen=True)
class AudioHeader:
    """What a file says about its audio.

    Attributes:
        rate: Samples per second.
        channels: Number of channels.
        frames: Number of samples of a channel. None if the header doesn't know it exactly.
        claimed_frames: The same, or an estimate for mp3, or an enormous number if the length is unknown.
        format, subtype: Names of libsndfile, such as ``FLAC`` and ``PCM_16``.
    """

    rate: int
    channels: int
    frames: int | None
    claimed_frames: int
    format: str
    subtype: str


def read_header(source: AudioAddress | Path | BinaryIO) -> AudioHeader:
    """Return what a file's header says, without decoding it. Nothing of it is proven by the content.

    Raises:
        AudioError: If it is not audio, or its rate or number of channels is not allowed.
    """
    with _opened(source) as opened:
        file = opened.file
        return AudioHeader(file.samplerate, file.channels, opened.frames, file.frames, file.format, file.subtype)


def read_blocks(address: AudioAddress) -> Iterator[np.ndarray]:
    """Decode audio of any length in bounded memory.

    Yields:
        (N,) float32 samples at the audio's own rate, of the address's channel or the mean of all; N varies.

    Raises:
        AudioError: If the audio can't be decoded.
    """
    with _opened(address) as opened:
        for block, _ in _blocks(opened):
            yield block


@dataclass(frozen=True)
class _Opened:
    """Audio that is open and whose header was checked.

    Attributes:
        file: Decoder.
        stream: Path or binary file of the whole audio.
        address: Address; that of a file without a name is empty.
        name: Name for messages.
    """

    file: soundfile.SoundFile
    stream: Path | BinaryIO
    address: AudioAddress
    name: str

    @property
    def frames(self) -> int | None:
        """Number of samples of a channel. None if the header doesn't know it exactly."""
        # MP3 headers, also inside WAV, have an estimate, and FLAC and Ogg streams the largest possible number.
        known = self.file.format in ("WAV", "WAVEX", "FLAC") and self.file.frames < 2**62 and not self.lossy
        return int(self.file.frames) if known else None

    @property
    def lossy(self) -> bool:
        """Whether the decoder computes with floats, so that the samples depend on the machine."""
        return self.file.subtype in _LOSSY


@contextmanager
def _opened(source: AudioAddress | Path | str | BinaryIO) -> Iterator[_Opened]:
    """Open audio and check its header. Errors of the block that are no AudioError are about reading it, and become one."""
    if isinstance(source, str):
        source = AudioAddress.parse(source)
    elif isinstance(source, Path):
        source = AudioAddress(str(source))
    if not isinstance(source, AudioAddress):
        with _decoder(source, "the audio") as file:
            yield _Opened(file, source, AudioAddress(""), "the audio")
        return
    name = str(source)
    try:
        with source.opened() as stream, _decoder(stream, name) as file:
            yield _Opened(file, stream, source, name)
    except AudioError:
        raise
    except (OSError, ValueError) as error:
        raise AudioError("undecodable", f"{name} can't be read ({_detail(error)})") from error


@contextmanager
def _decoder(stream: Path | BinaryIO, name: str) -> Iterator[soundfile.SoundFile]:
    try:
        if _num_bytes(stream) == 0:
            raise AudioError("empty", f"{name} is an empty file")
        file = soundfile.SoundFile(stream)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        detail = "unknown format" if isinstance(error, TypeError) else _detail(error)
        if not isinstance(error, OSError) and isinstance(stream, Path) and not os.access(stream, os.R_OK):
            detail = os.strerror(errno.EACCES)  # libsndfile calls it a system error.
        raise AudioError("undecodable", f"{name} can't be decoded as audio ({detail})") from error
    with file:
        rate, channels = file.samplerate, file.channels
        if not _RATES[0] <= rate <= _RATES[1] or not 1 <= channels <= _MAX_CHANNELS:
            raise AudioError(
                "undecodable",
                f"{name} has {channels} channels at {rate} Hz according to its header; the limits are {_MAX_CHANNELS} channels and "
                f"{_RATES[0]} to {_RATES[1]} Hz",
            )
        yield file


def _blocks(opened: _Opened, on_block: Callable[[int], None] | None = None) -> Iterator[tuple[np.ndarray, float]]:
    """Decode the piece of an address. Yield (N,) float32 samples of one channel or the mean, and the peak of those channels."""
    file, address = opened.file, opened.address
    channel = address.channel if isinstance(address.channel, int) else None
    if channel is not None and channel >= file.channels:
        raise AudioError("no_channel", f"{opened.name} has {file.channels} channels, counted from 0")
    start, end = address.start or 0, address.end
    outside = AudioError("outside", f"{opened.name} is outside the audio, which is shorter")
    if opened.frames is not None and max(start, end or 0) > opened.frames:
        raise outside
    # A piece that ends before the end is complete.
    if end is None and (wrong := refused_length(file, opened.stream)) is not None:
        raise AudioError("undecodable", f"{opened.name} {wrong}")
    try:
        drop = start - _seek(opened, start)
        # soundfile seeks after each read of a seekable file. That fails in FLAC streams of unknown length.
        file.seekable = lambda: False
        most = _BLOCK_VALUES // file.channels
        while drop and (count := len(file.read(min(drop, most), dtype="float32", always_2d=True))):
            drop -= count
        left, at = None if end is None else max(end - start, 0), start - drop
        while left != 0:
            block = file.read(most if left is None else min(left, most), dtype="float32", always_2d=True)
            if not len(block):
                break
            left = None if left is None else left - len(block)
            at += len(block)
            if on_block is not None:
                on_block(block.size)
            block = block if channel is None else block[:, channel : channel + 1]
            yield block.mean(axis=1), float(np.abs(block).max())
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError("undecodable", f"{opened.name} is damaged ({_detail(error)})") from error
    if opened.frames is not None and (left or (end is None and at < opened.frames)):
        expected = opened.frames if end is None else end
        raise AudioError(
            "undecodable", f"{opened.name} is damaged (its header says {expected} samples, but it has {at})"
        )
    if end is None and file.subtype == "MPEG_LAYER_III":
        wrong = wrong_mp3_length(opened.stream, at, file.frames, int(TOLERANCE * file.samplerate))
        if wrong is not None:
            raise AudioError("undecodable", f"{opened.name} {wrong}")
    if drop or left:
        raise outside


def _seek(opened: _Opened, start: int) -> int:
    """Move towards a sample, and return the sample that the decoder gives next.

    Decoders of lossy audio need some audio before the first sample: after seeking right to it, libsndfile sometimes gives other
    samples for Vorbis.
    """
    at = max(start - opened.lossy * opened.file.samplerate, 0)
    if at == 0 or not opened.file.seekable():  # GSM 6.10 and others can only be read from the beginning.
        return 0
    try:
        return int(opened.file.seek(at))
    except soundfile.SoundFileError as error:
        raise AudioError("outside", f"{opened.name} can't be found in the audio ({_detail(error)})") from error


def _decode(opened: _Opened, max_seconds: float | None, on_block: Callable[[int], None] | None = None) -> _Decoded:
    file, address, name = opened.file, opened.address, opened.name
    rate, start = file.samplerate, address.start or 0
    limit = None if max_seconds is None else int(max_seconds * rate)
    too_long = AudioError("too_long", f"{name} is longer than the {max_seconds} s allowed")
    end = opened.frames if address.end is None else address.end
    if limit is not None and end is not None and end - start > limit:
        raise too_long
    blocks = [np.zeros(0, np.float32)]
    count, peak = 0, 0.0
    for block, block_peak in _blocks(opened, on_block):
        count += len(block)
        if limit is not None and count > limit:
            raise too_long
        peak = max(peak, block_peak)
        blocks.append(block)
    if count == 0 and file.format in ("WAV", "WAVEX") and (rest := bytes_after_data(opened.stream)):
        raise AudioError(
            "undecodable",
            f"{name} is an unfinished recording or stream: its header says 0 samples, but {rest} bytes follow; rewrite its "
            "header, for example with sox --ignore-length",
        )
    return _Decoded(np.concatenate(blocks), rate, peak, opened.lossy)


def _digest(address: AudioAddress) -> str:
    """Return the SHA-256 of all bytes of lossy audio. That of a file is remembered, since it may have many pieces."""
    if address.is_remote:
        return _digest_of(address.whole, 0, 0)
    stat = Path(address.file).stat()
    return _digest_of(address.whole, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _digest_of(address: AudioAddress, mtime_ns: int, size: int) -> str:
    with address.opened() as stream:
        if isinstance(stream, Path):
            with stream.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


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


def resampling_ratio(rate: int) -> Fraction:
    """Return the ratio of a sampling rate to 16 kHz with which `load_audio` resamples.

    torchaudio tabulates p x q values for the ratio p / q in lowest terms, which would be gigabytes for 44,101 Hz. Unusual
    ratios are therefore rounded, by about 1 in 10,000 at most. All rates of common recorders are exact.
    """
    return Fraction(rate, SAMPLE_RATE).limit_denominator(640 if rate <= 48_000 else 160)


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample (N,) samples to 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    ratio = resampling_ratio(rate)
    resampled = torchaudio.functional.resample(torch.from_numpy(samples), ratio.numerator, ratio.denominator)
    return np.asarray(resampled.numpy())
