"""Kaldi's data folders: ``wav.scp``, and beside it ``segments``, ``utt2spk`` and ``text``."""

import re
from pathlib import Path

from ray_distill.pipeline.corpus.formats.file_splits import base_folder, located, split_of_stem
from ray_distill.pipeline.corpus.formats.hidden import visible
from ray_distill.pipeline.corpus.formats.text_lines import check_piece, read_lines, seconds_of
from ray_distill.pipeline.corpus.found import FoundFile, Search
from ray_distill.teacher_cache.sources.address import AudioAddress


def matches(path: Path) -> bool:
    """Return whether a folder, or one inside it, has a ``wav.scp``."""
    return path.is_dir() and bool(_folders(path))


def _folders(path: Path) -> list[Path]:
    return (
        [path] if (path / "wav.scp").is_file() else sorted(scp.parent for scp in visible(path.glob("*/wav.scp"), path))
    )


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the utterances of a data folder, or of all data folders in a folder, whose names are the splits.

    Without ``segments``, each recording is an utterance. An end of -1 means the end of the recording. Relative paths start at the
    data folder or, if the first one does not exist there, at the nearest folder above it where it does. ``FILE:OFFSET`` is audio
    inside an archive. A command in ``wav.scp`` is never run.

    Raises:
        ValueError: A line is not in Kaldi's format, is a command, or names an unknown recording.
    """
    folders = _folders(path) if path.is_dir() else []
    if not folders:
        raise ValueError(f"{path} has no Kaldi data folder; a data folder contains a file wav.scp")
    return [entry for folder in folders for entry in _find_in(folder, split_of_stem(folder.name, len(folders)))]


def _find_in(folder: Path, split: str | None) -> list[FoundFile]:
    recordings = _recordings(folder / "wav.scp")
    base = base_folder(folder, [re.sub(r":\d+$", "", audio) for audio in recordings.values()])
    speakers, texts = _table(folder / "utt2spk"), _table(folder / "text")
    segments = folder / "segments"
    pieces = (
        _segments(segments, recordings) if segments.is_file() else [(name, name, None, None) for name in recordings]
    )
    found = []
    for utterance, recording, start, end in pieces:
        audio = recordings[recording]
        file, inside = located(base, audio)
        if archive := re.fullmatch(r"(.+\.ark):(\d+)", audio):
            file = base / archive[1]
            inside = AudioAddress(str(file), offset=int(archive[2]), name=recording)
        found.append(
            FoundFile(
                id=utterance,
                path=file,
                split=split,
                origin=f"data folder {folder.name}",
                start=start,
                end=end,
                speaker=speakers.get(utterance, ""),
                text=texts.get(utterance, ""),
                inside=inside,
            )
        )
    return found


def _recordings(scp: Path) -> dict[str, str]:
    recordings: dict[str, str] = {}
    for number, line in read_lines(scp):
        name, audio = _key_and_value(line)
        if audio.endswith("|"):
            raise ValueError(
                f"line {number} of {scp} is a command ({audio[:80]!r}), which is never run; run it yourself, and write the path of "
                "its output instead, as wav-copy or extract_wav_segments_data_dir.sh do"
            )
        if not audio:
            raise ValueError(f"line {number} of {scp} is {line[:80]!r}; give a recording's id and its path")
        if recordings.setdefault(name, audio) != audio:
            raise ValueError(
                f"line {number} of {scp} names {audio!r} as the recording {name!r}, which is {recordings[name]!r} before; give "
                "each its own id"
            )
    return recordings


def _segments(file: Path, recordings: dict[str, str]) -> list[tuple[str, str, float | None, float | None]]:
    pieces = []
    for number, line in read_lines(file):
        place = f"line {number} of {file}"
        values = line.split()
        if len(values) != 4:
            raise ValueError(f"{place} is {line[:80]!r}; give an utterance, a recording, a start and an end in seconds")
        utterance, recording, begin, stop = values
        if recording not in recordings:
            raise ValueError(f"{place} names the recording {recording!r}, which is not in {file.with_name('wav.scp')}")
        start = seconds_of(begin, f"the start in {place}")
        end = None if _is_recording_end(stop) else seconds_of(stop, f"the end in {place}")
        check_piece(start, end, place)
        pieces.append((utterance, recording, start, end))
    return pieces


def _is_recording_end(text: str) -> bool:
    """Return whether a text is -1, Kaldi's end of a recording."""
    return bool(re.fullmatch(r"-1(\.0*)?", text))


def _table(file: Path) -> dict[str, str]:
    """Return the lines of a file as keys and values. Empty if there is no such file."""
    if not file.is_file():
        return {}
    return dict(_key_and_value(line) for _, line in read_lines(file) if line.strip())


def _key_and_value(line: str) -> tuple[str, str]:
    """Split a line at its first white space. The value is empty if there is none."""
    key, value, *_ = *line.split(maxsplit=1), "", ""
    return key, value.strip()
