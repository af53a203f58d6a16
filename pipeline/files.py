"""Small files that a kill leaves whole."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file at once: whoever reads it, and whatever is killed, finds the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def check_room(folder: Path) -> None:
    """ValueError where no file can be put into a folder, which need not exist: to be told before hours of work, not after."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written into {folder}; choose another --output")
