"""Search for the audio of a corpus: the format finds it, and its splits decide what is used."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.pipeline.composition.suggestions import enumerated
from ray_distill.pipeline.corpus.formats import FORMATS, matches, open_format, recognise
from ray_distill.pipeline.corpus.formats.huggingface.dataset import has_tables
from ray_distill.pipeline.corpus.found import FoundFiles, Search, Skipped, SkippedFiles
from ray_distill.pipeline.corpus.splits import NO_SPLIT, SplitSummary, assign_splits, kinds
from ray_distill.pipeline.corpus.suffixes import SUFFIXES

_COMPARED = 4096
"""Number of files with equal ids that are compared at a time."""


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

    entries: FoundFiles
    skipped: SkippedFiles
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
        ValueError: The corpus doesn't exist, its path is not valid UTF-8, it has no audio, lacks a split, or it is ambiguous which
            splits its files belong to.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path of the corpus, {str(path)!r}, is not valid UTF-8; rename the folder") from error
    if format is None:
        format = recognise(path)
        if format == "folder":
            _refuse_wrong_level(path)
    search = Search(None if train is None else list(train), None if validation is None else list(validation))
    found = FoundFiles.of(open_format(format).find(path, search))
    skipped, notes = SkippedFiles.of(search.skipped), search.notes
    if format != "folder" and format in FORMATS:
        others = [
            name
            for name in FORMATS
            if name not in (format, "folder", "manifest", *_PARTS.get(format, ())) and matches(name, path)
        ]
        if others:
            notes.append(
                f"{path} is read in the format {format}; it also has data in the format {enumerated(others)}, which is not used; "
                "corpus.format chooses another"
            )
    if not found:
        undecoded = Counter(skip.path.suffix.lower() for skip in skipped if skip.reason == "unsupported_format")
        also = (
            f" ({', '.join(f'{n} {suffix}' for suffix, n in sorted(undecoded.items()))} files can't be decoded)"
            if undecoded
            else next((f" ({skip.message})" for skip in skipped if skip.reason == "hidden"), "")
        )
        if format != "folder":
            raise ValueError(
                f"{path} is in the format {format}, but names no audio{also}; add audio, or set corpus.format if it is another"
            )
        if has_tables(path):
            FORMATS["huggingface"].find(path, search)  # It says which columns there are.
        raise ValueError(f"{path} contains no audio{also}; audio files end in {', '.join(SUFFIXES)}")
    used, unused, splits = assign_splits(found, train, validation, path)
    skipped += unused
    entries, duplicates = _unique(used)
    skipped += duplicates
    count, first = _doubtful(entries, path)
    if first is not None:
        notes.append(
            f"the paths of {count} files look like test or validation data, such as {first}, but nothing else says so, "
            "and they are used for training; move them to a folder named test or dev, or add a column split to the manifest"
        )
    return FoundCorpus(entries, skipped, splits, notes, format)


def _unique(used: FoundFiles) -> tuple[FoundFiles, SkippedFiles]:
    """Return files sorted by id, without those that have the id of an earlier one, and these.

    Audio that is in two splits, such as two tables of Common Voice, is not trained on.
    """
    ids = used.texts("id")
    if not pc.all(pc.less(ids[:-1], ids[1:])).as_py():
        training = pc.fill_null(pc.not_equal(used.texts("role"), "validation"), True)
        keys = pa.table({"id": ids, "path": used.texts("path"), "training": training.cast(pa.uint8())})
        used = used.take(pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names]).to_numpy())
        ids = used.texts("id")
    repeated = np.zeros(len(ids), bool)
    repeated[1:] = pc.equal(ids[:-1], ids[1:]).to_numpy(zero_copy_only=False)
    if not repeated.any():
        return used, SkippedFiles()
    first = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(ids))))
    skipped = SkippedFiles()
    positions = np.flatnonzero(repeated)
    for begin in range(0, len(positions), _COMPARED):
        some = positions[begin : begin + _COMPARED]
        for entry, other in zip(_taken(used, some), _taken(used, first[some]), strict=True):
            message = (
                f"{entry.address} is listed twice"
                if entry.address == other.address
                else f"{entry.address} has the same id as {other.address}: {entry.id!r}"
            )
            skipped.append(Skipped(entry.path, "duplicate_id", message))
    return used.take(np.flatnonzero(~repeated)), skipped


def _taken(files: FoundFiles, positions: np.ndarray) -> FoundFiles:
    """Return the rows at ascending positions, without a look at the whole table, which a take may copy."""
    begin, end = int(positions[0]), int(positions[-1]) + 1
    return FoundFiles(files.table.slice(begin, end - begin)).take(positions - begin)


_SAYS = "(?i)dev|val|held|tst|test"
"""What all words of `kinds` contain, other than those for training."""


def _doubtful(entries: FoundFiles, corpus: Path) -> tuple[int, str | None]:
    """Return the number of files without a split whose paths look like test or validation data, and the first path."""
    without = pc.or_(pc.is_null(entries.texts("split")), pc.equal(entries.texts("split"), NO_SPLIT))
    plain = pc.and_(pc.fill_null(without, True), pc.is_null(entries.texts("inside")))
    some = entries.table.filter(pc.and_(plain, pc.match_substring_regex(entries.texts("path"), _SAYS)))
    said = lru_cache(1 << 16)(lambda word: bool(kinds(word) - {"train"}))
    paths = (path for (path,) in FoundFiles(some).rows("path") if any(map(said, _words_of(Path(path), corpus))))
    first = next(paths, None)
    return (0, None) if first is None else (1 + sum(1 for _ in paths), first)


_PARTS = {"lhotse_shar": ("lhotse", "webdataset")}
"""Formats whose files also look like those of others: Shar's cuts are manifests of Lhotse, and its audio is in tar files."""
_TABLES = ("kaldi", "common_voice", "voxpopuli")
"""Formats whose tables say what the audio below them is for, and which are told by a few names of files."""
_LOOKED_AT = 200


def _refuse_wrong_level(path: Path) -> None:
    """Raise ValueError if a folder, which is in no format with tables, is above or below one that is."""
    if not path.is_dir():
        return
    if path.name == "clips" and matches("common_voice", path.parent):
        raise ValueError(
            f"{path} has the clips of all splits of a Common Voice corpus; give {path.parent}, whose tables tell them apart, or set "
            "corpus.format=folder to use all of them"
        )
    children = list(islice(_folders(path), _LOOKED_AT))
    for inner in [*children, *(inner for child in children[:10] for inner in islice(_folders(child), _LOOKED_AT))]:
        for name in _TABLES:
            if matches(name, inner):
                raise ValueError(
                    f"{path} is no corpus with tables itself, but {inner} is one in the format {name}; give that folder, or set "
                    f"corpus.format=folder to use all audio below {path}"
                )


def _folders(path: Path) -> Iterator[Path]:
    try:
        yield from sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError:
        return  # The search lists folders that can't be read.


def _words_of(file: Path, corpus: Path) -> tuple[str, ...]:
    """Return the parts of a file's path that may say what it is for."""
    if corpus.is_dir():
        return (file.stem,)  # The folders were considered before.
    name = file.relative_to(corpus.parent) if file.is_relative_to(corpus.parent) else file
    return (*name.parts[:-1], name.stem)


def count_files(found: FoundCorpus) -> dict[str, int]:
    """Return the number of files of each split, ``train`` and ``validation``; of ``all`` if some of them are to be held out."""
    counts = Counter(role for (role,) in found.entries.rows("role"))
    if not counts["validation"]:
        return {"all": len(found.entries)}
    return {split: counts[split] for split in ("train", "validation")}
