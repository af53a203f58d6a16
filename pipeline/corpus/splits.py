"""The splits of a corpus: their names, and which of them are for training and validation.

A name is for training if one of its words begins with "train", for validation if one is "dev", "devel", "development", "val", "valid",
"validation" or "heldout", and for testing if one begins with "test" or "eval". Upper and lower case are equal. Test splits are never
used unless they are named.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.pipeline.corpus.found import FoundFiles, SkippedFiles

NO_SPLIT = "."
"""Name of the split of the files that are in no folder of a split."""
_ROWS = 1 << 16
"""Number of messages that are made at a time."""
_ESCAPED = r"[^ -&(-\[\]-~]"
"""Characters that ``repr`` may write in another way, or for which it takes other quotation marks."""
KEYS = "corpus.train_splits and corpus.validation_splits"

_WORDS = re.compile(
    r"(?<![a-z])(?:(?P<train>train[a-z]*|trn)|(?P<validation>dev|devel|development|devset|val|valset|valid|validation|validset"
    r"|held[-_ ]?out)|(?P<test>test(?!am|im)[a-z]*|tst|eval[a-z]*))(?![a-z])"
)
_PREFIXES = {"train": "train", "dev": "validation", "heldout": "validation", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class SplitSummary:
    """A split of a corpus, for the user.

    Attributes:
        name: Name of the split; `NO_SPLIT` for files without one.
        files: Number of files.
        hours: Duration of the usable files in hours. None if they were not decoded.
        role: ``train``, ``validation``, ``train and validation`` if a part is held out, or ``not used``.
        origin: Where the name came from.
    """

    name: str
    files: int
    hours: float | None
    role: str
    origin: str


def kinds(name: str) -> set[str]:
    """Return what the words of a folder's or file's name say: some of ``train``, ``validation`` and ``test``."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
    return {str(match.lastgroup) for match in _WORDS.finditer(words)}


def split_kinds(name: str) -> set[str]:
    """Return the same for a name that is known to be a split's, where a beginning such as "devclean" is enough."""
    return kinds(name) or {kind for prefix, kind in _PREFIXES.items() if name.lower().startswith(prefix)}


def match_wanted(parts: Sequence[str], wanted: Iterable[str]) -> tuple[str, int] | None:
    """Return the wanted split that a file's folders lie in, and the number of folders up to it.

    A wanted split is a folder's name or the end of its path, such as ``train/dev``. The innermost one counts, and of two names of it
    the longer one.
    """
    best: tuple[int, int, str] | None = None
    for name in wanted:
        words = Path(name).parts
        for end in range(len(words), len(parts) + 1):
            part = tuple(parts[end - len(words) : end])
            if words and _folded(part) == _folded(words):
                best = max(best or (0, 0, ""), (end, len(words), "/".join(part)))
    return None if best is None else (best[2], best[0])


def _folded(words: Iterable[str]) -> list[str]:
    return [word.casefold() for word in words]


def split_of_folders(parts: Sequence[str], wanted: Iterable[str], file: Path) -> tuple[str, int] | None:
    """Return the split that a file's folders say, and the number of folders up to it.

    Args:
        parts: Names of the folders between the corpus and the file.
        wanted: Splits that the configuration names. They count before the names that are recognised.
        file: The file, for the message.

    Raises:
        ValueError: The folders say different things, such as ``train/dev``.
    """
    matched = match_wanted(parts, wanted)
    begin = matched[1] if matched else 0
    named = {n: found for n, part in enumerate(parts) if n >= begin and (found := kinds(part))}
    said = set().union(*named.values())
    if len(said) > 1 or (matched and said - split_kinds(matched[0])):
        folder = "/".join(parts[: max(named) + 1])
        raise ValueError(
            f"the path of {file} names several splits, so it is ambiguous which one it belongs to; name the folder {folder!r} in "
            "corpus.train_splits or corpus.validation_splits, or rename it"
        )
    if matched:
        return matched
    return (parts[min(named)], min(named) + 1) if named else None


def assign_splits(
    found: FoundFiles, train: Sequence[str] | None, validation: Sequence[str] | None, path: Path
) -> tuple[FoundFiles, SkippedFiles, list[SplitSummary]]:
    """Choose the splits to train on and to validate on.

    Args:
        found: The files that were found.
        train: Names of the splits to train on. None chooses by name.
        validation: Names of the splits to validate on. None chooses by name.
        path: The corpus, for messages.

    Returns:
        The files to use, with their roles; those of unused splits; and all splits, without their hours.

    Raises:
        ValueError: A wanted split doesn't exist or is wanted twice, no split is for training, or it is ambiguous what a split is for.
    """
    counts, origins = _counted(found)
    names = sorted(name for name in counts if name is not None)
    if not names:
        absent = [name for name in train or [] if name != NO_SPLIT] + list(validation or [])
        if absent:
            raise ValueError(
                f"{path} has no splits, so {absent[0]!r} can't be one; remove corpus.train_splits and corpus.validation_splits"
            )
        return (
            found,
            SkippedFiles(),
            [SplitSummary(NO_SPLIT, len(found), None, "train", "no folder or column names a split")],
        )
    train = None if train is None else _resolve(train, names, path)
    validation = None if validation is None else _resolve(validation, names, path)
    both = sorted(set(train or []) & set(validation or []))
    if both:
        raise ValueError(
            f"the split {both[0]!r} can't be used for both training and validation; remove it from one of them"
        )
    free = [name for name in names if name not in {*(train or []), *(validation or [])}]
    ambiguous = [name for name in free if len(split_kinds(name)) > 1]
    if ambiguous and (train is None or validation is None):
        raise ValueError(
            f"the split {ambiguous[0]!r} of {path} could be for {' or '.join(sorted(split_kinds(ambiguous[0])))}; set {KEYS} to "
            f"some of {', '.join(names)}"
        )
    if train is None and NO_SPLIT in free:
        first = int(np.argmax(pc.equal(found.texts("split"), NO_SPLIT).to_numpy(zero_copy_only=False)))
        raise ValueError(
            f"{counts[NO_SPLIT]} files of {path} are in no split's folder (such as {found[first].path}), but others are; set "
            f"corpus.train_splits to some of {', '.join(names)}, where {NO_SPLIT!r} means the files in no split's folder"
        )
    if validation is None:
        validation = [name for name in free if split_kinds(name) == {"validation"}]
    if train is None:
        train = [name for name in free if split_kinds(name) == {"train"}]
        if not train:
            raise ValueError(
                f"no split of {path} starts with 'train'; set corpus.train_splits to some of {', '.join(names)}"
            )
    role = dict.fromkeys(train, "train") | dict.fromkeys(validation, "validation")
    return (
        _with_roles(found, role),
        _unused(found, role),
        [SplitSummary(name, counts[name], None, role.get(name, "not used"), _listed(origins[name])) for name in names],
    )


def _counted(found: FoundFiles) -> tuple[Counter[str | None], dict[str | None, set[str]]]:
    """Return the number of files of each split, and where its name came from."""
    columns = {name: found.texts(name) for name in ("split", "origin")}
    counts: Counter[str | None] = Counter()
    origins: dict[str | None, set[str]] = {}
    for row in pa.table(columns).group_by(["split", "origin"]).aggregate([([], "count_all")]).to_pylist():
        counts[row["split"]] += row["count_all"]
        origins.setdefault(row["split"], set()).add(row["origin"] or "")
    return counts, origins


def _with_roles(found: FoundFiles, role: dict[str, str]) -> FoundFiles:
    """Return the files whose split has a role, with these roles."""
    places = pc.index_in(found.texts("split"), value_set=pa.array(role, pa.large_string()))
    used = places.is_valid()
    table = found.table if pc.all(used).as_py() else found.table.filter(used)
    roles = pa.DictionaryArray.from_arrays(places.drop_null(), pa.array(role.values(), pa.string()))
    return FoundFiles(table.set_column(table.schema.get_field_index("role"), "role", roles))


def _unused(found: FoundFiles, role: dict[str, str]) -> SkippedFiles:
    """Return the files whose split has no role."""
    splits = found.texts("split")
    table = found.table.select(["path", "id", "split"]).filter(
        pc.invert(pc.is_in(splits, pa.array(role, pa.large_string())))
    )
    messages = []
    for begin in range(0, table.num_rows, _ROWS):
        ids, names = (_reprs(FoundFiles(table.slice(begin, _ROWS)).texts(name)) for name in ("id", "split"))
        end = pa.scalar(", which is not used; add it to corpus.train_splits to use it", pa.large_string())
        parts = (ids, pa.scalar(" is in the split ", pa.large_string()), names, end)
        messages.append(pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string())))
    reasons = pa.DictionaryArray.from_arrays(np.zeros(table.num_rows, np.int32), ["unused_split"])
    return SkippedFiles.of_columns(
        table["path"], pa.chunked_array([reasons]), pa.chunked_array(messages, pa.large_string())
    )


def _reprs(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return what Python's ``repr`` returns."""
    if texts.null_count or pc.any(pc.match_substring_regex(texts, _ESCAPED)).as_py():
        return pa.array(map(repr, texts.to_pylist()), pa.large_string())
    quote = pa.scalar("'", pa.large_string())
    return pc.binary_join_element_wise(quote, texts, quote, pa.scalar("", pa.large_string()))


def _resolve(wanted: Sequence[str], names: list[str], path: Path) -> list[str]:
    """Return the splits that are wanted, as the corpus spells them."""
    resolved = []
    for name in wanted:
        same = [name] if name in names else [other for other in names if other.casefold() == name.strip("/").casefold()]
        if not same:
            several = f"; several are written as a list, [{name}]" if "," in name else ""
            raise ValueError(f"{path} has no split {name!r}; its splits are {', '.join(names)}{several}")
        resolved += same
    return resolved


def _listed(origins: set[str]) -> str:
    first, *others = sorted(origins)
    return f"{first} and {len(others)} more" if others else first
