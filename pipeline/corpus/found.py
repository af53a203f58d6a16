"""What the search of a corpus finds: the audio to decode, and what can't be used."""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from ray_distill.teacher_cache.sources.address import AudioAddress, Channel


@dataclass(frozen=True)
class Skipped:
    """A file or folder that isn't used.

    Attributes:
        path: Path of the file or folder.
        reason: ``undecodable``, ``empty``, ``too_short``, ``too_long``, ``missing``, ``no_channel``, ``outside``, ``duplicate_id``,
            ``no_split``, ``unused_split``, ``unsupported_format``, ``bad_name`` or ``unreadable_folder``.
        message: The reason as a sentence.
    """

    path: Path
    reason: str
    message: str

    @property
    def place(self) -> str:
        """The path as text, with the two slashes of a URL, of which a path keeps one."""
        return re.sub(r"^([a-z][a-z0-9+.-]*):/(?!/)", r"\1://", str(self.path))


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file, or audio inside a file, or a piece of it, that was found but not decoded yet.

    Attributes:
        id: ID of the utterance.
        path: Path of the file.
        split: Name of a split of the corpus. None if the corpus has no splits.
        origin: Where the split's name came from, such as ``folder LibriSpeech/dev-clean``. Default: nowhere.
        role: ``train`` or ``validation``, after `assign_splits`. None if the corpus has no splits.
        start: Beginning of the piece in seconds. Default: None, the first sample.
        end: End of the piece in seconds. Default: None, the end of the audio.
        channel: Channel to use. Default: None, which leaves it to ``corpus.channel``.
        speaker: Speaker, if the corpus names one. Default: empty.
        text: Transcript, if the corpus has one. Default: empty.
        inside: Address of the audio inside the file. Default: None, the file is the audio.
    """

    id: str
    path: Path
    split: str | None
    origin: str = ""
    role: str | None = None
    start: float | None = None
    end: float | None = None
    channel: Channel | None = None
    speaker: str = ""
    text: str = ""
    inside: AudioAddress | None = None

    @property
    def address(self) -> AudioAddress:
        """Address of the audio, without the piece, whose bounds in samples depend on the audio's rate."""
        return replace(self.inside or AudioAddress(str(self.path)), channel=self.channel)


@dataclass
class Search:
    """What a format is told for its search, and where it reports.

    Attributes:
        train: Names of the splits to train on. None chooses by name.
        validation: Names of the splits to validate on. None chooses by name.
        skipped: Files and folders that are not used are appended to it.
        notes: Sentences that warn the user are appended to it.
    """

    train: list[str] | None = None
    validation: list[str] | None = None
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def wanted(self) -> list[str]:
        """The splits that the configuration names."""
        return [*(self.train or []), *(self.validation or [])]


@lru_cache(maxsize=4096)  # A file may have many pieces.
def without_suffix(path: str) -> str:
    """Return a path without its suffix, with slashes, as an id."""
    name = Path(path)
    return name.with_suffix("").as_posix() if name.name else path


def piece_id(stem: str, start: float | None, end: float | None, channel: Channel | None = None) -> str:
    """Return an id for a piece of a recording, such as ``talk_00012.34_00034.56``, followed by ``_c1`` for channel 1.

    Args:
        stem: ID of the recording.
        start: Beginning in seconds. None means 0.
        end: End in seconds. None means the end of the recording.
        channel: Channel, if the corpus names one.
    """
    bounds = "" if start is None and end is None else f"_{start or 0:08.2f}_{'end' if end is None else f'{end:08.2f}'}"
    return f"{stem}{bounds}{f'_c{channel}' if isinstance(channel, int) else ''}"
