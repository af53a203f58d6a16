"""The corpus index: every audio file of a corpus, decoded once, as an utterance or with the reason why it was skipped."""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ray_distill.teacher_cache.audio import AudioError, load_audio
from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from ray_distill.teacher_cache.storage.shard_plan import Utterance

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
TRAIN_PREFIXES = ("train",)
VALIDATION_PREFIXES = ("dev", "heldout", "valid")

INDEX = "index.parquet"
SKIPPED = "skipped.csv"
STATE = "state.json"
_SCHEMA = 1


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
class CorpusIndex:
    """The usable and the skipped files of a corpus.

    Attributes:
        utterances: Utterances, sorted by id.
        skipped: Skipped files and folders, sorted by path.
        reused: Whether an earlier index was still valid, so that nothing was decoded.
    """

    utterances: list[Utterance]
    skipped: list[Skipped]
    reused: bool = False

    @property
    def hours(self) -> float:
        """Duration of the utterances, in hours."""
        return sum(utterance.num_samples for utterance in self.utterances) / SAMPLE_RATE / 3600

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, splits and sample hashes, which is equal for equal audio, wherever it is stored."""
        digest = hashlib.sha256()
        for u in sorted(self.utterances, key=lambda utterance: utterance.id):
            digest.update(json.dumps([u.id, u.split, u.sha256]).encode())
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "CorpusIndex":
        """Read the index that `index_corpus` wrote to its output folder.

        Audio files that were removed since then are not noticed here, but when their audio is read.

        Raises:
            ValueError: The folder has no complete index.
        """
        try:
            table = pq.read_table(folder / INDEX)
            with (folder / SKIPPED).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                skipped = [Skipped(Path(row["path"]), row["reason"], row["message"]) for row in csv.DictReader(file)]
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{folder} has no complete corpus index; run the index stage first") from error
        utterances = [Utterance(**row) for row in table.to_pylist()]
        return cls(utterances, skipped, reused=True)


@dataclass(frozen=True)
class _Entry:
    """A file that was found but not decoded yet.

    Attributes:
        id: ID of the utterance.
        path: Path of the file.
        split: Name of a split of the corpus, and after `_take_splits` ``train`` or ``validation``. None if the corpus has no splits.
    """

    id: str
    path: Path
    split: str | None


def index_corpus(
    path: Path,
    *,
    train_splits: Sequence[str] | None = None,
    validation_splits: Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    min_seconds: float = RECEPTIVE_FIELD / SAMPLE_RATE,
    max_seconds: float = 40.0,
    output: Path,
    progress: Callable[[int, int], object] | None = None,
) -> CorpusIndex:
    """Find, decode and list the audio of a corpus.

    Three kinds of corpus are recognised:

    - A file is a manifest: ``.csv`` or ``.parquet`` with a column ``path`` and optional columns ``id`` and ``split``. Relative paths
      start at the manifest's folder.
    - A folder with files ``SPLIT/SPEAKER/CHAPTER/*.flac`` has LibriSpeech's layout. Its top-level folders are the splits, and the file
      stems are the ids.
    - Any other folder is searched for wav, flac, ogg and mp3 files. The ids are the relative paths without suffix, or with it if two
      files differ only in their suffix.

    By default, splits whose names start with "train" are for training, and those that start with "dev", "heldout" or "valid" for
    validation. If no split is for validation, the files with the smallest hashes of their ids are held out.

    Args:
        path: Folder or manifest.
        train_splits: Names of the splits to train on. Default: None, which chooses by name.
        validation_splits: Names of the splits to validate on. Default: None, which chooses by name.
        validation_fraction: Fraction of the files to hold out if no split is for validation; at least one file is held out.
            Default: 0.05.
        min_seconds: Shortest audio in seconds; shorter files are skipped. Default: 400 samples (25 ms, one frame), also the minimum.
        max_seconds: Longest audio in seconds; longer files are skipped. Default: 40.
        output: Folder to write ``index.parquet`` and ``skipped.csv`` (path, reason, message) to. If it contains an index of the same
            files (by path, size and modification time) that was made with the same arguments, that index is returned.
        progress: Called as ``progress(done, total)`` while files are decoded. Default: None.

    Returns:
        The index. Each file that was found is in ``utterances`` or in ``skipped``. Folders that can't be read are in ``skipped``.

    Raises:
        ValueError: The path does not exist, it has no audio, a requested split does not exist, or no usable file is left for
            training or validation.
    """
    path = path.absolute()
    entries, skipped = _find(path, train_splits, validation_splits)
    state = _state(entries, skipped, [validation_fraction, min_seconds, max_seconds])
    if all((output / name).is_file() for name in (INDEX, SKIPPED, STATE)) and (output / STATE).read_text() == state:
        index = CorpusIndex.load(output)
        if progress is not None:
            progress(len(entries), len(entries))
    else:
        utterances: list[Utterance] = []
        # Decoding and hashing release the GIL.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda entry: _decode(entry, min_seconds, max_seconds), entries)
            for done, result in enumerate(results, 1):
                if isinstance(result, Utterance):
                    utterances.append(result)
                else:
                    skipped.append(result)
                if progress is not None:
                    progress(done, len(entries))
        if not any(entry.split == "validation" for entry in entries):
            utterances = _hold_out(utterances, validation_fraction)
        index = CorpusIndex(
            sorted(utterances, key=lambda utterance: utterance.id), sorted(skipped, key=lambda skip: str(skip.path))
        )
        _save(index, state, output)
    for split in ("train", "validation"):
        if not any(utterance.split == split for utterance in index.utterances):
            counts = Counter(skip.reason for skip in index.skipped)
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"
            raise ValueError(
                f"no usable audio is left for the {split} split of {path} (files skipped: {why}; they are listed in "
                f"{output / SKIPPED}); add audio or choose other splits"
            )
    return index


def _find(
    path: Path, train: Sequence[str] | None, validation: Sequence[str] | None
) -> tuple[list[_Entry], list[Skipped]]:
    skipped: list[Skipped] = []
    if path.is_dir():
        found = _find_in_folder(path, skipped)
    elif path.is_file():
        found = _find_in_manifest(path)
    else:
        raise ValueError(f"there is no corpus at {path}; give a folder of audio or a .csv or .parquet manifest")
    if not found:
        raise ValueError(f"{path} contains no audio; audio files end in {', '.join(SUFFIXES)}")
    found = _take_splits(found, train, validation, path)
    entries: dict[str, _Entry] = {}
    for entry in sorted(found, key=lambda entry: (entry.id, str(entry.path))):
        first = entries.setdefault(entry.id, entry)
        if first is not entry:
            message = f"{entry.path} has the same id as {first.path}: {entry.id!r}"
            skipped.append(Skipped(entry.path, "duplicate_id", message))
    return list(entries.values()), skipped


def _find_in_folder(path: Path, skipped: list[Skipped]) -> list[_Entry]:
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
                entries.append(_Entry(file.stem, file, name.parts[0]))
            else:
                skipped.append(Skipped(file, "no_split", f"{file} is in none of the splits' folders"))
        return entries
    stems = [name.with_suffix("").as_posix() for name in relative]
    counts = Counter(stems)
    return [
        _Entry(stem if counts[stem] == 1 else name.as_posix(), file, None)
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


def _find_in_manifest(path: Path) -> list[_Entry]:
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
    return [_Entry(id, file, split) for id, file, split in zip(ids, files, splits, strict=True)]


def _take_splits(
    found: list[_Entry], train: Sequence[str] | None, validation: Sequence[str] | None, path: Path
) -> list[_Entry]:
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
    return [_Entry(entry.id, entry.path, role[entry.split]) for entry in found if entry.split in role]


def _hold_out(utterances: list[Utterance], fraction: float) -> list[Utterance]:
    """Move the utterances with the smallest hashes of their ids to the validation split: at least one, but never all.

    The choice depends neither on the order of the utterances nor on their number, beyond how many are held out.
    """
    count = min(max(1, round(fraction * len(utterances))), len(utterances) - 1)
    by_hash = sorted(utterances, key=lambda utterance: hashlib.sha256(utterance.id.encode()).digest())
    return [replace(u, split="validation" if n < count else "train") for n, u in enumerate(by_hash)]


def _state(entries: list[_Entry], skipped: list[Skipped], settings: list[float]) -> str:
    """Return a hash of everything that the index depends on."""
    files: list[object] = []
    for entry in entries:
        try:
            stat = entry.path.stat()
            files.append([entry.id, str(entry.path), entry.split, stat.st_size, stat.st_mtime_ns])
        except OSError:
            files.append([entry.id, str(entry.path), entry.split, "missing"])
    content = [_SCHEMA, files, [[str(skip.path), skip.reason] for skip in skipped], settings]
    return json.dumps({"sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()})


def _decode(entry: _Entry, min_seconds: float, max_seconds: float) -> Utterance | Skipped:
    if not os.path.isfile(entry.path):  # noqa: PTH113 (Path.is_file raises if a parent folder can't be searched)
        return Skipped(entry.path, "missing", f"{entry.path} does not exist or is not a file")
    try:
        waveform = load_audio(entry.path, max_seconds)
        if len(waveform) < min_seconds * SAMPLE_RATE:
            raise AudioError("too_short", f"{entry.path} is shorter than {min_seconds} s")
    except AudioError as error:
        return Skipped(entry.path, error.reason, str(error))
    digest = hashlib.sha256(waveform.tobytes()).hexdigest()
    return Utterance(entry.id, str(entry.path), len(waveform), entry.split or "train", digest)


def _save(index: CorpusIndex, state: str, output: Path) -> None:
    """Write the index atomically: each file is renamed into place, and the state that validates them exists only at the end."""
    output.mkdir(parents=True, exist_ok=True)
    (output / STATE).unlink(missing_ok=True)
    schema = pa.schema(
        [("id", "string"), ("path", "string"), ("num_samples", "int64"), ("split", "string"), ("sha256", "string")]
    )
    rows = [asdict(utterance) for utterance in index.utterances]
    temporary = output / f"{INDEX}.tmp"
    pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
    temporary.replace(output / INDEX)
    report = io.StringIO(newline="")
    writer = csv.writer(report)
    writer.writerow(["path", "reason", "message"])
    writer.writerows([str(skip.path), skip.reason, skip.message] for skip in index.skipped)
    for name, text in ((SKIPPED, report.getvalue()), (STATE, state)):
        temporary = output / f"{name}.tmp"
        temporary.write_bytes(text.encode(errors="surrogateescape"))
        temporary.replace(output / name)


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
    entries, _ = _find(path.absolute(), train_splits, validation_splits)
    counts = Counter(entry.split for entry in entries)
    if not counts["validation"]:
        return {"all": len(entries)}
    return {split: counts[split] for split in ("train", "validation")}
