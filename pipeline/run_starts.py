"""The starts of a run's training: time, command and version of the code, one JSON object per line."""

import json
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray_distill
from ray_distill.pipeline.files import write_text

_GIT_SECONDS = 10.0


def record_start(file: Path, *, first: bool) -> None:
    """Append this process to the starts of a run.

    Args:
        file: File of the starts.
        first: Whether the training has no checkpoint, so that earlier starts have made nothing of it.
    """
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": shlex.join([*_program(Path(sys.argv[0])), *sys.argv[1:]]),
        "code": code_version(Path(ray_distill.__file__).resolve().parents[1]),
    }
    earlier = "" if first or not file.is_file() else file.read_text()
    write_text(file, earlier + json.dumps(start) + "\n")


def _program(path: Path) -> list[str]:
    return ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]


def read_starts(file: Path) -> list[dict[str, Any]]:
    """Return the starts; none if the file does not exist, as in runs of earlier versions.

    Raises:
        ValueError: The file is damaged.
    """
    if not file.is_file():
        return []
    try:
        starts = [json.loads(line) for line in file.read_text().splitlines()]
        return [{key: str(start[key]) for key in ("time", "command", "code")} for start in starts]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged; restore it from a copy, or remove it") from error


def code_version(clone: Path) -> str:
    """Return the commit of the code if it lies in a git clone, and whether files differ from it; otherwise the package's version."""
    if (found := clone_commit(clone)) is None:
        return f"version {version('ray-distill')}"
    commit, changed = found
    return f"commit {commit}{', with changes' if changed else ''}"


def clone_commit(clone: Path) -> tuple[str, bool] | None:
    """Return the commit of a git clone, and whether files differ from it.

    Args:
        clone: Folder of the clone. A folder inside the clone of another project, as that of an installed package may be, is none.

    Returns:
        None if the folder is no clone, there is no git, or git does not trust the folder's owner.
    """
    if not (clone / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(clone), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
