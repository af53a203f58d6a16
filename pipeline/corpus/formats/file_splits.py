"""Corpora that consist of one file for each split, and the folder at which their paths start."""

from collections.abc import Iterable
from pathlib import Path

from ray_distill.pipeline.corpus.splits import split_kinds


def split_of_stem(stem: str, files: int) -> str | None:
    """Return the split that a file's name says: its stem. None for the only file of a corpus, if its name is no split's."""
    return stem if files > 1 or split_kinds(stem) else None


def base_folder(folder: Path, paths: Iterable[str]) -> Path:
    """Return the folder at which relative paths in a file start: the nearest one above it in which the first path exists.

    Kaldi and Lhotse write paths relative to the folder in which a recipe was run.

    Args:
        folder: Folder of the file.
        paths: Paths in the file. Only the first relative one is looked at.
    """
    first = next((path for path in paths if not Path(path).is_absolute()), None)
    if first is None:
        return folder
    return next((base for base in (folder, *folder.parents) if (base / first).exists()), folder)
