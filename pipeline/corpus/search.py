"""Search for the audio files of a corpus: in a manifest, in LibriSpeech's layout, or in any folder."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray_distill.pipeline.corpus.formats import FIRST_SUFFIXES, SUFFIXES, UNSUPPORTED
from ray_distill.pipeline.corpus.found import FoundFile, Skipped
from ray_distill.pipeline.corpus.manifest import find_in_manifest
from ray_distill.pipeline.corpus.splits import (
    NO_SPLIT,
    SplitSummary,
    assign_splits,
    kinds,
    match_wanted,
    split_of_folders,
)

# Files that may list the splits of a corpus.
_LISTS = (".tsv", ".csv", ".txt", ".lst", ".scp", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class FoundCorpus:
    """The files of a corpus, before they are opened.

    Attributes:
        entries: The files to use, sorted by id. Their roles are ``train``, ``validation`` or None.
        skipped: Files and folders that are not used.
        splits: The splits, without their hours.
        notes: Sentences that warn the user.
    """

    entries: list[FoundFile]
    skipped: list[Skipped]
    splits: list[SplitSummary]
    notes: list[str]


def find_audio(path: Path, train: Sequence[str] | None, validation: Sequence[str] | None) -> FoundCorpus:
    """Find the audio files of a corpus without opening them.

    Args:
        path: Folder or manifest; see `index_corpus`.
        train: Names of the splits to train on. None chooses by name.
        validation: Names of the splits to validate on. None chooses by name.

    Raises:
        ValueError: The corpus doesn't exist, has no audio, lacks a split, or it is ambiguous which splits its files belong to.
    """
    skipped: list[Skipped] = []
    notes: list[str] = []
    if path.is_dir():
        found = _find_in_folder(path, skipped, train, validation)
    elif path.is_file():
        found = find_in_manifest(path, notes)
    else:
        raise ValueError(f"there is no corpus at {path}; give a folder of audio or a .csv or .parquet manifest")
    if not found:
        others = Counter(skip.path.suffix.lower() for skip in skipped if skip.reason == "unsupported_format")
        also = (
            f" ({', '.join(f'{n} {suffix}' for suffix, n in sorted(others.items()))} files can't be decoded)"
            if others
            else ""
        )
        raise ValueError(f"{path} contains no audio{also}; audio files end in {', '.join(SUFFIXES)}")
    used, unused, splits = assign_splits(found, train, validation, path)
    skipped += unused
    entries: dict[str, FoundFile] = {}
    for entry in sorted(used, key=lambda entry: (entry.id, str(entry.path))):
        first = entries.setdefault(entry.id, entry)
        if first is not entry:
            message = f"{entry.path} has the same id as {first.path}: {entry.id!r}"
            skipped.append(Skipped(entry.path, "duplicate_id", message))
    doubtful = [
        entry.path
        for entry in entries.values()
        if entry.split in (None, NO_SPLIT) and any(kinds(word) - {"train"} for word in _words_of(entry.path, path))
    ]
    if doubtful:
        notes.append(
            f"the paths of {len(doubtful)} files look like test or validation data, such as {doubtful[0]}, but nothing else says so, "
            "and they are used for training; move them to a folder named test or dev, or add a column split to the manifest"
        )
    return FoundCorpus(list(entries.values()), skipped, splits, notes)


def _words_of(file: Path, corpus: Path) -> tuple[str, ...]:
    """Return the parts of a file's path that may say what it is for."""
    if corpus.is_dir():
        return (file.stem,)  # The folders were considered before.
    name = file.relative_to(corpus.parent) if file.is_relative_to(corpus.parent) else file
    return (*name.parts[:-1], name.stem)


def _find_in_folder(
    path: Path, skipped: list[Skipped], train: Sequence[str] | None, validation: Sequence[str] | None
) -> list[FoundFile]:
    walked = _walk(path, skipped)
    files = []
    for file in walked.audio:
        if _is_text(str(file)):
            files.append(file)
        else:
            skipped.append(Skipped(file, "bad_name", "the file's name is not valid UTF-8"))
    names = [file.relative_to(path) for file in files]
    wanted = [*(train or []), *(validation or [])]
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
    files: list[Path], names: list[Path], wanted: list[str], skipped: list[Skipped]
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


def _walk(path: Path, skipped: list[Skipped]) -> _Walked:
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

    for folder, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        folders.sort()
        real = Path(folder).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        audio = {Path(name).stem for name in names if name.lower().endswith(SUFFIXES)}
        for name in sorted(names):
            file = Path(folder) / name
            suffix = file.suffix.lower()
            if name.lower().endswith(SUFFIXES):
                walked.audio.append(file)
            elif suffix in UNSUPPORTED:
                message = (
                    f"{file} can't be decoded, since libsndfile doesn't read {suffix} files; convert it to flac or wav"
                )
                skipped.append(Skipped(file, "unsupported_format", message))
            elif suffix in _LISTS and file.stem not in audio and kinds(file.stem) - {"train"}:
                walked.lists.append(file)
    walked.audio.sort()
    return walked


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


def count_files(found: FoundCorpus) -> dict[str, int]:
    """Return the number of files of each split, ``train`` and ``validation``; of ``all`` if some of them are to be held out."""
    counts = Counter(entry.role for entry in found.entries)
    if not counts["validation"]:
        return {"all": len(found.entries)}
    return {split: counts[split] for split in ("train", "validation")}
