"""Hidden files and folders, whose names begin with a dot. Programs keep copies, deleted files and notes in them."""

from collections.abc import Iterable
from pathlib import Path, PurePath

from ray_distill.pipeline.corpus.found import Skipped


def is_hidden(name: PurePath) -> bool:
    """Return whether a relative path has a part that begins with a dot, as ``.Trash/1.wav`` and macOS's ``._1.wav`` do."""
    return any(part.startswith(".") and part != ".." for part in name.parts)


def visible(files: Iterable[Path], folder: Path) -> list[Path]:
    """Return the files below a folder that are not hidden in it. The folder itself may be hidden."""
    return [file for file in files if not is_hidden(file.relative_to(folder))]


def hidden(path: Path, inside: str = "") -> Skipped:
    """Return the entry for hidden audio, or for a hidden folder with audio.

    Args:
        path: File or folder.
        inside: Name of the member, if the path is an archive. Default: the path itself is hidden.
    """
    what = f"{inside[:200]} in {path}" if inside else path
    return Skipped(
        path, "hidden", f"{what} is hidden, since its name begins with a dot; rename it if it is part of the corpus"
    )
