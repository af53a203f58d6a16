"""Decoding of what was found, into utterances, or into the reasons why it is skipped."""

import math
import os
from dataclasses import dataclass, replace
from typing import Literal

from ray_distill.pipeline.corpus.found import FoundFile, Skipped, piece_id
from ray_distill.pipeline.corpus.long_audio import cut_recording
from ray_distill.teacher_cache.audio import AudioError, AudioHeader, load_identified_audio, read_blocks, read_header
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.sources.address import AudioAddress, Channel
from ray_distill.teacher_cache.sources.parquet_row import locate_row
from ray_distill.teacher_cache.storage.shard_plan import Utterance

LongAudio = Literal["skip", "cut"]

TOLERANCE = 0.1
"""Seconds by which the end of a piece may lie behind the end of the audio, since tools round times. It then ends with the audio."""


@dataclass(frozen=True)
class Limits:
    """What is used of the audio that was found.

    Attributes:
        min_seconds: Shortest utterance in seconds.
        max_seconds: Longest utterance in seconds.
        channel: Channel to use where the corpus names none. None means the mean of all, and counts the audio that has several.
        long_audio: ``skip`` or ``cut`` longer audio.
    """

    min_seconds: float
    max_seconds: float
    channel: Channel | None = None
    long_audio: LongAudio = "skip"


@dataclass(frozen=True)
class Decoded:
    """What became of an entry.

    Attributes:
        results: Its utterances and the parts that are skipped.
        mixed: Whether several channels were averaged without anyone having asked for it.
        cut: Whether it was cut into windows.
    """

    results: list[Utterance | Skipped]
    mixed: bool = False
    cut: bool = False


def decode(entry: FoundFile, limits: Limits) -> Decoded:
    """Decode an entry and identify its audio."""
    if not entry.address.is_remote and not os.path.isfile(entry.path):  # noqa: PTH113 (Path.is_file raises if a parent folder can't be searched)
        return Decoded([Skipped(entry.path, "missing", f"{entry.path} does not exist or is not a file")])
    try:
        address = entry.address
        if address.channel is None:
            address = replace(address, channel=limits.channel)
        header = read_header(address)
        if address.row is not None and (place := locate_row(entry.path, address.row, str(address.column))) is not None:
            name = address.name or f"row {address.row}"
            address = replace(address, row=None, column=None, offset=place[0], size=place[1], name=name)
        address = _with_piece(address, entry, header)
        mixed = header.channels > 1 and address.channel is None
        if address.channel == "mix" or (header.channels == 1 and address.channel == 0):
            address = replace(address, channel=None)  # The same audio, whose address may be a plain path.
    except AudioError as error:
        return Decoded([Skipped(entry.path, error.reason, str(error))])
    result = _utterance(entry, entry.id, address, limits)
    if isinstance(result, Skipped) and result.reason == "outside" and header.frames is None:
        # The header of this format has no exact length.
        try:
            length = (address.start or 0) + sum(len(block) for block in read_blocks(replace(address, end=None)))
            result = _utterance(entry, entry.id, _shortened(address, length, header.rate), limits)
        except AudioError as error:
            result = Skipped(entry.path, error.reason, str(error))
    if not isinstance(result, Skipped) or result.reason != "too_long" or limits.long_audio == "skip":
        return Decoded([result], mixed and isinstance(result, Utterance))
    try:
        windows = cut_recording(address, header.rate, limits.max_seconds, limits.min_seconds)
    except AudioError as error:
        return Decoded([Skipped(entry.path, error.reason, str(error))])
    results = [
        _utterance(entry, piece_id(entry.id, begin, end), window, replace(limits, max_seconds=math.inf))
        for window, begin, end in windows
    ]
    return Decoded(results, mixed, cut=True)


def _utterance(entry: FoundFile, id: str, address: AudioAddress, limits: Limits) -> Utterance | Skipped:
    try:
        waveform, identity = load_identified_audio(
            address, None if math.isinf(limits.max_seconds) else limits.max_seconds
        )
        if len(waveform) < limits.min_seconds * SAMPLE_RATE:
            raise AudioError("too_short", f"{address} is shorter than {limits.min_seconds} s")
    except AudioError as error:
        return Skipped(entry.path, error.reason, str(error))
    return Utterance(id, address.encode(), len(waveform), entry.role or "train", identity)


def sample_at(seconds: float, rate: int) -> int:
    """Return the sample nearest to a time; of two that are equally near, the later one.

    Two pieces that share a bound in seconds therefore share it in samples, so none is lost or used twice.
    """
    return math.floor(seconds * rate + 0.5)


def _with_piece(address: AudioAddress, entry: FoundFile, header: AudioHeader) -> AudioAddress:
    """Return the address with the bounds of the entry's piece, in samples. An end just behind the audio is moved to its end."""
    if entry.start is None and entry.end is None:
        return address
    start = None if entry.start is None else sample_at(entry.start, header.rate)
    if entry.end is None:
        return replace(address, start=start)
    end = sample_at(entry.end, header.rate)
    piece = replace(address, start=start, end=end)
    if header.frames is not None:
        return _shortened(piece, header.frames, header.rate)
    return piece


def _shortened(piece: AudioAddress, length: int, rate: int) -> AudioAddress:
    """Return a piece that ends with the audio, if its end is just behind it.

    Raises:
        AudioError: The piece is farther outside, or empty.
    """
    start, end = piece.start or 0, piece.end or 0
    if end > length + TOLERANCE * rate:
        raise AudioError("outside", f"{piece} is outside the audio, which has {length} samples")
    if min(end, length) <= start:
        raise AudioError("empty", f"{piece} has no samples")
    return replace(piece, end=min(end, length))
