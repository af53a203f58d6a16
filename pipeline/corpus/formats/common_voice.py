"""Common Voice: a folder with ``clips/`` and one ``.tsv`` for each split."""

from pathlib import Path

from ray_distill.pipeline.corpus.formats.manifest_table import read_table
from ray_distill.pipeline.corpus.formats.text_lines import text_of
from ray_distill.pipeline.corpus.found import FoundFile, Search

_SPLITS = ("train", "dev", "test")


def matches(path: Path) -> bool:
    """Return whether a folder has ``clips/`` and tables of it."""
    return (
        path.is_dir()
        and (path / "clips").is_dir()
        and any((path / f"{name}.tsv").is_file() for name in (*_SPLITS, "validated"))
    )


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the clips of ``train.tsv``, ``dev.tsv`` and ``test.tsv``, and of other tables that the configuration names as splits.

    The id is the clip's file name without suffix, the speaker the ``client_id`` and the transcript the ``sentence``. ``validated``
    contains the three splits, and ``other`` and ``invalidated`` were not checked, so they are only used if they are named.

    Raises:
        ValueError: A table lacks the column ``path``, or is damaged.
    """
    if not (path / "clips").is_dir():
        raise ValueError(f"{path} has no folder clips, so it is not a folder of Common Voice")
    wanted = {name.casefold() for name in search.wanted}
    tables = [file for file in sorted(path.glob("*.tsv")) if file.stem in _SPLITS or file.stem.casefold() in wanted]
    found = []
    for file in tables:
        header, rows = read_table(file)
        if "path" not in header:
            raise ValueError(f"{file} has no column 'path'; its columns are {', '.join(header)}")
        for row in rows:
            values = dict(zip(header, row, strict=True))
            # The first releases had no suffix.
            clip = values["path"] if "." in values["path"] else f"{values['path']}.mp3"
            found.append(
                FoundFile(
                    Path(clip).stem,
                    path / "clips" / clip,
                    file.stem,
                    f"file {file.name}",
                    speaker=text_of(values.get("client_id")),
                    text=text_of(values.get("sentence")),
                )
            )
    return found
