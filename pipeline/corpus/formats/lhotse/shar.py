"""Lhotse's Shar: shards of cuts as JSON lines, with the audio of their recordings in tar files beside them."""

import re
import tarfile
from pathlib import Path
from typing import Any

from ray_distill.pipeline.corpus.formats.hidden import visible
from ray_distill.pipeline.corpus.formats.lhotse.manifests import Piece, Recording, cut_piece
from ray_distill.pipeline.corpus.formats.text_lines import read_records, seconds_of
from ray_distill.pipeline.corpus.found import FoundFile, Search
from ray_distill.pipeline.corpus.splits import NO_SPLIT, split_of_folders
from ray_distill.pipeline.corpus.suffixes import SUFFIXES
from ray_distill.teacher_cache.sources.address import AudioAddress

_CUTS = re.compile(r"cuts\.(\d+)\.jsonl(\.gz)?")
_FIELD = re.compile(r"([A-Za-z0-9_]+)\.(\d+)\.tar(\.gz)?")


def matches(path: Path) -> bool:
    """Return whether a folder, or one in it, has ``cuts.NUMBER.jsonl.gz`` with ``recording.NUMBER.tar`` beside it."""
    return path.is_dir() and any(_audio_of(file).is_file() for file in _shards(path, 1)[:1])


def _shards(path: Path, deep: int = 2) -> list[Path]:
    """Return the files with cuts in a folder and in the folders up to some levels deeper, sorted by folder and number."""
    patterns = ("cuts.*", "*/cuts.*", "*/*/cuts.*")[: deep + 1]
    files = [file for pattern in patterns for file in visible(path.glob(pattern), path) if _number(file)]
    return sorted(files, key=lambda file: (str(file.parent), int(_number(file)), file.name))


def _number(file: Path) -> str:
    match = _CUTS.fullmatch(file.name)
    return match[1] if match else ""


def _audio_of(cuts: Path) -> Path:
    return cuts.with_name(f"recording.{_number(cuts)}.tar")


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the cuts of all shards in a folder and up to two folders deeper.

    The split is a word in the folders' names. The audio of a cut is the member of ``recording.NUMBER.tar`` with the cut's id, and is
    read from its place. Only ``MonoCut`` and ``MultiCut`` are read. Other fields, such as features, are not used, and a note says so.

    Raises:
        ValueError: There is no shard, one lacks its tar file, a tar file is compressed or damaged, or a cut has no audio in it.
    """
    shards = _shards(path) if path.is_dir() else []
    if not shards:
        raise ValueError(f"{path} is no folder with Lhotse Shar, which has files such as cuts.000000.jsonl.gz")
    splits = {file: split_of_folders(file.relative_to(path).parts[:-1], search.wanted, file) for file in shards}
    found = []
    for file in shards:
        split, origin = None, ""
        if (named := splits[file]) is not None:
            split, origin = named[0], f"folder {'/'.join(file.relative_to(path).parts[: named[1]])}"
        elif any(splits.values()):
            split, origin = NO_SPLIT, "outside the splits"
        members = _members(_audio_of(file))
        for line, record in read_records(file):
            place = f"line {line} of {file}"
            found.append(_entry(_piece(record, place), members, _audio_of(file), split, origin))
    fields = {match[1] for file in shards for other in file.parent.iterdir() if (match := _FIELD.fullmatch(other.name))}
    if others := sorted(fields - {"recording"}):
        search.notes.append(f"the fields {', '.join(others)} of the shards in {path} are not used; only recording is")
    return found


def _piece(record: dict[str, Any], place: str) -> Piece:
    kind, recording = record.get("type"), record.get("recording")
    if kind not in ("MonoCut", "MultiCut"):
        raise ValueError(f"{place} is a {kind}; only MonoCut and MultiCut, pieces of one recording, are read")
    if not isinstance(recording, dict):
        raise ValueError(f"{place} has no recording")
    channels = recording.get("channel_ids") or [0]
    if not isinstance(channels, list) or not all(type(channel) is int for channel in channels):
        raise ValueError(f"{place} has a recording whose channel_ids are no list of numbers")
    duration = seconds_of(recording.get("duration"), f"the duration of the recording in {place}")
    return cut_piece(record, Recording([("", channels)], duration, channels), record.get("supervisions") or [], place)


def _entry(piece: Piece, members: dict[str, AudioAddress], tar: Path, split: str | None, origin: str) -> FoundFile:
    if piece.id not in members:
        raise ValueError(f"{piece.place} has the cut {piece.id!r}, which has no audio in {tar}; export the shard again")
    recording, start, end, channel = piece.recording, piece.start, piece.end, piece.channel
    if channel is not None:
        if channel not in recording.channels:
            raise ValueError(f"{piece.place} names channel {channel}, which its recording lacks")
        channel = recording.channels.index(channel)
    if not start and end is not None and recording.duration is not None and abs(end - recording.duration) < 1e-6:
        start = end = None  # All of it.
    return FoundFile(
        piece.id,
        tar,
        split,
        origin,
        start=start,
        end=end,
        channel=channel,
        speaker=piece.speaker,
        text=piece.text,
        inside=members[piece.id],
    )


def _members(tar: Path) -> dict[str, AudioAddress]:
    """Return the places of the audio in a tar file by the names without suffix, which are the ids of the cuts."""
    found: dict[str, AudioAddress] = {}
    if not tar.is_file():
        compressed = tar.with_name(f"{tar.name}.gz")
        advice = f"; decompress {compressed.name}" if compressed.is_file() else ""
        raise ValueError(f"there is no {tar}, which has the audio of the cuts beside it{advice}")
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                stem, dot, _ = member.name.rpartition(".")
                if dot and member.isreg() and not member.issparse() and member.name.lower().endswith(SUFFIXES):
                    found[stem] = AudioAddress(
                        str(tar), offset=member.offset_data, size=member.size, name=member.name[:200]
                    )
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{tar} can't be read as a tar file ({error})") from error
    return found
