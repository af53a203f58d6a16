"""Corpus formats: one module for each, told apart by looking, or named by ``corpus.format``."""

from pathlib import Path

from ray_distill.pipeline.corpus.formats import (
    common_voice,
    fairseq,
    folder,
    huggingface,
    kaldi,
    lhotse,
    manifest,
    nemo,
    voxpopuli,
    webdataset,
)
from ray_distill.pipeline.corpus.formats.corpus_format import CorpusFormat

# The first one that matches is used. Formats with a table of their audio come before a folder of audio, and this one before
# archives, since the archives of a download often remain beside its audio.
FORMATS: dict[str, CorpusFormat] = {
    "kaldi": kaldi,
    "lhotse": lhotse,
    "nemo": nemo,
    "common_voice": common_voice,
    "voxpopuli": voxpopuli,
    "fairseq": fairseq,
    "folder": folder,
    "huggingface": huggingface,
    "webdataset": webdataset,
    "manifest": manifest,
}
"""The formats by name."""


def check_format(name: str) -> str:
    """Return the name of a format.

    Raises:
        ValueError: There is no such format.
    """
    if name not in FORMATS:
        raise ValueError(f"there is no corpus format {name!r}; the formats are {', '.join(FORMATS)}")
    return name


def recognise(path: Path) -> str:
    """Return the name of the format of a file or folder.

    Raises:
        ValueError: There is nothing at the path, or it is a file in no known format.
    """
    if not path.exists():
        raise ValueError(
            f"there is no corpus at {path}; give a folder of audio, a manifest, or a corpus in another known format"
        )
    found = next((name for name, candidate in FORMATS.items() if candidate.matches(path)), None)
    if found is None and not path.is_dir():
        raise ValueError(
            f"{path} is neither a folder of audio nor a manifest (.csv, .tsv, .parquet or .jsonl), nor in another known format; the "
            f"formats are {', '.join(FORMATS)}"
        )
    return found or "folder"
