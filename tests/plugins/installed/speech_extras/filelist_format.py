"""A corpus format: file lists of speech synthesis, ``train.filelist`` and so on, with lines ``PATH|TEXT``."""

from pathlib import Path

from ray_distill.pipeline.corpus.found import FoundFile, Search


def matches(path: Path) -> bool:
    """See `CorpusFormat.matches`."""
    return bool(_lists(path))


def find(path: Path, search: Search) -> list[FoundFile]:
    """See `CorpusFormat.find`. The name of a list is its split; paths start at its folder."""
    found = []
    for file in _lists(path):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            audio, bar, text = line.partition("|")
            if not bar:
                raise ValueError(f"line {number} of {file} has no bar; write PATH|TEXT")
            audio_file = file.parent / audio
            found.append(FoundFile(Path(audio).stem, audio_file, file.stem, f"file {file.name}", text=text))
    return found


def _lists(path: Path) -> list[Path]:
    return [path] if path.suffix == ".filelist" else sorted(path.glob("*.filelist"))
