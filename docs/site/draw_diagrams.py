"""Draw the diagrams of docs/pictures/diagrams with D2 0.6 or later: ``python docs/site/draw_diagrams.py [PATH_OF_D2]``.

The SVG files are committed, so the documentation builds without D2. Each of them names the SHA-256 of its sources, which tests/docs
compares with the sources.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
SOURCES = PICTURES / "diagrams"
STYLE = SOURCES / "style.d2"


def diagrams() -> list[Path]:
    """Return the source files of the diagrams, without the style that they share."""
    return sorted(path for path in SOURCES.glob("*.d2") if path != STYLE)


def source_digest(source: Path) -> str:
    """Return the SHA-256 of a diagram's source and of the style."""
    return hashlib.sha256(STYLE.read_bytes() + source.read_bytes()).hexdigest()


def main(d2: str = "d2") -> None:
    """Draw all diagrams in their natural size, with colours for light and dark pages in one file."""
    for source in diagrams():
        drawing = PICTURES / f"{source.stem}.svg"
        subprocess.run([d2, "--scale", "1", source, drawing], check=True)
        drawing.write_text(f"{drawing.read_text()}<!-- sources {source_digest(source)} -->\n")
        drawing.chmod(0o644)


if __name__ == "__main__":
    main(*sys.argv[1:])
