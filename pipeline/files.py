"""Small files that stay intact if the process is killed, and JSON objects in files."""

import json
import os
from pathlib import Path
from typing import Any

from ray_distill.whole_files import replacing


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: readers see either the old text or the new text, even after a kill.

    Raises:
        OSError: The file can't be written. The error names it.
    """
    with replacing(path) as temporary:
        temporary.write_text(text)


def check_room(folder: Path, advice: str = "choose another --output") -> None:
    """Check that files can be created in a folder, which need not exist yet.

    Call it before hours of work whose results are to be written there.

    Args:
        folder: The folder.
        advice: What to do if they can't. Default: choose another ``--output``.

    Raises:
        ValueError: The folder can't be created or written to.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written into {folder}; {advice}")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is no such file. ValueError if it holds something else."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is damaged (it does not contain a JSON object); restore it from a copy")
    return tree
