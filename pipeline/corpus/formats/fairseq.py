"""fairseq's manifests for wav2vec and HuBERT: a ``.tsv`` with a root folder, then a path and a number of samples in each line."""

from pathlib import Path

from ray_distill.pipeline.corpus.formats.file_splits import split_of_stem
from ray_distill.pipeline.corpus.formats.hidden import visible
from ray_distill.pipeline.corpus.formats.text_lines import read_lines
from ray_distill.pipeline.corpus.found import FoundFile, Search, without_suffix

_TRANSCRIPTS = (".wrd", ".ltr", ".phn")


def matches(path: Path) -> bool:
    """Return whether a file is such a manifest, or a folder has one."""
    return bool(_manifests(path))


def _manifests(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(visible(path.glob("*.tsv"), path))
    return [file for file in files if file.suffix.lower() == ".tsv" and _is_manifest(file)]


def _is_manifest(file: Path) -> bool:
    try:
        lines = read_lines(file)
        (_, root), (_, first) = next(lines, (0, "")), next(lines, (0, ""))
    except ValueError:
        return False
    return "\t" not in root and first.count("\t") == 1 and first.partition("\t")[2].strip().isdigit()


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the audio of a manifest, or of all manifests in a folder, whose names are the splits.

    The id is the path below the root, without suffix. A file beside the manifest with the same stem and the suffix ``.wrd``,
    ``.ltr`` or ``.phn`` has the transcripts, one in each line. The numbers of samples are not used, since all audio is decoded.

    Raises:
        ValueError: A line has not two columns, or there are more or fewer transcripts than files.
    """
    manifests = _manifests(path)
    if not manifests:
        raise ValueError(
            f"{path} has no fairseq manifest (.tsv); its first line is a folder, and each other line a path, a tab and a number of "
            "samples"
        )
    found = []
    for manifest in manifests:
        lines = read_lines(manifest)
        root = manifest.parent / next(lines)[1]
        names = []
        for number, line in lines:
            name, tab, samples = line.partition("\t")
            if not tab or not name or not samples.strip().isdigit():
                raise ValueError(
                    f"line {number} of {manifest} is {line[:80]!r}; give a path, a tab and a number of samples"
                )
            names.append(name)
        split = split_of_stem(manifest.stem, len(manifests))
        for name, text in zip(names, _transcripts(manifest, len(names)), strict=True):
            id = without_suffix(name)
            found.append(FoundFile(id, root / name, split, f"file {manifest.name}", text=text))
    return found


def _transcripts(manifest: Path, count: int) -> list[str]:
    file = next((file for suffix in _TRANSCRIPTS if (file := manifest.with_suffix(suffix)).is_file()), None)
    if file is None:
        return [""] * count
    texts = file.read_text(encoding="utf-8").splitlines()
    if len(texts) != count:
        raise ValueError(
            f"{file} has {len(texts)} lines, but {manifest} has {count} files; give one transcript for each file, or remove it"
        )
    if file.suffix == ".ltr":  # "H E L L O | W O R L D |"
        texts = ["".join(" " if letter == "|" else letter for letter in text.split()) for text in texts]
    return [text.strip() for text in texts]
