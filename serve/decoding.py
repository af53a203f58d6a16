"""Untrusted bytes become a waveform, or a refusal that says why."""

import ctypes
import io
import platform

from ray_distill.serve.api.errors import ErrorType, ServiceError
from ray_distill.serve.inference.backends import Array
from ray_distill.teacher_cache.audio import AudioError, load_audio


def decode(audio: bytes, max_seconds: float) -> Array:
    """Decodes wav, flac, ogg (Vorbis, Opus) or mp3, block by block and never beyond ``max_seconds``.

    Returns:
        (S,) float32 at 16 kHz in [-1, 1], channels averaged; S >= 400.

    Raises:
        ServiceError: ``empty``, ``undecodable``, ``too_short`` or ``too_long``.
    """
    try:
        return load_audio(io.BytesIO(audio), max_seconds=max_seconds)
    except AudioError as error:
        # The loader's own words are for files with names, and quote the decoder's.
        messages: dict[ErrorType, str] = {
            "empty": "The audio file holds no samples.",
            "too_short": "The audio is too short: one frame needs at least 400 samples at 16 kHz (25 ms).",
            "too_long": f"The audio is longer than the {max_seconds:g} seconds allowed.",
            "undecodable": "The body can't be decoded as audio, or is damaged: send a whole wav, flac, ogg or mp3 file.",
        }
        raise ServiceError(error.reason, messages[error.reason]) from error


def silence_decoders() -> None:
    """Drops what decoders in C print to standard error: clients could fill the log with damaged mp3.

    libsndfile gives its libmpg123 no word to be quiet. So C's ``stderr`` becomes /dev/null; Python's, crash reports and
    whatever writes to the file descriptor are as before. Only with glibc, where it may be assigned to.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        ctypes.c_void_p.in_dll(libc, "stderr").value = libc.fopen(b"/dev/null", b"w")
