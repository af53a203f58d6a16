"""The length of mp3 audio, of which libsndfile decodes only as much as it expects from the first frame."""

import re
from pathlib import Path
from typing import BinaryIO

_BIT_RATES = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Kilobits per second of layer III by the number of the MPEG version."""
_RATES = (44_100, 48_000, 32_000)
_DELAY = 3 * 1152
"""Number of samples at the ends of a file, which encoders add, that a decoder may leave out."""
_BLOCK = 1 << 16


def wrong_mp3_length(source: Path | str | BinaryIO, decoded: int, expected: int, tolerance: int) -> str | None:
    """Return what is wrong with the length of mp3 audio that was decoded to its end, after its name. None if all was decoded.

    libsndfile reads the number of frames from a tag in the first one, or estimates it from the size of the first one. So it decodes
    the first of several files that were joined, and a part of one with a variable bit rate and no tag.

    Args:
        source: Path or binary file of the audio.
        decoded: Number of samples of a channel that were decoded.
        expected: Number of samples that the decoder expected.
        tolerance: Number of samples that may be missing.
    """
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            return wrong_mp3_length(file, decoded, expected, tolerance)
    at = source.tell()
    try:
        present, counted = _walk(source)
    finally:
        source.seek(at)
    if present - decoded > tolerance + _DELAY:
        return (
            f"has {present} samples, of which only the first {decoded} would be read, since it is several mp3 files in one, or has "
            "a variable bit rate without a header that says so; convert it to flac or wav, for example with ffmpeg"
        )
    if counted and expected - decoded > tolerance:
        return f"is cut off (its header says {expected} samples, but it has {decoded}); copy or convert it again"
    return None


def _walk(source: BinaryIO) -> tuple[int, bool]:
    """Return the number of samples of a channel in all frames of a file, and whether the first frame counts the others."""
    samples, counted, at = 0, False, 0
    while (at := _next_frame(source, at)) >= 0:
        source.seek(at)
        head = source.read(64 if samples == 0 and not counted else 4)
        size, of_frame = _frame(head) or (1, 0)
        if re.search(b"Xing|Info", head):
            counted = True
        else:
            samples += of_frame
        at += size
    return samples, counted


def _next_frame(source: BinaryIO, at: int) -> int:
    """Return the position of the first frame from a position on, behind tags and other bytes. -1 if there is none."""
    while True:
        source.seek(at)
        head = source.read(10)
        if _frame(head) is not None:
            return at
        if len(head) < 4:
            return -1
        if len(head) == 10 and head.startswith(b"ID3"):
            size = sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
            at += 10 + size + 10 * bool(head[5] & 16)
            continue
        source.seek(at + 1)
        block = source.read(_BLOCK)
        # In other bytes, a frame is only believed if another one follows it.
        for found in re.finditer(rb"ID3|\xff(?=[\xe2\xe3\xf2\xf3\xfa\xfb])", block):
            place = at + 1 + found.start()
            if found[0] == b"ID3" or _is_followed(source, place):
                break
        else:
            place = at + max(len(block) - 3, 1)
        at = place


def _is_followed(source: BinaryIO, at: int) -> bool:
    source.seek(at)
    frame = _frame(source.read(4))
    if frame is None:
        return False
    source.seek(at + frame[0])
    return _frame(source.read(4)) is not None


def _frame(head: bytes) -> tuple[int, int] | None:
    """Return the number of bytes and of samples of the frame of layer III that ``head`` is the beginning of. None if it is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None
    version = {3: 1, 2: 2, 0: 4}.get(head[1] >> 3 & 3)  # 4 stands for MPEG 2.5, with a quarter of the rates of MPEG 1.
    bits, rate = head[2] >> 4, head[2] >> 2 & 3
    if version is None or bits in (0, 15) or rate == 3:
        return None
    samples = 1152 if version == 1 else 576
    kilobits = _BIT_RATES[min(version, 2)][bits]
    return samples * kilobits * 125 // (_RATES[rate] // version) + (head[2] >> 1 & 1), samples
