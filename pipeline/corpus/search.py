"""Search for the audio files of a corpus: in a manifest, in LibriSpeech's layout, or in any folder."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
TRAIN_PREFIXES = ("train",)
VALIDATION_PREFIXES = ("dev", "heldout", "valid")


@dataclass(frozen=True)
class Skipped:
    """A file or folder that can't be used.

    Attributes:
        path: Path of the file or folder.
        reason: ``undecodable``, ``empty``, ``too_short``, ``too_long``, ``missing``, ``duplicate_id``, ``no_split``,
            ``bad_name`` or ``unreadable_folder``.
        message: The reason as a sentence.
    """

    path: Path
    reason: str
    message: str


@dataclass(frozen=True)
class FoundFile:
    """A file that was found but not decoded yet.

    Attributes:
        id: ID of the utterance.
        path: Path of the file.
        split: Name of a split of the corpus, and after `assign_splits` ``train`` or ``validation``. None if the corpus has no splits.
    """

    id: str
    path: Path
    split: str | None


def find_audio(
    path: Path, train: Sequence[str] | None, validation: Sequence[str] | None
) -> tuple[list[FoundFile], list[Skipped]]:
    """Find the audio files of a corpus without opening them.

    Args:
        path: Folder or manifest; see `index_corpus`.
        train: Names of the splits to train on. None chooses by name.
        validation: Names of the splits to validate on. None chooses by name.

    Returns:
        The files to use, sorted by id, whose splits are ``train``, ``validation`` or None; and the skipped files and folders.

    Raises:
        ValueError: The corpus doesn't exist, has no audio, or lacks a split.
    """
    skipped: list[Skipped] = []
    if path.is_dir():
        found = _find_in_folder(path, skipped)
    elif path.is_file():
        found = _find_in_manifest(path)
    else:
        raise ValueError(f"there is no corpus at {path}; give a folder of audio or a .csv or .parquet manifest")
    if not found:
        raise ValueError(f"{path} contains no audio; audio files end in {', '.join(SUFFIXES)}")
    found = assign_splits(found, train, validation, path)
    entries: dict[str, FoundFile] = {}
    for entry in sorted(found, key=lambda entry: (entry.id, str(entry.path))):
        first = entries.setdefault(entry.id, entry)
        if first is not entry:
            message = f"{entry.path} has the same id as {first.path}: {entry.id!r}"
            skipped.append(Skipped(entry.path, "duplicate_id", message))
    return list(entries.values()), skipped


def _find_in_folder(path: Path, skipped: list[Skipped]) -> list[FoundFile]:
    files = []
    for file in _walk(path, skipped):
        if _is_text(str(file)):
            files.append(file)
        else:
            skipped.append(Skipped(file, "bad_name", "the file's name is not valid UTF-8"))
    relative = [file.relative_to(path) for file in files]
    if any(_is_librispeech(file) for file in relative):
        entries = []
        for file, name in zip(files, relative, strict=True):
            if len(name.parts) > 1:
                entries.append(FoundFile(file.stem, file, name.parts[0]))
            else:
                skipped.append(Skipped(file, "no_split", f"{file} is in none of the splits' folders"))
        return entries
    stems = [name.with_suffix("").as_posix() for name in relative]
    counts = Counter(stems)
    return [
        FoundFile(stem if counts[stem] == 1 else name.as_posix(), file, None)
        for stem, name, file in zip(stems, relative, files, strict=True)
    ]


def _walk(path: Path, skipped: list[Skipped]) -> list[Path]:
    """Return the audio files below a folder, sorted.

    Links to folders are followed, because corpora are often assembled from links. Each folder is visited once. Folders below the
    path that can't be read are added to ``skipped``.

    Raises:
        ValueError: The path itself can't be read.
    """
    files, seen = [], set()

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
        files += [Path(folder) / name for name in names if name.lower().endswith(SUFFIXES)]
    return sorted(files)


def _is_librispeech(name: Path) -> bool:
    """Return whether a relative path has the form SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac."""
    parts = name.parts
    return len(parts) == 4 and name.suffix == ".flac" and name.stem.startswith(f"{parts[1]}-{parts[2]}-")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_in_manifest(path: Path) -> list[FoundFile]:
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
        elif path.suffix.lower() == ".csv":
            # All columns are read as text, so that an id such as 0012 keeps its zeros.
            header = next(csv.reader([path.open(encoding="utf-8-sig").readline()]), [])
            options = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in header})
            table = pyarrow.csv.read_csv(path, convert_options=options)
        else:
            raise ValueError(f"{path} is neither a folder of audio nor a .csv or .parquet manifest")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"the manifest {path} can't be read ({str(error).splitlines()[0]})") from error
    if "path" not in table.column_names:
        raise ValueError(
            f"the manifest {path} has no column 'path'; its columns are {', '.join(table.column_names) or 'none'}"
        )
    columns = {}
    for name in {"path", "id", "split"} & set(table.column_names):
        try:
            columns[name] = pc.cast(table[name], pa.string()).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"the column {name!r} of the manifest {path} must contain text") from error
        if not all(columns[name]):
            row = next(n for n, value in enumerate(columns[name], 1) if not value)
            raise ValueError(f"row {row} of the manifest {path} has no {name}; fill it in, or remove the row")
    files = [path.parent / file for file in columns["path"]]
    ids = columns.get("id") or [Path(file).with_suffix("").as_posix() for file in columns["path"]]
    splits = columns.get("split") or [None] * len(files)
    return [FoundFile(id, file, split) for id, file, split in zip(ids, files, splits, strict=True)]


def assign_splits(
    found: list[FoundFile], train: Sequence[str] | None, validation: Sequence[str] | None, path: Path
) -> list[FoundFile]:
    """Replace the names of splits by ``train`` and ``validation``, and drop the files of other splits."""
    names = sorted({entry.split for entry in found if entry.split is not None})
    wanted = [*(train or []), *(validation or [])]
    if not names:
        if wanted:
            raise ValueError(
                f"{path} has no splits, so {wanted[0]!r} can't be one; remove corpus.train_splits and corpus.validation_splits"
            )
        return found
    for name in wanted:
        if name not in names:
            raise ValueError(f"{path} has no split {name!r}; its splits are {', '.join(names)}")
    both = sorted(set(train or []) & set(validation or []))
    if both:
        raise ValueError(
            f"the split {both[0]!r} can't be used for both training and validation; remove it from one of them"
        )
    if validation is None:
        validation = [name for name in names if name.startswith(VALIDATION_PREFIXES) and name not in (train or [])]
    if train is None:
        train = [name for name in names if name.startswith(TRAIN_PREFIXES) and name not in validation]
        if not train:
            raise ValueError(
                f"no split of {path} starts with 'train'; set corpus.train_splits to some of {', '.join(names)}"
            )
    role = dict.fromkeys(train, "train") | dict.fromkeys(validation, "validation")
    return [FoundFile(entry.id, entry.path, role[entry.split]) for entry in found if entry.split in role]


def count_files(
    path: Path, train_splits: Sequence[str] | None = None, validation_splits: Sequence[str] | None = None
) -> dict[str, int]:
    """Count the audio files of a corpus without opening them.

    Args:
        path: Folder or manifest, as for `index_corpus`.
        train_splits: Names of the splits to train on. Default: None, which chooses by name.
        validation_splits: Names of the splits to validate on. Default: None, which chooses by name.

    Returns:
        Number of files of each split, ``train`` and ``validation``; of ``all`` if some of them are to be held out.

    Raises:
        ValueError: The corpus doesn't exist, has no audio, or lacks a split.
    """
    entries, _ = find_audio(path.absolute(), train_splits, validation_splits)
    counts = Counter(entry.split for entry in entries)
    if not counts["validation"]:
        return {"all": len(entries)}
    return {split: counts[split] for split in ("train", "validation")}
