"""A folder of audio: in LibriSpeech's layout, or any other."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ray_distill.pipeline.corpus.formats.hidden import hidden, is_hidden
from ray_distill.pipeline.corpus.found import FoundFile, Search, Skipped, SkippedFiles
from ray_distill.pipeline.corpus.splits import NO_SPLIT, kinds, match_wanted, split_of_folders
from ray_distill.pipeline.corpus.suffixes import FIRST_SUFFIXES, SUFFIXES, UNSUPPORTED

# Files that may list the splits of a corpus.
_LISTS = (".tsv", ".csv", ".txt", ".lst", ".scp", ".json", ".jsonl", ".parquet")


def matches(path: Path) -> bool:
    """Return whether there is an audio file at any depth below a folder."""
    if not path.is_dir():
        return False
    for _, folders, names in os.walk(path, followlinks=False):
        folders[:] = [name for name in folders if not is_hidden(PurePath(name))]
        if any(name.lower().endswith(SUFFIXES) and not is_hidden(PurePath(name)) for name in names):
            return True
    return False


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the audio files below a folder.

    A folder with files ``SPLIT/SPEAKER/CHAPTER/*.flac`` has LibriSpeech's layout. Its top-level folders are the splits, and the file
    stems are the ids. In any other folder, the ids are the relative paths without suffix, or with it if two files differ only in
    their suffix. The splits are the folders, at any depth, whose names have a word such as ``train`` or ``dev``; files of
    LibriSpeech below them keep their ids. If no folder has such a name, the corpus has no splits.

    Raises:
        ValueError: The folder can't be read, or it is ambiguous which split a file belongs to.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder, so it is no folder of audio")
    skipped, wanted = search.skipped, search.wanted
    walked = _walk(path, skipped)
    files = []
    for file in walked.audio:
        if _is_text(str(file)):
            files.append(file)
        else:
            skipped.append(Skipped(file, "bad_name", "the file's name is not valid UTF-8"))
    names = [file.relative_to(path) for file in files]
    if any(_is_librispeech(name) and len(name.parts) == 4 and name.suffix == ".flac" for name in names):
        return _find_in_librispeech(files, names, wanted, skipped)
    splits = [split_of_folders(name.parts[:-1], wanted, file) for name, file in zip(names, files, strict=True)]
    if not any(splits) and not wanted and walked.lists:
        raise ValueError(
            f"{path} has lists of splits, such as {walked.lists[0]}, which are not read; write a .csv manifest with the columns path "
            f"and split and set corpus.path to it, or set corpus.train_splits=[{NO_SPLIT}] to use all files"
        )
    # The ids of files that the first version found do not depend on the files that it ignored.
    stems = [name.with_suffix("").as_posix() for name in names]
    counts = Counter(stems)
    first_counts = Counter(
        stem for stem, name in zip(stems, names, strict=True) if name.suffix.lower() in FIRST_SUFFIXES
    )
    entries = []
    for stem, name, file, split in zip(stems, names, files, splits, strict=True):
        unique = (first_counts if name.suffix.lower() in FIRST_SUFFIXES else counts)[stem] == 1
        id = stem if unique else name.as_posix()
        if split is None:
            entries.append(FoundFile(id, file, NO_SPLIT if any(splits) else None, "outside the splits' folders"))
        else:
            # In a copy or below a parent folder, LibriSpeech's files keep their ids.
            id = file.stem if _is_librispeech(name) and split[1] == len(name.parts) - 3 else id
            entries.append(FoundFile(id, file, split[0], f"folder {'/'.join(name.parts[: split[1]])}"))
    return entries


def _find_in_librispeech(
    files: list[Path], names: list[Path], wanted: list[str], skipped: SkippedFiles
) -> list[FoundFile]:
    """Return the files of a folder in LibriSpeech's layout, where each folder is a split, whatever its name."""
    entries = []
    for file, name in zip(files, names, strict=True):
        if len(name.parts) == 1:
            skipped.append(Skipped(file, "no_split", f"{file} is in none of the splits' folders"))
            continue
        top = name.parts[0]
        split, depth = top, 1
        if match_wanted(name.parts[:-1], wanted) or not kinds(top):
            split, depth = split_of_folders(name.parts[:-1], wanted, file) or (top, 1)
        else:
            split_of_folders(name.parts[:-1], wanted, file)
        entries.append(FoundFile(file.stem, file, split, f"folder {'/'.join(name.parts[:depth])}"))
    return entries


@dataclass
class _Walked:
    """The audio files below a folder, and the files that may list their splits."""

    audio: list[Path] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)


def _walk(path: Path, skipped: SkippedFiles) -> _Walked:
    """Find the audio files below a folder, sorted.

    Links to folders are followed, because corpora are often assembled from links. Each folder is visited once. Folders below the
    path that can't be read, and audio in other formats, are added to ``skipped``.

    Raises:
        ValueError: The path itself can't be read.
    """
    walked, seen = _Walked(), set()

    def unreadable(error: OSError) -> None:
        folder = Path(error.filename)
        message = f"the folder {folder} can't be read ({error.strerror})"
        if folder == path:
            raise ValueError(message) from error
        skipped.append(Skipped(folder, "unreadable_folder", message))

    # A folder's own place counts before a link to it, which may lie in another split or in none.
    places = [str(path)]
    while places:
        links: list[str] = []
        for place in places:
            for folder, folders, names in os.walk(place, onerror=unreadable):
                real = Path(folder).resolve()
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                inner_hidden = [Path(folder) / name for name in folders if is_hidden(PurePath(name))]
                skipped.extend(hidden(inner) for inner in inner_hidden if matches(inner))
                folders[:] = sorted(name for name in folders if not is_hidden(PurePath(name)))
                links += (inner for name in folders if os.path.islink(inner := os.path.join(folder, name)))  # noqa: PTH114, PTH118
                _add(walked, skipped, folder, names)
        places = sorted(links)
    walked.audio.sort()
    return walked


def _add(walked: _Walked, skipped: SkippedFiles, folder: str, names: list[str]) -> None:
    """Add the files of a folder."""
    audio = {Path(name).stem for name in names if name.lower().endswith(SUFFIXES)}
    for name in sorted(names):
        file = Path(folder) / name
        suffix = file.suffix.lower()
        if is_hidden(PurePath(name)):
            if name.lower().endswith(SUFFIXES):
                skipped.append(hidden(file))
        elif name.lower().endswith(SUFFIXES):
            walked.audio.append(file)
        elif suffix in UNSUPPORTED:
            message = (
                f"{file} can't be decoded, since libsndfile doesn't read {suffix} files; convert it to flac or wav"
            )
            skipped.append(Skipped(file, "unsupported_format", message))
        elif suffix in _LISTS and file.stem not in audio and kinds(file.stem) - {"train"}:
            walked.lists.append(file)


def _is_librispeech(name: Path) -> bool:
    """Return whether a relative path ends in SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, or with another suffix."""
    parts = name.parts
    return len(parts) >= 4 and name.stem.startswith(f"{parts[-3]}-{parts[-2]}-")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
