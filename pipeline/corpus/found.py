"""What the search of a corpus finds: the files to decode, and those that can't be used."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Skipped:
    """A file or folder that isn't used.

    Attributes:
        path: Path of the file or folder.
        reason: ``undecodable``, ``empty``, ``too_short``, ``too_long``, ``missing``, ``duplicate_id``, ``no_split``,
            ``unused_split``, ``unsupported_format``, ``bad_name`` or ``unreadable_folder``.
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
        split: Name of a split of the corpus. None if the corpus has no splits.
        origin: Where the split's name came from, such as ``folder LibriSpeech/dev-clean``. Default: nowhere.
        role: ``train`` or ``validation``, after `assign_splits`. None if the corpus has no splits.
    """

    id: str
    path: Path
    split: str | None
    origin: str = ""
    role: str | None = None
