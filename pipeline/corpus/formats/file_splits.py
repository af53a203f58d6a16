"""Corpora that consist of one file for each split, and where the paths in them lead."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ray_distill.pipeline.corpus.splits import split_kinds
from ray_distill.teacher_cache.sources.address import AudioAddress


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
    first = next((path for path in paths if not Path(path).is_absolute() and "://" not in path), None)
    if first is None:
        return folder
    return next((base for base in (folder, *folder.parents) if (base / first).exists()), folder)


@lru_cache(maxsize=4096)  # A file may have many pieces.
def located(folder: Path, audio: str) -> tuple[Path, AudioAddress | None]:
    """Return the path of audio and, if it is a URL such as ``s3://bucket/a.flac``, its address.

    Args:
        folder: Folder at which relative paths start.
        audio: Path, or URL.
    """
    if audio.startswith("file://"):
        return Path(unquote(urlsplit(audio).path)), None
    return (Path(audio), AudioAddress(audio)) if "://" in audio else (folder / audio, None)
