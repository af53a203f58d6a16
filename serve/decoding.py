"""Decode untrusted bytes into a waveform, or refuse them with a reason."""

import ctypes
import io
import platform

from ray_distill.serve.api.errors import ErrorType, ServiceError
from ray_distill.serve.inference.backends import Array
from ray_distill.teacher_cache.audio import AudioError, load_audio


def decode(audio: bytes, max_seconds: float) -> Array:
    """Decode wav, flac, ogg (Vorbis, Opus) or mp3, in blocks and never beyond ``max_seconds``.

    Returns:
        (S,) float32 at 16 kHz in [-1, 1], channels averaged; S >= 400.

    Raises:
        ServiceError: ``empty``, ``undecodable``, ``too_short`` or ``too_long``.
    """
    try:
        return load_audio(io.BytesIO(audio), max_seconds=max_seconds)
    except AudioError as error:
        if error.reason == "no_channel" or error.reason == "outside":
            raise  # Only pieces and channels of files, which no request names.
        # The loader's own messages name a file and quote the decoder.
        messages: dict[ErrorType, str] = {
            "empty": "The audio file contains no samples.",
            "too_short": "The audio is too short: one frame needs at least 400 samples at 16 kHz (25 ms).",
            "too_long": f"The audio is longer than the limit of {max_seconds:g} seconds.",
            "undecodable": "The body can't be decoded as audio, is damaged, or has samples far outside [-1, 1]; send a complete wav, "
            "flac, ogg or mp3 file.",
        }
        raise ServiceError(error.reason, messages[error.reason]) from error


def silence_decoders() -> None:
    """Discard what C libraries print to standard error, where clients could fill the log with damaged mp3 files.

    libsndfile has no option that silences libmpg123, so C's ``stderr`` is redirected to /dev/null. Python's standard error, crash
    reports and direct writes to the file descriptor are unaffected. Only glibc allows the assignment; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        ctypes.c_void_p.in_dll(libc, "stderr").value = libc.fopen(b"/dev/null", b"w")
