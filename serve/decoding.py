"""Decode untrusted bytes into a waveform, or refuse them with a reason."""

import ctypes
import io
import platform
from collections.abc import Callable

from ray_distill.serve.api.errors import ErrorType, ServiceError
from ray_distill.serve.inference.backends import Array
from ray_distill.serve.settings import Limits
from ray_distill.teacher_cache.audio import AudioError, AudioHeader, load_audio, read_header


def header_of(audio: bytes, limits: Limits) -> AudioHeader:
    """Return the header of an audio file if the limits allow it; its samples are not decoded.

    Raises:
        ServiceError: ``empty``, ``undecodable``, ``unsupported_media_type`` or ``too_long``.
    """
    longest = limits.longest_seconds
    try:
        header = read_header(io.BytesIO(audio))
    except AudioError as error:
        raise _refusal(error, longest) from error
    if header.rate > limits.max_sample_rate or header.channels > limits.max_channels:
        raise ServiceError(
            "unsupported_media_type",
            f"The audio has {header.channels} channels at {header.rate} Hz; the limits are {limits.max_channels} channels and "
            f"{limits.max_sample_rate} Hz.",
        )
    if header.frames is not None and header.frames > longest * header.rate:
        raise _refusal(AudioError("too_long", "too long"), longest)
    return header


def decode(audio: bytes, max_seconds: float, on_block: Callable[[int], None] | None = None) -> Array:
    """Decode wav, flac, ogg (Vorbis, Opus) or mp3, in blocks and never beyond ``max_seconds``.

    Args:
        audio: The file.
        max_seconds: Longest audio that is accepted.
        on_block: Called with the number of values of each block; see `load_audio`. Default: nothing is called.

    Returns:
        (S,) float32 at 16 kHz in [-1, 1], channels averaged; S >= 400.

    Raises:
        ServiceError: ``empty``, ``undecodable``, ``too_short`` or ``too_long``.
    """
    try:
        return load_audio(io.BytesIO(audio), max_seconds, on_block)
    except AudioError as error:
        raise _refusal(error, max_seconds) from error


def _refusal(error: AudioError, max_seconds: float) -> ServiceError:
    if error.reason == "no_channel" or error.reason == "outside":  # mypy narrows `==`, not `in`.
        raise error  # Only pieces and channels of files, which no request names.
    # The loader's own messages name a file and quote the decoder.
    messages: dict[ErrorType, str] = {
        "empty": "The audio file contains no samples.",
        "too_short": "The audio is too short: one frame needs at least 400 samples at 16 kHz (25 ms).",
        "too_long": f"The audio is longer than the limit of {max_seconds:g} seconds.",
        "undecodable": "The body can't be decoded as audio, is damaged, has samples far outside [-1, 1], or is a chain of Ogg "
        "streams; send a complete wav, flac, ogg or mp3 file.",
    }
    return ServiceError(error.reason, messages[error.reason])


def silence_decoders() -> None:
    """Discard what C libraries print to standard error, where clients could fill the log with damaged mp3 files.

    libsndfile has no option that silences libmpg123, so C's ``stderr`` is redirected to /dev/null. Python's standard error, crash
    reports and direct writes to the file descriptor are unaffected. Only glibc allows the assignment; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        ctypes.c_void_p.in_dll(libc, "stderr").value = libc.fopen(b"/dev/null", b"w")
