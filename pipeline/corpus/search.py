"""Search for the audio of a corpus: the format finds it, and its splits decide what is used."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_distill.pipeline.corpus.formats import FORMATS, recognise
from ray_distill.pipeline.corpus.found import FoundFile, Search, Skipped
from ray_distill.pipeline.corpus.splits import NO_SPLIT, SplitSummary, assign_splits, kinds
from ray_distill.pipeline.corpus.suffixes import SUFFIXES


@dataclass(frozen=True)
class FoundCorpus:
    """The audio of a corpus, before it is opened.

    Attributes:
        entries: The audio to use, sorted by id. Their roles are ``train``, ``validation`` or None.
        skipped: Files and folders that are not used.
        splits: The splits, without their hours.
        notes: Sentences that warn the user.
        format: Name of the format.
    """

    entries: list[FoundFile]
    skipped: list[Skipped]
    splits: list[SplitSummary]
    notes: list[str]
    format: str


def find_audio(
    path: Path, train: Sequence[str] | None, validation: Sequence[str] | None, *, format: str | None = None
) -> FoundCorpus:
    """Find the audio of a corpus without opening it.

    Args:
        path: Corpus; see `index_corpus`.
        train: Names of the splits to train on. None chooses by name.
        validation: Names of the splits to validate on. None chooses by name.
        format: Name of the corpus's format. Default: None, which looks.

    Raises:
        ValueError: The corpus doesn't exist, has no audio, lacks a split, or it is ambiguous which splits its files belong to.
    """
    search = Search(None if train is None else list(train), None if validation is None else list(validation))
    format = format or recognise(path)
    found = FORMATS[format].find(path, search)
    skipped, notes = search.skipped, search.notes
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
    # Audio that is in two splits, such as two tables of Common Voice, is not trained on.
    for entry in sorted(used, key=lambda entry: (entry.id, str(entry.path), entry.role != "validation")):
        first = entries.setdefault(entry.id, entry)
        if first is not entry:
            message = f"{entry.address} has the same id as {first.address}: {entry.id!r}"
            skipped.append(Skipped(entry.path, "duplicate_id", message))
    doubtful = [
        entry.path
        for entry in entries.values()
        if entry.split in (None, NO_SPLIT)
        and entry.inside is None
        and any(kinds(word) - {"train"} for word in _words_of(entry.path, path))
    ]
    if doubtful:
        notes.append(
            f"the paths of {len(doubtful)} files look like test or validation data, such as {doubtful[0]}, but nothing else says so, "
            "and they are used for training; move them to a folder named test or dev, or add a column split to the manifest"
        )
    return FoundCorpus(list(entries.values()), skipped, splits, notes, format)


def _words_of(file: Path, corpus: Path) -> tuple[str, ...]:
    """Return the parts of a file's path that may say what it is for."""
    if corpus.is_dir():
        return (file.stem,)  # The folders were considered before.
    name = file.relative_to(corpus.parent) if file.is_relative_to(corpus.parent) else file
    return (*name.parts[:-1], name.stem)


def count_files(found: FoundCorpus) -> dict[str, int]:
    """Return the number of files of each split, ``train`` and ``validation``; of ``all`` if some of them are to be held out."""
    counts = Counter(entry.role for entry in found.entries)
    if not counts["validation"]:
        return {"all": len(found.entries)}
    return {split: counts[split] for split in ("train", "validation")}
