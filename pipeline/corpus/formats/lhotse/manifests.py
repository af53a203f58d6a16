"""Lhotse's manifests in JSON lines: recordings, supervisions and cuts.

They are read directly, since the three kinds of objects are small and stable, and Lhotse would add dependencies only to parse them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_distill.pipeline.corpus.formats.file_splits import base_folder, located, split_of_stem
from ray_distill.pipeline.corpus.formats.text_lines import (
    MAX_LOOKED_AT,
    check_piece,
    first_record,
    json_files,
    read_records,
    seconds_of,
    text_of,
)
from ray_distill.pipeline.corpus.found import FoundFile, Search

_TOLERANCE = 0.1
"""Seconds by which a supervision may begin before its cut or end after it, such as by rounding or a trimmed pause."""


def _kind(file: Path) -> str:
    """Return ``recordings``, ``supervisions`` or ``cuts``; empty if a file is something else."""
    record = first_record(file)
    if str(record.get("type", "")).endswith("Cut"):
        return "cuts"
    if "sources" in record and "sampling_rate" in record:
        return "recordings"
    return "supervisions" if "recording_id" in record and "duration" in record else ""


def _manifests(path: Path) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for file in json_files(path):
        if kind := _kind(file):
            kinds.setdefault(kind, []).append(file)
    return kinds


def matches(path: Path) -> bool:
    """Return whether a file is such a manifest, or a folder has one."""
    return any(_kind(file) for file in json_files(path)[:MAX_LOOKED_AT])


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the utterances of a manifest, or of all manifests in a folder, whose names are the splits.

    In a folder, cuts count before supervisions, and supervisions before recordings. Supervisions need the file of their recordings
    beside them, with ``recordings`` in its name where theirs has ``supervisions``. The split is the file's name without these
    words and what precedes them. Cuts that mix audio or change it (``MixedCut``, ``PaddingCut``, speed) are refused, and so are
    recordings that are not files. Relative paths start at the manifest's folder, or above it as for Kaldi.

    Raises:
        ValueError: There is no manifest, or a line is damaged or refused.
    """
    kinds = _manifests(path)
    if not kinds:
        raise ValueError(f"{path} has no Lhotse manifest (.jsonl or .jsonl.gz) of recordings, supervisions or cuts")
    kind = next(name for name in ("cuts", "supervisions", "recordings") if name in kinds)
    read = {"cuts": _cuts, "supervisions": _supervisions, "recordings": _whole_recordings}[kind]
    files = kinds[kind]
    return [
        entry for file in files for entry in _located(file, read(file), split_of_stem(_split_name(file), len(files)))
    ]


def _split_name(file: Path) -> str:
    stem = file.name.partition(".jsonl")[0]
    return re.sub(r"^.*?(recordings|supervisions|cuts)[-_.]?", "", stem) or stem


@dataclass(frozen=True)
class Recording:
    """A recording of a manifest: its sources as pairs of a path and its channels, its duration and its channels."""

    sources: list[tuple[str, list[int]]]
    duration: float | None
    channels: list[int]


@dataclass(frozen=True)
class Piece:
    """A piece of a recording, with what is said of it. ``place`` is its line, for messages."""

    id: str
    recording: Recording
    start: float | None
    end: float | None
    channel: int | None
    speaker: str
    text: str
    place: str


def _located(file: Path, pieces: list[Piece], split: str | None) -> list[FoundFile]:
    base = base_folder(file.parent, [source for piece in pieces for source, _ in piece.recording.sources])
    found = []
    for piece in pieces:
        recording, channel = piece.recording, piece.channel
        if channel is None and len(recording.sources) == 1:
            source = recording.sources[0]
        elif channel is None:
            raise ValueError(
                f"{piece.place} has {len(recording.sources)} files, one for each channel, and names no channel; use cuts or "
                "supervisions with one channel"
            )
        else:
            wanted = channel
            source = next((source for source in recording.sources if wanted in source[1]), ("", []))
            if not source[0]:
                raise ValueError(f"{piece.place} names channel {channel}, which its recording lacks")
            channel = source[1].index(channel) if len(source[1]) > 1 else None
        start, end = piece.start, piece.end
        if not start and end is not None and recording.duration is not None and abs(end - recording.duration) < 1e-6:
            start = end = None  # All of it.
        origin = f"file {file.name}"
        audio, inside = located(base, source[0])
        found.append(
            FoundFile(piece.id, audio, split, origin, None, start, end, channel, piece.speaker, piece.text, inside)
        )
    return found


def _recording(record: Any, place: str) -> Recording:
    if not isinstance(record, dict) or not isinstance(record.get("sources"), list) or not record["sources"]:
        raise ValueError(f"{place} has no recording with sources")
    if record.get("transforms"):
        raise ValueError(
            f"{place} has a recording that is to be changed (transforms), which is not done; use the plain "
            "recording, or store the changed one as a file with save_audios of lhotse"
        )
    sources = []
    for source in record["sources"]:
        channels = source.get("channels", [0]) if isinstance(source, dict) else None
        if not isinstance(channels, list) or not all(isinstance(channel, int) for channel in channels):
            raise ValueError(f"{place} has a source that is no object with a list of channels")
        kind, audio = source.get("type"), source.get("source")
        if kind not in ("file", "url") or not isinstance(audio, str):
            raise ValueError(
                f"{place} has a recording from a {kind!r} source; only files and URLs are read, and commands are never run: store the "
                "audio as a file, for example with save_audios"
            )
        sources.append((audio, channels))
    every = [channel for _, some in sources for channel in some]
    return Recording(sources, seconds_of(record.get("duration"), f"the duration in {place}"), every)


def _whole_recordings(file: Path) -> list[Piece]:
    pieces = []
    for line, record in read_records(file):
        place = f"line {line} of {file}"
        pieces.append(Piece(_id(record, place), _recording(record, place), None, None, None, "", "", place))
    return pieces


def _supervisions(file: Path) -> list[Piece]:
    beside = file.with_name(file.name.replace("supervisions", "recordings"))
    if beside == file or not beside.is_file():
        raise ValueError(
            f"{file} needs the manifest of its recordings beside it, named {beside.name if beside != file else 'recordings.jsonl.gz'}"
        )
    places = {_id(r, f"line {n} of {beside}"): (r, f"line {n} of {beside}") for n, r in read_records(beside)}
    pieces = []
    for line, record in read_records(file):
        place = f"line {line} of {file}"
        name = record.get("recording_id")
        if name not in places:
            raise ValueError(f"{place} names the recording {name!r}, which is not in {beside}")
        pieces.append(cut_piece(record, _recording(*places[name]), [record], place))
    return pieces


def _cuts(file: Path) -> list[Piece]:
    pieces = []
    for line, record in read_records(file):
        place = f"line {line} of {file}"
        kind = record.get("type")
        if kind not in ("MonoCut", "MultiCut"):
            raise ValueError(
                f"{place} is a {kind}; only MonoCut and MultiCut, pieces of one recording, are read; store such audio as files with "
                "save_audios of lhotse"
            )
        pieces.append(
            cut_piece(record, _recording(record.get("recording"), place), record.get("supervisions") or [], place)
        )
    return pieces


def cut_piece(record: dict[str, Any], recording: Recording, supervisions: Any, place: str) -> Piece:
    """Return the piece of a cut or a supervision. ValueError if its times, its supervisions or its id are wrong."""
    start = seconds_of(record.get("start"), f"the start in {place}") or 0.0
    duration = seconds_of(record.get("duration"), f"the duration in {place}")
    if duration is None:
        raise ValueError(f"{place} has no duration")
    check_piece(start, start + duration, place)
    if not isinstance(supervisions, list) or not all(isinstance(supervision, dict) for supervision in supervisions):
        raise ValueError(f"{place} has supervisions that are no list of objects")
    channel = record.get("channel")
    if isinstance(channel, list):
        channel = channel[0] if len(channel) == 1 else None
    speakers = {text_of(supervision.get("speaker")) for supervision in supervisions}
    whole = all(_inside(supervision, record, duration) for supervision in supervisions)
    texts = (text_of(supervision.get("text")) for supervision in supervisions) if whole else ()
    text = " ".join(filter(None, texts))
    only = channel if isinstance(channel, int) and len(recording.channels) > 1 else None
    speaker = speakers.pop() if len(speakers) == 1 else ""
    # Lhotse rounds times to 8 decimals, and the sum of two is rounded too.
    return Piece(_id(record, place), recording, start, round(start + duration, 8), only, speaker, text, place)


def _inside(supervision: dict[str, Any], cut: dict[str, Any], duration: float) -> bool:
    """Return whether a supervision is within a cut of some seconds. Its text otherwise says more than is heard there.

    The times of a supervision count from the start of the cut, as Lhotse's windows of cuts have them.
    """
    if supervision is cut:
        return True
    start, length = supervision.get("start"), supervision.get("duration")
    if not isinstance(start, (int, float)) or not isinstance(length, (int, float)):
        return True
    return start >= -_TOLERANCE and start + length <= duration + _TOLERANCE


def _id(record: dict[str, Any], place: str) -> str:
    if not (id := text_of(record.get("id"))):
        raise ValueError(f"{place} has no id")
    return id
