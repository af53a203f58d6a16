"""The interface of a corpus format. A module with these two functions is a format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ray_distill.pipeline.corpus.found import FoundFile, Search


class CorpusFormat(Protocol):
    """Finds the audio of a corpus in one format, without decoding it."""

    def matches(self, path: Path) -> bool:
        """Return whether a file or folder looks like a corpus in this format. Few bytes are read."""

    def find(self, path: Path, search: Search) -> Sequence[FoundFile]:
        """Return all audio of a corpus, of all splits, in any order: a list, or for millions of rows `FoundFiles`.

        Raises:
            ValueError: Something in the corpus is missing or wrong. The message names the file and the line or row.
        """
