"""The corpus index: all audio of a corpus, decoded once, as utterances or with the reason why it was skipped."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.pipeline.corpus.decoded_sources import DecodedSources, remove_parts, skipped_of, stamps_of
from ray_distill.pipeline.corpus.decoding import Limits, LongAudio
from ray_distill.pipeline.corpus.decoding_work import Decode, decode_here
from ray_distill.pipeline.corpus.duplicates import duplicate_notes
from ray_distill.pipeline.corpus.found import FoundFiles, SkippedFiles
from ray_distill.pipeline.corpus.index_files import (
    fingerprint_of,
    index_states,
    read_skipped,
    read_utterances,
    write_skipped,
    write_utterances,
)
from ray_distill.pipeline.corpus.labels import LabelCounts, audio_folder_notes, labels_of, write_labels
from ray_distill.pipeline.corpus.search import find_audio
from ray_distill.pipeline.corpus.splits import NO_SPLIT, SplitSummary
from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from ray_distill.teacher_cache.sources.address import AudioAddress, Channel
from ray_distill.teacher_cache.storage.shard_assignment import hash_order
from ray_distill.teacher_cache.storage.shard_plan import UTTERANCE_SCHEMA, Utterances
from ray_distill.whole_files import replacing

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
        labels: Numbers of transcripts, speakers and domains that the corpus has. None of them if the index was only loaded.
    """

    utterances: Utterances
    skipped: SkippedFiles
    reused: bool = False
    splits: tuple[SplitSummary, ...] = ()
    notes: tuple[str, ...] = ()
    format: str = ""
    labels: LabelCounts = LabelCounts()

    @property
    def num_unused(self) -> int:
        """Number of files of splits that are neither for training nor for validation."""
        return self.skipped.counts()["unused_split"]

    @property
    def hours(self) -> float:
        """Duration of the utterances, in hours."""
        return self.utterances.seconds / 3600

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, splits and identities of the audio, which is equal for equal audio, wherever it is stored and indexed.

        All of it is exact: `load_identified_audio` gives identities that rounding can't change.
        """
        return fingerprint_of(self.utterances)

    @classmethod
    def load(cls, folder: Path) -> "CorpusIndex":
        """Read the index that `index_corpus` wrote to its output folder.

        Audio files that were removed since then are not noticed here, but when their audio is read.

        Raises:
            ValueError: The folder has no complete index.
        """
        try:
            utterances, metadata = read_utterances(folder / INDEX)
            skipped = read_skipped(folder / SKIPPED)
        except (OSError, LookupError, pa.ArrowException) as error:
            raise ValueError(f"{folder} has no complete corpus index; run the index stage first") from error
        notes = json.loads(metadata.get(_NOTES, b"[]"))
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
    others: Sequence[Path] = (),
    decode: Decode = decode_here,
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
        output: Folder to write ``index.parquet``, ``skipped.csv`` (path, reason, message) and, if the corpus has transcripts,
            speakers or domains, ``labels.parquet`` (id, speaker, text, domain) to. If it contains an index of the same files (by path,
            size and modification time) that was made with the same arguments, that index is returned. Otherwise only files that it, or
            an interrupted call, has not decoded with the same arguments are decoded.
        others: Output folders of other indexes. What they decoded of the same corpus, with the same arguments, is not decoded again.
            Default: none.
        decode: Function that decodes the audio, such as `decode_on_ray`. The index is the same. Default: `decode_here`.
        progress: Called as ``progress(done, total)`` while files are decoded. Default: None.

    Returns:
        The index. All audio that was found is in ``utterances`` or in ``skipped``. Folders that can't be read are in ``skipped``.

    Raises:
        ValueError: The path does not exist, the format is damaged, there is no audio, a requested split does not exist, the splits
            are ambiguous, or no usable audio is left for training or validation.
    """
    path = path.absolute()
    found = find_audio(path, train_splits, validation_splits, format=format)
    entries, stamps = found.entries, stamps_of(found.entries)
    audio: list[object] = [min_seconds, max_seconds]
    if channel is not None or long_audio != "skip":  # Indexes of earlier versions stay valid.
        audio += [channel, long_audio]
    states = index_states((_SCHEMA, *_EARLIER_SCHEMAS), entries, stamps, found.skipped, [validation_fraction, *audio])
    stored = (output / STATE).read_text() if all((output / name).is_file() for name in (INDEX, SKIPPED, STATE)) else ""
    if stored in states:
        found = replace(found, skipped=SkippedFiles())  # The index has them too.
        index = CorpusIndex.load(output)
        if progress is not None:
            progress(len(entries), len(entries))
    else:
        places = _places(entries)  # Neighbours in a file are decoded one after the other.
        entries, stamps = entries.take(places), stamps[places]
        sources = DecodedSources(entries, stamps, json.dumps([_SCHEMA, *audio]), path)
        sources.add_known(output, others)
        unknown = sources.unknown
        done = len(entries) - len(unknown)
        if progress is not None and done:
            progress(done, len(entries))
        limits = Limits(min_seconds, max_seconds, channel, long_audio)
        with sources.recording(output) as record:
            for rows in decode(unknown, limits):
                record(rows)
                done += len(pc.unique(rows["source"]))
                if progress is not None:
                    progress(done, len(entries))
        results, positions = sources.results()
        skipped = SkippedFiles()
        skipped += found.skipped
        skipped += skipped_of(results)
        utterances = _utterances(results, positions, entries, validation_fraction)
        columns = [utterances.table[name] for name in ("sha256", "split", "id")]
        index = CorpusIndex(
            utterances,
            skipped.sorted_by_path(),
            notes=_notes(_totals(results, positions), max_seconds) + duplicate_notes(*columns),
        )
        _save(index, states[0], output)
        sources.save(results, output)
        remove_parts(output)
    if empty := {"train", "validation"} - set(pc.unique(index.utterances.table["split"]).to_pylist()):
        counts = index.skipped.counts()
        first = next((skip.message for skip in index.skipped if skip.reason == counts.most_common(1)[0][0]), "")
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"
        raise ValueError(
            f"no usable audio is left for the {min(empty)} split of {path} (files skipped: {why}; they are listed in "
            f"{output / SKIPPED}{f'; one of them: {first}' if first else ''}); add audio or choose other splits"
        )
    positions = _positions(index.utterances, found.entries)
    labels = write_labels(output, labels_of(index.utterances.ids(), found.entries.take(positions)))
    return replace(
        index,
        splits=_summarise(found.splits, found.entries, index.utterances.num_samples, positions),
        notes=(*found.notes, *audio_folder_notes(entry.path for entry in found.entries), *index.notes)
        if found.format == "folder"
        else (*found.notes, *index.notes),
        format=found.format,
        labels=labels,
    )


def _places(entries: FoundFiles) -> np.ndarray:
    """Return the (N,) order in which entries follow one another in their files."""
    columns = {"path": entries.texts("path"), "start": pc.fill_null(entries.table["start"].cast(pa.float64()), 0.0)}
    if entries.table["inside"].null_count < len(entries):
        inside = [AudioAddress.parse(text or "") for (text,) in entries.rows("inside")]
        columns |= {name: pa.array([getattr(at, name) or 0 for at in inside], pa.int64()) for name in ("row", "offset")}
    keys = [(name, "ascending") for name in ("path", "row", "offset", "start") if name in columns]
    places: np.ndarray = pc.sort_indices(pa.table(columns), keys).to_numpy()
    return places


def _utterances(rows: pa.Table, positions: np.ndarray, entries: FoundFiles, fraction: float) -> Utterances:
    """Return the utterances among the results of entries, sorted by id, with their splits.

    Args:
        rows: (M,) results.
        positions: (M,) positions of their entries.
        entries: Entries.
        fraction: Fraction to hold out if no entry is for validation.
    """
    usable = pc.equal(rows["reason"], "")
    rows, of = rows.filter(usable), positions[usable.to_numpy()]
    roles = _held_out_by_split(entries).astype(np.int32)
    ids = rows["id"].combine_chunks()
    chosen = roles[of] if roles.any() else _held_out(ids, fraction)
    columns = {
        "id": ids,
        "path": rows["path"].cast(pa.large_string()),
        "num_samples": rows["num_samples"],
        "split": pa.DictionaryArray.from_arrays(pa.array(chosen), ["train", "validation"]),
        "sha256": rows["sha256"],
    }
    return Utterances(pa.table(columns, UTTERANCE_SCHEMA).take(pc.sort_indices(ids)).combine_chunks())


def _held_out_by_split(entries: FoundFiles) -> np.ndarray:
    """Return (N,) bool, whether an entry is in a split for validation."""
    chosen: np.ndarray = pc.fill_null(pc.equal(entries.texts("role"), "validation"), False).to_numpy(
        zero_copy_only=False
    )
    return chosen


def _held_out(ids: pa.LargeStringArray, fraction: float) -> np.ndarray:
    """Return (N,) int32, 1 for the ids with the smallest hashes: at least one, but never all.

    The choice depends neither on the order of the utterances nor on their number, beyond how many are held out.
    """
    held_out = np.zeros(len(ids), np.int32)
    held_out[hash_order(ids)[: max(0, min(max(1, round(fraction * len(ids))), len(ids) - 1))]] = 1
    return held_out


def _totals(rows: pa.Table, positions: np.ndarray) -> Counter[str]:
    """Return numbers of entries and of windows for the notes."""
    skipped, too_long = (
        fits(rows["reason"], text).to_numpy() for fits, text in ((pc.not_equal, ""), (pc.equal, "too_long"))
    )
    mixed, cut = (rows[name].to_numpy() for name in ("mixed", "cut"))
    entries = {"entries": positions >= 0, "mixed": mixed, "cut": cut, "too_long": too_long}
    return Counter({name: len(np.unique(positions[chosen])) for name, chosen in entries.items()}) + Counter(
        windows=int((cut & ~skipped).sum()), skipped_windows=int((cut & skipped).sum())
    )


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
        skipped = totals["skipped_windows"]
        left = f", and {skipped:,} {'window was' if skipped == 1 else 'windows were'} skipped" if skipped else ""
        notes.append(
            f"{cut:,} {'recording' if cut == 1 else 'recordings'} longer than {max_seconds:g} s {'was' if cut == 1 else 'were'} cut "
            f"into {totals['windows']:,} utterances{left}"
        )
    if long := totals["too_long"]:
        notes.append(
            f"{long:,} {'recording' if long == 1 else 'recordings'} longer than {max_seconds:g} s {'was' if long == 1 else 'were'} "
            "skipped; set corpus.long_audio=cut to cut them at pauses"
        )
    return tuple(notes)


def _positions(utterances: Utterances, entries: FoundFiles) -> np.ndarray:
    """Return the (N,) positions of utterances' entries, by id. A window's entry is that of the recording that it was cut from."""
    known = entries.texts("id")
    ids = utterances.texts("id")
    positions = pc.index_in(ids, value_set=known)
    if positions.null_count:
        recordings = pc.replace_substring_regex(ids, r"_\d{5,}\.\d\d_\d{5,}\.\d\d$", "")
        positions = pc.coalesce(positions, pc.index_in(recordings, value_set=known))
    assert not positions.null_count
    found: np.ndarray = positions.to_numpy()
    return found


def _summarise(
    splits: list[SplitSummary], entries: FoundFiles, num_samples: np.ndarray, positions: np.ndarray
) -> tuple[SplitSummary, ...]:
    """Add the hours of the usable files to the splits that are used, and say from which ones a part is held out."""
    names = pc.fill_null(entries.texts("split"), NO_SPLIT).dictionary_encode()
    totals = np.bincount(names.indices.to_numpy()[positions], num_samples, len(names.dictionary))
    samples = Counter(dict(zip(names.dictionary.to_pylist(), totals.tolist(), strict=True)))
    held_out = not _held_out_by_split(entries).any()
    return tuple(
        replace(
            split,
            hours=None if split.role == "not used" else samples[split.name] / SAMPLE_RATE / 3600,
            role="train and validation" if held_out and split.role == "train" else split.role,
        )
        for split in splits
    )


def _save(index: CorpusIndex, state: str, output: Path) -> None:
    """Write the index atomically: each file is renamed into place, and the state that validates them exists only at the end."""
    output.mkdir(parents=True, exist_ok=True)
    (output / STATE).unlink(missing_ok=True)
    with replacing(output / INDEX) as temporary:
        write_utterances(temporary, index.utterances, {_NOTES: json.dumps(index.notes)} if index.notes else {})
    with replacing(output / SKIPPED) as temporary:
        write_skipped(temporary, index.skipped)
    with replacing(output / STATE) as temporary:
        temporary.write_text(state)
