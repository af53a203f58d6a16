"""Corpus formats: one module for each, told apart by looking, or named by ``corpus.format``."""

from pathlib import Path

from ray_distill.pipeline.corpus.formats import (
    common_voice,
    fairseq,
    folder,
    kaldi,
    manifest,
    nemo,
    voxpopuli,
    webdataset,
)
from ray_distill.pipeline.corpus.formats.corpus_format import CorpusFormat
from ray_distill.pipeline.corpus.formats.format_of_package import format_of_package
from ray_distill.pipeline.corpus.formats.huggingface import dataset
from ray_distill.pipeline.corpus.formats.lhotse import manifests, shar
from ray_distill.plugins import PluginError, find_plugin, of_packages, plugin_names

# The first one that matches is used. Formats with a table of their audio come before a folder of audio, and this one before
# archives, since the archives of a download often remain beside its audio.
FORMATS: dict[str, CorpusFormat] = {
    "kaldi": kaldi,
    "lhotse_shar": shar,
    "lhotse": manifests,
    "nemo": nemo,
    "common_voice": common_voice,
    "voxpopuli": voxpopuli,
    "fairseq": fairseq,
    "folder": folder,
    "huggingface": dataset,
    "webdataset": webdataset,
    "manifest": manifest,
}
"""The formats by name."""


def check_format(name: str) -> str:
    """Return the name of a format, which an installed package may add.

    Raises:
        ValueError: There is no such format.
    """
    if name not in FORMATS and find_plugin("corpus format", name) is None:
        raise ValueError(
            f"there is no corpus format {name!r}; the formats are {', '.join(FORMATS)}{of_packages('corpus format', FORMATS)}"
        )
    return name


def open_format(name: str) -> CorpusFormat:
    """Return a format. One of another package is imported.

    Raises:
        ValueError: There is no such format, or the other package can't be used.
    """
    return FORMATS.get(check_format(name)) or format_of_package(name)


def matches(name: str, path: Path) -> bool:
    """Return whether a file or folder is in a format of this package. One in a folder that this user may not read is in none."""
    try:
        return FORMATS[name].matches(path)
    except PermissionError:
        return False  # The search of a folder says what can't be read.


def recognise(path: Path) -> str:
    """Return the name of the format of a file or folder.

    The formats of other packages are only asked if none of this package matches, so that an installed package can't change how a
    corpus is read. One that is broken is passed over, and is named if no other matches.

    Raises:
        ValueError: There is nothing at the path, or it is a file in no known format.
    """
    if not path.exists():
        raise ValueError(
            f"there is no corpus at {path}; give a folder of audio, a manifest, or a corpus in another known format"
        )
    found = next((name for name in FORMATS if matches(name, path)), None)
    broken = ""
    for name in [] if found else plugin_names("corpus format"):
        try:
            if name not in FORMATS and format_of_package(name).matches(path):
                return name
        except PluginError as error:
            broken = f"; {error}"
    if found is None and not path.is_dir():
        raise ValueError(
            f"{path} is neither a folder of audio nor a manifest (.csv, .tsv, .parquet or .jsonl), nor in another known format; the "
            f"formats are {', '.join(FORMATS)}{of_packages('corpus format', FORMATS)}{broken}"
        )
    return found or "folder"
