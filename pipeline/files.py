"""Small files that a kill leaves whole."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file at once: whoever reads it, and whatever is killed, finds the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
