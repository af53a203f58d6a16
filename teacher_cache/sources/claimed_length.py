"""The length of audio that its decoder does not notice: bytes that are missing, and parts that would not be read."""

import re
from pathlib import Path
from typing import BinaryIO

import soundfile

TOLERANCE = 0.1
"""Seconds of audio that may be missing, since some programs count a part of the header, or round."""

# libsndfile shortens such a file silently, and says so in its log only.
_SHORT = {
    "WAV": r"^data +: +(\d+) \(should be (\d+)\)",
    "WAVEX": r"^data +: +(\d+) \(should be (\d+)\)",
    "AIFF": r"^ *SSND +: +(\d+) \(should be (\d+)\)",
    "AU": r"^ *Data Size +: +(\d+) \(should be (\d+)\)",
    "RF64": r"^ *Riff size +: +(\d+) \(should be (\d+)\)",
    "W64": r"^riff +: +(\d+) \(should be (\d+)\)",
}
_PAGE_BYTES = 2**16  # More than the largest page of an Ogg file.
_UNKNOWN = 2**31 - 2**16
"""Programs that write to a pipe claim about 2 or 4 GiB, since they don't know the length before the end."""


def refused_length(file: soundfile.SoundFile, source: Path | str | BinaryIO) -> str | None:
    """Return what is wrong with the length of audio that is to be decoded to its end, after its name. None if nothing is known to be.

    Args:
        file: Decoder of the audio.
        source: Path or binary file of the same audio.
    """
    if (short := _cut_off(file)) is not None:
        return f"is cut off ({short}); copy or convert it again"
    if file.format == "OGG" and _has_later_streams(source):
        return "is a chain of several Ogg streams, of which only the first would be read; convert it to one stream"
    return None


def _cut_off(file: soundfile.SoundFile) -> str | None:
    """Return what is wrong with a file that ends before its header says, or None if it is complete.

    Sizes that stand for an unknown length are accepted. Known for WAV, RF64, W64, AIFF and AU; the decoders of FLAC and others
    notice it themselves; see also `mp3_length`.
    """
    found = re.search(_SHORT[file.format], file.extra_info, re.MULTILINE) if file.format in _SHORT else None
    if found is None:
        return None
    claimed, present = int(found[1]), int(found[2])
    small = file.format in ("WAV", "WAVEX", "AIFF", "AU")
    missing = file.frames * (claimed / max(present, 1) - 1) if file.frames else file.samplerate
    if present >= claimed or (small and claimed >= _UNKNOWN) or missing <= TOLERANCE * file.samplerate:
        return None
    return f"its header says {claimed} bytes, but it has {present}"


def bytes_after_data(source: Path | str | BinaryIO) -> int:
    """Return the number of bytes behind a WAV header's empty data chunk that are not chunks themselves."""
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            return bytes_after_data(file)
    source.seek(0)
    head = source.read(1 << 16)
    at = head.find(b"data\0\0\0\0")
    rest = head[at + 8 : at + 12]
    is_chunk = rest.strip().isalnum()  # LIST, bext, ...
    return 0 if at < 0 or is_chunk else source.seek(0, 2) - (at + 8)


def _has_later_streams(source: Path | str | BinaryIO) -> bool:
    """Return whether an Ogg file is a chain of streams, of which libsndfile decodes only the first.

    A recording of a radio station begins a stream with each title. The streams of a chain have different serial numbers (RFC 3533), so
    the last page has another one than the pages that begin the file.
    """
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            return _has_later_streams(file)
    at = source.tell()
    try:
        source.seek(0)
        first = _serials(source.read(_PAGE_BYTES), only_begins=True)
        source.seek(max(source.seek(0, 2) - _PAGE_BYTES, 0))
        last = _serials(source.read())
    finally:
        source.seek(at)
    return bool(first and last) and last[-1] not in first


def _serials(data: bytes, only_begins: bool = False) -> list[bytes]:
    """Return the serial numbers of the Ogg pages in ``data``; ``only_begins`` stops at the first page that begins no stream."""
    serials = []
    for page in re.finditer(rb"OggS\0([\0-\x07]).{8}(.{4})", data, re.DOTALL):
        if only_begins and not page[1][0] & 2:
            break
        serials.append(page[2])
    return serials
