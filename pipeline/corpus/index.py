"""The corpus index: all audio of a corpus, decoded once, as utterances or with the reason why it was skipped."""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.pipeline.corpus.decoding import Limits, LongAudio, decode
from ray_distill.pipeline.corpus.duplicates import duplicate_notes
from ray_distill.pipeline.corpus.found import FoundFile, Skipped
from ray_distill.pipeline.corpus.labels import label_of, write_labels
from ray_distill.pipeline.corpus.search import find_audio
from ray_distill.pipeline.corpus.splits import NO_SPLIT, SplitSummary
from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from ray_distill.teacher_cache.sources.address import Channel
from ray_distill.teacher_cache.storage.shard_plan import Utterance

INDEX = "index.parquet"
SKIPPED = "skipped.csv"
STATE = "state.json"
_NOTES = b"notes"
"""Key of the notes in the metadata of ``index.parquet``, a JSON array."""
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
        notes: Sentences that warn the user. If the index was only loaded, those about its audio.
        format: Name of the corpus's format. Empty if the index was only loaded.
        transcripts: Number of utterances with a transcript. 0 if the index was only loaded.
        speakers: Number of speakers that the corpus names. 0 if the index was only loaded.
    """

    utterances: list[Utterance]
    skipped: list[Skipped]
    reused: bool = False
    splits: tuple[SplitSummary, ...] = ()
    notes: tuple[str, ...] = ()
    format: str = ""
    transcripts: int = 0
    speakers: int = 0

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
        notes = json.loads((table.schema.metadata or {}).get(_NOTES, b"[]"))
        return cls(utterances, skipped, reused=True, notes=tuple(notes))


def index_corpus(
    path: Path,
    *,
    train_splits: Sequence[str] | None = None,
    validation_splits: Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    min_seconds: float = RECEPTIVE_FIELD / SAMPLE_RATE,
    max_seconds: float = 40.0,
    format: str | None = None,
    channel: Channel | None = None,
    long_audio: LongAudio = "skip",
    output: Path,
    progress: Callable[[int, int], object] | None = None,
) -> CorpusIndex:
    """Find, decode and list the audio of a corpus.

    The formats are in `ray_distill.pipeline.corpus.formats`. They are told apart by looking: a folder of audio, in LibriSpeech's
    layout or any other; a manifest; or the files of NeMo, fairseq, Kaldi, Lhotse, Hugging Face datasets, WebDataset, Common Voice
    or VoxPopuli. An utterance is a file, audio inside a file, or a piece of one.

    By default, splits with a word that begins with "train" are for training, and those with "dev", "devel", "development", "val",
    "valid", "validation" or "heldout" for validation, in upper or lower case. Splits with a word that begins with "test" or "eval",
    and all others, are not used unless they are named. Their files are in ``skipped``. Two such words in a path, or files outside
    the splits' folders, are refused, unless the arguments say what they are. If no split is for validation, the utterances with
    the smallest hashes of their ids are held out.

    Args:
        path: The corpus, a folder or a file.
        train_splits: Names of the splits to train on, or of any other folders; "." means the files in no split's folder. Default:
            None, which chooses by name.
        validation_splits: Names of the splits to validate on. Default: None, which chooses by name.
        validation_fraction: Fraction of the utterances to hold out if no split is for validation; at least one is held out.
            Default: 0.05.
        min_seconds: Shortest utterance in seconds; shorter ones are skipped. Default: 400 samples (25 ms, one frame), also the
            minimum.
        max_seconds: Longest utterance in seconds. Default: 40.
        format: Name of the corpus's format. Default: None, which looks.
        channel: Channel to use where the corpus names none, counted from 0, or ``mix`` for the mean of all. Default: None, also the
            mean, with a note that says how many utterances have several channels.
        long_audio: ``skip`` audio that is longer than ``max_seconds``, or ``cut`` it at pauses into windows that cover it exactly.
            Default: ``skip``.
        output: Folder to write ``index.parquet``, ``skipped.csv`` (path, reason, message) and, if the corpus has transcripts or
            speakers, ``labels.parquet`` (id, speaker, text) to. If it contains an index of the same files (by path, size and
            modification time) that was made with the same arguments, that index is returned.
        progress: Called as ``progress(done, total)`` while files are decoded. Default: None.

    Returns:
        The index. All audio that was found is in ``utterances`` or in ``skipped``. Folders that can't be read are in ``skipped``.

    Raises:
        ValueError: The path does not exist, the format is damaged, there is no audio, a requested split does not exist, the splits
            are ambiguous, or no usable audio is left for training or validation.
    """
    path = path.absolute()
    found = find_audio(path, train_splits, validation_splits, format=format)
    entries, skipped = found.entries, list(found.skipped)
    settings: list[object] = [validation_fraction, min_seconds, max_seconds]
    if channel is not None or long_audio != "skip":  # Indexes of earlier versions stay valid.
        settings += [channel, long_audio]
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
        limits = Limits(min_seconds, max_seconds, channel, long_audio)
        totals: Counter[str] = Counter()
        # Neighbours in a file are decoded one after the other. Decoding and hashing release the GIL.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda entry: decode(entry, limits), sorted(entries, key=_place))
            for done, result in enumerate(results, 1):
                kept = [item for item in result.results if isinstance(item, Utterance)]
                left_out = [item for item in result.results if isinstance(item, Skipped)]
                utterances += kept
                skipped += left_out
                totals["entries"] += 1
                totals["mixed"] += result.mixed
                if result.cut:
                    totals.update(cut=1, windows=len(kept), skipped_windows=len(left_out))
                totals["too_long"] += any(item.reason == "too_long" for item in left_out)
                if progress is not None:
                    progress(done, len(entries))
        if not any(entry.role == "validation" for entry in entries):
            utterances = _hold_out(utterances, validation_fraction)
        utterances.sort(key=lambda utterance: utterance.id)
        index = CorpusIndex(
            utterances,
            sorted(skipped, key=lambda skip: str(skip.path)),
            notes=_notes(totals, max_seconds)
            + duplicate_notes(
                [u.sha256 for u in utterances], [u.split for u in utterances], [u.id for u in utterances]
            ),
        )
        _save(index, state, output)
    for split in ("train", "validation"):
        if not any(utterance.split == split for utterance in index.utterances):
            counts = Counter(skip.reason for skip in index.skipped)
            first = next((skip.message for skip in index.skipped if skip.reason == counts.most_common(1)[0][0]), "")
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"
            raise ValueError(
                f"no usable audio is left for the {split} split of {path} (files skipped: {why}; they are listed in "
                f"{output / SKIPPED}{f'; one of them: {first}' if first else ''}); add audio or choose other splits"
            )
    by_id = {entry.id: entry for entry in entries}
    labels = ((utterance.id, label_of(_entry_of(utterance, by_id))) for utterance in index.utterances)
    transcripts, speakers = write_labels(output, labels)
    return replace(
        index,
        splits=_summarise(found.splits, entries, index.utterances),
        notes=(*found.notes, *index.notes),
        format=found.format,
        transcripts=transcripts,
        speakers=speakers,
    )


def _place(entry: FoundFile) -> tuple[str, int, int, float]:
    """Return a key that sorts entries as they follow one another in their files."""
    inside = entry.inside
    offset, row = (0, 0) if inside is None else (inside.offset or 0, inside.row or 0)
    return str(entry.path), row, offset, entry.start or 0.0


def _notes(totals: Mapping[str, int], max_seconds: float) -> tuple[str, ...]:
    """Return what a user should know about the audio, from numbers of entries and of windows of long ones."""
    notes = []
    if mixed := totals["mixed"]:
        notes.append(
            f"{mixed:,} of {totals['entries']:,} utterances have several channels, and the mean of them is used; if each channel has "
            "its own speaker, set corpus.channel to the number of one, counted from 0, and otherwise to mix, so that this is not said "
            "again"
        )
    if cut := totals["cut"]:
        notes.append(
            f"{cut:,} {'recording' if cut == 1 else 'recordings'} longer than {max_seconds:g} s {'was' if cut == 1 else 'were'} cut "
            f"into {totals['windows']:,} utterances, and {totals['skipped_windows']:,} windows were skipped"
        )
    if long := totals["too_long"]:
        notes.append(
            f"{long:,} {'recording' if long == 1 else 'recordings'} longer than {max_seconds:g} s {'was' if long == 1 else 'were'} "
            "skipped; set corpus.long_audio=cut to cut them at pauses"
        )
    return tuple(notes)


def _entry_of(utterance: Utterance, entries: Mapping[str, FoundFile]) -> FoundFile:
    """Return the entry of an utterance. A window's has the transcript left out, since it belongs to the whole recording."""
    entry = entries.get(utterance.id)
    if entry is None:
        recording = entries[re.sub(r"_\d{5,}\.\d\d_\d{5,}\.\d\d$", "", utterance.id)]
        entry = replace(recording, text="", speaker=label_of(recording).speaker, start=recording.start or 0.0)
    return entry


def _summarise(
    splits: list[SplitSummary], entries: list[FoundFile], utterances: list[Utterance]
) -> tuple[SplitSummary, ...]:
    """Add the hours of the usable files to the splits that are used, and say from which ones a part is held out."""
    by_id = {entry.id: entry for entry in entries}
    samples: Counter[str] = Counter()
    for utterance in utterances:
        samples[_entry_of(utterance, by_id).split or NO_SPLIT] += utterance.num_samples
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


def _state(schema: int, entries: list[FoundFile], skipped: list[Skipped], settings: list[object]) -> str:
    """Return a hash of everything that an index of a version depends on."""
    files: list[object] = []
    known: dict[Path, list[object]] = {}
    for entry in entries:
        if entry.path not in known:
            try:
                stat = entry.path.stat()
                known[entry.path] = [stat.st_size, stat.st_mtime_ns]
            except OSError:
                known[entry.path] = ["missing"]
        files.append([entry.id, str(entry.path), entry.role, *known[entry.path]])
        piece = [entry.start, entry.end, entry.channel, entry.inside and entry.inside.encode()]
        if piece != [None] * 4:
            files.append(piece)
    content = [schema, files, [[str(skip.path), skip.reason] for skip in skipped], settings]
    return json.dumps({"sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()})


def _save(index: CorpusIndex, state: str, output: Path) -> None:
    """Write the index atomically: each file is renamed into place, and the state that validates them exists only at the end."""
    output.mkdir(parents=True, exist_ok=True)
    (output / STATE).unlink(missing_ok=True)
    schema = pa.schema(
        [("id", "string"), ("path", "string"), ("num_samples", "int64"), ("split", "string"), ("sha256", "string")]
    )
    if index.notes:
        schema = schema.with_metadata({_NOTES: json.dumps(index.notes)})
    rows = [asdict(utterance) for utterance in index.utterances]
    temporary = output / f"{INDEX}.tmp"
    pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
    temporary.replace(output / INDEX)
    report = io.StringIO(newline="")
    writer = csv.writer(report)
    writer.writerow(["path", "reason", "message"])
    writer.writerows([skip.place, skip.reason, skip.message] for skip in index.skipped)
    for name, text in ((SKIPPED, report.getvalue()), (STATE, state)):
        temporary = output / f"{name}.tmp"
        temporary.write_bytes(text.encode(errors="surrogateescape"))
        temporary.replace(output / name)
