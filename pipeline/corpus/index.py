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
import pyarrow.parquet as pq

from ray_distill.pipeline.corpus.found import FoundFile, Skipped
from ray_distill.pipeline.corpus.search import find_audio
from ray_distill.pipeline.corpus.splits import NO_SPLIT, SplitSummary
from ray_distill.teacher_cache.audio import AudioError, load_identified_audio
from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from ray_distill.teacher_cache.storage.shard_plan import Utterance

INDEX = "index.parquet"
SKIPPED = "skipped.csv"
STATE = "state.json"
_SCHEMA = 3
_EARLIER_SCHEMAS = (2,)
"""Versions whose indexes are still used. In version 2, ``sha256`` is the hash of the resampled waveform; see `is_earlier_hash`."""


@dataclass(frozen=True)
class CorpusIndex:
    """The usable and the skipped files of a corpus.

    Attributes:
        utterances: Utterances, sorted by id.
        skipped: Skipped files and folders, sorted by path, including the files of unused splits.
        reused: Whether an earlier index was still valid, so that nothing was decoded.
        splits: The splits that were found. Empty if the index was only loaded.
        notes: Sentences that warn the user. Empty if the index was only loaded.
    """

    utterances: list[Utterance]
    skipped: list[Skipped]
    reused: bool = False
    splits: tuple[SplitSummary, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_unused(self) -> int:
        """Number of files of splits that are neither for training nor for validation."""
        return sum(skip.reason == "unused_split" for skip in self.skipped)

    @property
    def hours(self) -> float:
        """Duration of the utterances, in hours."""
        return sum(utterance.num_samples for utterance in self.utterances) / SAMPLE_RATE / 3600

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, splits and identities of the audio, which is equal for equal audio, wherever it is stored and indexed.

        All of it is exact: `load_identified_audio` gives identities that rounding can't change.
        """
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
      start at the manifest's folder. Columns that select parts of files, such as ``start``, are refused.
    - A folder with files ``SPLIT/SPEAKER/CHAPTER/*.flac`` has LibriSpeech's layout. Its top-level folders are the splits, and the file
      stems are the ids.
    - Any other folder is searched for audio that libsndfile decodes. The ids are the relative paths without suffix, or with it if two
      files differ only in their suffix. The splits are the folders, at any depth, whose names have one of the words below; files of
      LibriSpeech below them keep their ids. If no folder has such a name, the corpus has no splits.

    By default, splits with a word that begins with "train" are for training, and those with "dev", "devel", "development", "val",
    "valid", "validation" or "heldout" for validation, in upper or lower case. Splits with a word that begins with "test" or "eval",
    and all others, are not used unless they are named. Their files are in ``skipped``. Two such words in a path, or files outside
    the splits' folders, are refused, unless the arguments say what they are. If no split is for validation, the files with the
    smallest hashes of their ids are held out.

    Args:
        path: Folder or manifest.
        train_splits: Names of the splits to train on, or of any other folders; "." means the files in no split's folder. Default:
            None, which chooses by name.
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
        ValueError: The path does not exist, it has no audio, a requested split does not exist, the splits are ambiguous, or no usable
            file is left for training or validation.
    """
    path = path.absolute()
    found = find_audio(path, train_splits, validation_splits)
    entries, skipped = found.entries, list(found.skipped)
    settings = [validation_fraction, min_seconds, max_seconds]
    state = _state(_SCHEMA, entries, skipped, settings)
    stored = (output / STATE).read_text() if all((output / name).is_file() for name in (INDEX, SKIPPED, STATE)) else ""
    if stored == state or any(
        stored == _state(schema, entries, skipped, settings) for schema in _EARLIER_SCHEMAS if stored
    ):
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
        if not any(entry.role == "validation" for entry in entries):
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
    return replace(index, splits=_summarise(found.splits, entries, index.utterances), notes=tuple(found.notes))


def _summarise(
    splits: list[SplitSummary], entries: list[FoundFile], utterances: list[Utterance]
) -> tuple[SplitSummary, ...]:
    """Add the hours of the usable files to the splits that are used, and say from which ones a part is held out."""
    name_of = {entry.id: entry.split or NO_SPLIT for entry in entries}
    samples: Counter[str] = Counter()
    for utterance in utterances:
        samples[name_of[utterance.id]] += utterance.num_samples
    held_out = not any(entry.role == "validation" for entry in entries)
    return tuple(
        replace(
            split,
            hours=None if split.role == "not used" else samples[split.name] / SAMPLE_RATE / 3600,
            role="train and validation" if held_out and split.role == "train" else split.role,
        )
        for split in splits
    )


def _hold_out(utterances: list[Utterance], fraction: float) -> list[Utterance]:
    """Move the utterances with the smallest hashes of their ids to the validation split: at least one, but never all.

    The choice depends neither on the order of the utterances nor on their number, beyond how many are held out.
    """
    count = min(max(1, round(fraction * len(utterances))), len(utterances) - 1)
    by_hash = sorted(utterances, key=lambda utterance: hashlib.sha256(utterance.id.encode()).digest())
    return [replace(u, split="validation" if n < count else "train") for n, u in enumerate(by_hash)]


def _state(schema: int, entries: list[FoundFile], skipped: list[Skipped], settings: list[float]) -> str:
    """Return a hash of everything that an index of a version depends on."""
    files: list[object] = []
    for entry in entries:
        try:
            stat = entry.path.stat()
            files.append([entry.id, str(entry.path), entry.role, stat.st_size, stat.st_mtime_ns])
        except OSError:
            files.append([entry.id, str(entry.path), entry.role, "missing"])
    content = [schema, files, [[str(skip.path), skip.reason] for skip in skipped], settings]
    return json.dumps({"sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()})


def _decode(entry: FoundFile, min_seconds: float, max_seconds: float) -> Utterance | Skipped:
    if not os.path.isfile(entry.path):  # noqa: PTH113 (Path.is_file raises if a parent folder can't be searched)
        return Skipped(entry.path, "missing", f"{entry.path} does not exist or is not a file")
    try:
        waveform, identity = load_identified_audio(entry.path, max_seconds)
        if len(waveform) < min_seconds * SAMPLE_RATE:
            raise AudioError("too_short", f"{entry.path} is shorter than {min_seconds} s")
    except AudioError as error:
        return Skipped(entry.path, error.reason, str(error))
    return Utterance(entry.id, str(entry.path), len(waveform), entry.role or "train", identity)


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
