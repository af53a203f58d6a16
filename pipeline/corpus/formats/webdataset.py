"""WebDataset: tar files whose members with one name and several suffixes are one utterance."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ray_distill.pipeline.corpus.formats.hidden import hidden, is_hidden, visible
from ray_distill.pipeline.corpus.formats.text_lines import text_of
from ray_distill.pipeline.corpus.found import FoundFile, Search, Skipped
from ray_distill.pipeline.corpus.splits import NO_SPLIT, split_of_folders
from ray_distill.pipeline.corpus.suffixes import SUFFIXES, UNSUPPORTED
from ray_distill.teacher_cache.sources.address import AudioAddress

_COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
_MAX_TEXT = 1 << 20
"""Maximum number of bytes of a member with text."""


def matches(path: Path) -> bool:
    """Return whether a file is a tar file, or a folder has some."""
    return bool(visible(_shards(path), path))


def _shards(path: Path) -> list[Path]:
    endings = (".tar", *_COMPRESSED)
    if path.is_file():
        return [path] if path.name.lower().endswith(endings) else []
    return sorted(
        file for pattern in ("*.*", "*/*.*") for file in path.glob(pattern) if file.name.lower().endswith(endings)
    )


@dataclass
class _Sample:
    """The members of a key in a tar file. ``labels`` has the labels by what is between the key and the last suffix, mostly nothing."""

    shard: Path
    key: str
    audio: AudioAddress | None = None
    middle: str = ""
    labels: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, str]:
        """The labels of the audio: those with all of its name (``1.x.txt`` for ``1.x.wav``), or else with its key (``1.txt``)."""
        return self.labels.get("", {}) | self.labels.get(self.middle, {})


def find(path: Path, search: Search) -> list[FoundFile]:
    """Return the audio of a tar file, or of all tar files in a folder and in the folders in it.

    The key of a member is its path up to the first dot of its name. The id is the key or, if one occurs twice, the tar file's name
    and the key. ``KEY.txt`` is the transcript; ``KEY.json`` may have ``text`` (or ``transcript``) and ``speaker`` (or
    ``speaker_id``), which count first. A second audio of a key is listed. The split is a word in the tar file's name or
    folder. Members are never extracted: audio is read from its place in the tar file. Links in it are not followed but listed, as is
    audio in other formats.

    Raises:
        ValueError: There is no tar file, or one is compressed or damaged.
    """
    every = _shards(path)
    shards = visible(every, path)
    search.skipped.extend(hidden(file) for file in every if file not in shards)
    if not shards:
        raise ValueError(f"{path} has no tar file, so it is no WebDataset")
    samples: list[_Sample] = []
    for shard in shards:
        if shard.name.lower().endswith(_COMPRESSED):
            raise ValueError(
                f"{shard} is compressed, so its audio can't be read in place; decompress it to a .tar file"
            )
        samples += [sample for sample in _samples(shard, search) if sample.audio is not None]
    repeated = max(Counter(sample.key for sample in samples).values(), default=1) > 1
    splits = {shard: _split(shard, path, search.wanted) for shard in shards}
    named = any(splits.values())
    found = []
    for sample in samples:
        split = splits[sample.shard]
        found.append(
            FoundFile(
                f"{sample.shard.stem}/{sample.key}" if repeated else sample.key,
                sample.shard,
                split or (NO_SPLIT if named else None),
                f"tar file {sample.shard.name}" if split else "outside the splits" if named else "",
                speaker=sample.texts.get("speaker", ""),
                text=sample.texts.get("text", ""),
                inside=sample.audio,
            )
        )
    return found


def _split(shard: Path, path: Path, wanted: list[str]) -> str | None:
    folders = shard.relative_to(path).parts[:-1] if path.is_dir() else ()
    split = split_of_folders((*folders, shard.stem.rstrip("0123456789").rstrip("-_.") or shard.stem), wanted, shard)
    return None if split is None else split[0]


def _samples(shard: Path, search: Search) -> list[_Sample]:
    samples: dict[str, _Sample] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                middle, _, last = suffix.lower().rpartition(".")
                suffix = f".{last}"
                is_audio = suffix in SUFFIXES
                if is_hidden(name):
                    if is_audio:
                        search.skipped.append(hidden(shard, member.name))
                    continue
                if suffix in UNSUPPORTED or (is_audio and not _is_plain(member)):
                    reason = "it is a link" if is_audio else f"libsndfile doesn't read {suffix} files"
                    message = f"{member.name[:200]} in {shard} can't be used, since {reason}"
                    search.skipped.append(Skipped(shard, "unsupported_format", message))
                    continue
                if not _is_plain(member):
                    continue
                key = (name.parent / stem).as_posix()
                sample = samples.setdefault(key, _Sample(shard, key))
                if is_audio and sample.audio is not None:
                    message = (
                        f"{member.name[:200]} is the second audio of the key {key[:200]!r} in {shard}, of which the first is used; a "
                        "key ends at the first dot of a name and must be unique in its tar file"
                    )
                    search.skipped.append(Skipped(shard, "duplicate_id", message))
                elif is_audio:
                    sample.middle = middle
                    sample.audio = AudioAddress(
                        str(shard), offset=member.offset_data, size=member.size, name=member.name[:200]
                    )
                elif member.name not in seen and suffix in (".txt", ".json") and member.size <= _MAX_TEXT:
                    seen.add(member.name)
                    if opened := tar.extractfile(member):
                        labels = sample.labels.setdefault(middle, {})
                        labels |= dict(_labels(suffix, opened.read(), labels))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard} can't be read as a tar file ({error})") from error
    return list(samples.values())


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Return whether a member is a file whose bytes are in one piece."""
    return member.isreg() and not member.issparse()


def _labels(suffix: str, content: bytes, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    text = content.decode("utf-8", errors="replace")
    if suffix == ".txt":
        if "text" not in known:
            yield "text", text_of(text)
        return
    try:
        tree: Any = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(tree, dict):
        for name, keys in (("text", ("text", "transcript")), ("speaker", ("speaker", "speaker_id"))):
            value = next((tree[key] for key in keys if isinstance(tree.get(key), (str, int))), "")
            if value != "":
                yield name, text_of(value)
