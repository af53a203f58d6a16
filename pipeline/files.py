"""Small files that stay intact if the process is killed."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: readers see either the old text or the new text, even after a kill."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def check_room(folder: Path) -> None:
    """Check that files can be created in a folder, which need not exist yet.

    Call it before hours of work whose results are to be written there.

    Raises:
        ValueError: The folder can't be created or written to.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written into {folder}; choose another --output")
