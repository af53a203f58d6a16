"""A probe's task: labelled utterances from a CSV manifest, split into training and test."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_distill.teacher_cache.sources.address import AudioAddress

Kind = Literal["class", "ctc", "frame"]
Units = Literal["characters", "words"]

_TEST_FRACTION = 0.2

PHONES_FILE = "phones.csv"
"""Name of a manifest that a corpus may contain, with the phone of each frame."""

NO_LABEL, SILENCE = "-", "SIL"
"""Label of a frame that a probe neither learns nor is tested on, and label of pauses."""


@dataclass(frozen=True)
class Example:
    """A labelled utterance.

    Attributes:
        address: Address of the audio.
        target: The class, as the only item; the sequence of characters, words or phones; or the label of each frame.
        test: Whether the utterance belongs to the test split.
    """

    address: AudioAddress
    target: tuple[str, ...]
    test: bool

    @property
    def path(self) -> Path:
        """File that contains the audio."""
        return Path(self.address.file)


@dataclass(frozen=True)
class Task:
    """Labelled utterances in a training and a test split.

    Attributes:
        kind: ``class`` if each utterance has one class, ``ctc`` if it has a sequence, ``frame`` if each frame has a class.
        examples: Utterances, in the order of their manifest or their ids.
        vocabulary: Classes or symbols of the training targets, sorted.
    """

    kind: Kind
    examples: list[Example]
    vocabulary: list[str]

    @property
    def metric(self) -> str:
        """Name of the reported metric: ``accuracy``, ``error rate`` or ``frame error rate``."""
        return {"class": "accuracy", "ctc": "error rate", "frame": "frame error rate"}[self.kind]


def read_task(manifest: Path, units: Units = "characters") -> Task:
    """Read a CSV manifest with a column ``path`` and a column ``label``, ``transcript`` or ``frame_labels``.

    A ``label`` is the class of the utterance, and a ``transcript`` a sequence. ``frame_labels`` are the classes of the frames of
    20 ms, separated by white space, with ``-`` for a frame that has none.

    Relative paths are relative to the manifest's folder. The optional column ``split`` is ``train`` or ``test``. Without it,
    a hash of the path puts about a fifth of the utterances into the test split.

    Args:
        manifest: UTF-8 CSV file with a header.
        units: How transcripts are split: into ``characters``, or into ``words`` at white space, which also suits phones.

    Raises:
        ValueError: The manifest can't be read, or something in it is missing or wrong.
    """
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"the manifest {manifest} can't be read ({error})") from error
    columns = list(rows[0]) if rows else []
    kinds: dict[str, Kind] = {"label": "class", "transcript": "ctc", "frame_labels": "frame"}
    column = next((name for name in kinds if name in columns), None)
    if "path" not in columns or column is None:
        raise ValueError(
            f"the manifest {manifest} needs a column 'path' and a column 'label', 'transcript' or 'frame_labels'; "
            f"it has {', '.join(columns) or 'no rows'}"
        )
    examples = []
    for number, row in enumerate(rows, 2):
        text = (row[column] or "").strip()
        split = row.get("split") or None
        if not row["path"] or not text or split not in (None, "train", "test"):
            raise ValueError(
                f"line {number} of {manifest} needs a path and a {column}; its split must be train or test"
            )
        one = {"label": (text,), "frame_labels": tuple(text.split())}
        target = one.get(column) or (tuple(text) if units == "characters" else tuple(text.split()))
        digest = hashlib.sha256(row["path"].encode()).digest()
        test = split == "test" if split else int.from_bytes(digest[:4]) < _TEST_FRACTION * 2**32
        examples.append(Example(AudioAddress(str(manifest.parent / row["path"])), target, test))
    return make_task(kinds[column], examples, f"the manifest {manifest}")


def make_task(kind: Kind, examples: Sequence[Example], origin: str) -> Task:
    """Return the task of some examples.

    Args:
        kind: Kind of the targets.
        examples: Utterances.
        origin: Where they came from, for messages.

    Raises:
        ValueError: A split is empty, a class occurs in the test split only, or there is only one class.
    """
    vocabulary = {item for example in examples if not example.test for item in example.target}
    if kind == "frame":
        vocabulary.discard(NO_LABEL)
    task = Task(kind, list(examples), sorted(vocabulary))
    if not task.vocabulary or not any(example.test for example in examples):
        raise ValueError(f"{origin} needs utterances in both splits, train and test")
    if task.kind == "class":
        unknown = sorted({e.target[0] for e in examples if e.test} - set(task.vocabulary))
        if unknown:
            raise ValueError(
                f"the class {unknown[0]!r} of {origin} occurs in the test split only; it also needs training utterances"
            )
        if len(task.vocabulary) < 2:
            raise ValueError(f"{origin} has only the class {task.vocabulary[0]!r}; a probe needs at least two classes")
    return task
