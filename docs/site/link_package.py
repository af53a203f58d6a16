"""Make a folder in which everything lies inside ``ray_distill``, as in a wheel: ``python docs/site/link_package.py FOLDER``.

mypy and griffe read sources without running them, so they don't see that ``ray_distill`` extends its path to the repository's
top-level folders. The folder holds links, so that it is always up to date.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("pipeline", "teacher_cache", "student", "serve")


def link_package(folder: Path) -> None:
    """Fill ``folder/ray_distill`` with links to the package's files and to the top-level folders."""
    package = folder / "ray_distill"
    package.mkdir(parents=True, exist_ok=True)
    files = [path for path in (REPOSITORY / "ray_distill").iterdir() if path.name != "__pycache__"]
    for target in [*files, *(REPOSITORY / name for name in FOLDERS)]:
        link = package / target.name
        if not (link.is_symlink() and link.resolve() == target):
            link.unlink(missing_ok=True)
            link.symlink_to(target)


if __name__ == "__main__":
    link_package(Path(sys.argv[1]))
