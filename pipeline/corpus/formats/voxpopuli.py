"""VoxPopuli's transcribed speech: ``asr_train.tsv``, ``asr_dev.tsv`` and ``asr_test.tsv`` beside folders of years."""

from pathlib import Path

from ray_distill.pipeline.corpus.formats.manifest_table import read_table
from ray_distill.pipeline.corpus.formats.text_lines import text_of
from ray_distill.pipeline.corpus.found import FoundFile, Search


def matches(path: Path) -> bool:
    """Return whether a folder has a table ``asr_*.tsv``."""
    return path.is_dir() and any(path.glob("asr_*.tsv"))


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the audio of all tables. The id is that of the table, and the file ``YEAR/ID.ogg``, where the id begins with the year.

    The transcript is ``normalized_text``, or ``raw_text`` where that is empty, and the speaker ``speaker_id``.

    Raises:
        ValueError: There is no table, or one lacks the column ``id`` or is damaged.
    """
    tables = sorted(path.glob("asr_*.tsv"))
    if not tables:
        raise ValueError(
            f"{path} has no asr_*.tsv, so it is not VoxPopuli's folder of a language (transcribed_data/en)"
        )
    found = []
    for file in tables:
        header, rows = read_table(file)
        if "id" not in header:
            raise ValueError(f"{file} has no column 'id'; its columns are {', '.join(header)}")
        for row in rows:
            values = dict(zip(header, row, strict=True))
            id = values["id"]
            found.append(
                FoundFile(
                    id,
                    path / id[:4] / f"{id}.ogg",
                    values.get("split") or file.stem.removeprefix("asr_"),
                    f"file {file.name}",
                    speaker=text_of(values.get("speaker_id")),
                    text=text_of(values.get("normalized_text") or values.get("raw_text")),
                )
            )
    return found
