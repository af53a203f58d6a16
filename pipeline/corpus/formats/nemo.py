"""NeMo's manifests: JSON lines with ``audio_filepath``, ``offset``, ``duration`` and ``text``."""

from pathlib import Path

from ray_distill.pipeline.corpus.formats.file_splits import located, split_of_stem
from ray_distill.pipeline.corpus.formats.text_lines import (
    MAX_LOOKED_AT,
    check_piece,
    first_record,
    json_files,
    read_records,
    seconds_of,
    text_of,
)
from ray_distill.pipeline.corpus.found import FoundFile, Search, piece_id, without_suffix


def matches(path: Path) -> bool:
    """Return whether a file, or one in a folder, has ``audio_filepath`` in its first line."""
    return any("audio_filepath" in first_record(file) for file in json_files(path)[:MAX_LOOKED_AT])


def _manifests(path: Path) -> list[Path]:
    return [file for file in json_files(path) if "audio_filepath" in first_record(file)]


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the audio of a manifest, or of all manifests in a folder, whose names are the splits.

    Relative paths start at the manifest's folder. A line with an ``offset`` is a piece of ``duration`` seconds. The id is the
    path without suffix, followed by the piece's bounds. ``speaker`` and ``domain`` are kept.

    Raises:
        ValueError: A line is not JSON, lacks ``audio_filepath``, or has an impossible time.
    """
    manifests = _manifests(path)
    if not manifests:
        raise ValueError(f"{path} has no NeMo manifest; the lines of one are JSON objects with 'audio_filepath'")
    found = []
    for manifest in manifests:
        split = split_of_stem(manifest.name.partition(".")[0], len(manifests))
        for line, record in read_records(manifest):
            place = f"line {line} of {manifest}"
            audio = record.get("audio_filepath")
            if isinstance(audio, list):
                raise ValueError(
                    f"{place} has a list as audio_filepath, but each utterance must be in one file; join the channels in one file, or "
                    "write a line for each"
                )
            if not isinstance(audio, str) or not audio:
                raise ValueError(f"{place} has no audio_filepath; give the path of its audio")
            if "shard_id" in record:
                raise ValueError(
                    f"{place} is a file inside a tar file (it has a shard_id); set corpus.path to the folder of the tar files "
                    "instead, which is read as WebDataset"
                )
            start = seconds_of(record.get("offset"), f"the offset in {place}")
            duration = seconds_of(record.get("duration"), f"the duration in {place}")
            # Without an offset the duration is that of the file, often rounded.
            end = None if start is None or duration is None else start + duration
            check_piece(start, end, place)
            file, inside = located(manifest.parent, audio)
            found.append(
                FoundFile(
                    id=piece_id(without_suffix(audio), start, end),
                    path=file,
                    split=split,
                    origin=f"file {manifest.name}",
                    start=start,
                    end=end,
                    speaker=text_of(record.get("speaker")),
                    domain=text_of(record.get("domain")),
                    text=text_of(record.get("text")),
                    inside=inside,
                )
            )
    return found
