"""Local paths that a user wrote in a configuration, where no shell has replaced ``~`` and variables."""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic


def in_home(path: Any) -> Any:
    """Return a path with a leading ``~`` replaced by the home folder; any other value as it is.

    Args:
        path: A text or `Path`, which keeps its type, or another value, which the caller refuses.

    Raises:
        ValueError: The path names an environment variable, or ``~NAME`` is no user of this machine.

    Example:
        >>> in_home("caches/demo"), in_home("~/caches") == str(Path.home() / "caches")
        ('caches/demo', True)
    """
    if not isinstance(path, str | Path):
        return path
    text = str(path)
    if (variable := re.search(r"\$(\w+|\{\w+\})", text)) is not None and not Path(text).exists():
        raise ValueError(
            f"{text} has the variable {variable[0]}, which is not replaced in a configuration; write the path itself, or give it on "
            "the command line without single quotes, where the shell replaces it"
        )
    if not text.startswith("~") or Path(text).exists():
        return path
    try:
        return type(path)(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"{text} begins with {text.split('/')[0]}, which is no user of this machine") from None


_Kind = TypeVar("_Kind")
Local = Annotated[_Kind, pydantic.BeforeValidator(in_home)]
"""A key whose value is a local path; see `in_home`."""
