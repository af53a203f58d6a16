"""Hidden files and folders, such as a trash or the notes of macOS beside each file, are no part of a corpus."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_distill.pipeline.corpus.search import find_audio

Writer = Callable[..., Path]

NOTES = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)
"""The beginning of a file ``._NAME``, as macOS writes it on disks and into archives of others."""


def hidden_in(path: Path, ids: list[str], format: str | None = None) -> list[str]:
    """Return the names of the hidden files of a corpus, which has certain utterances and skips nothing else."""
    found = find_audio(path, None, None, format=format)
    assert [entry.id for entry in found.entries] == ids
    assert {skip.reason for skip in found.skipped} == {"hidden"}
    return sorted(str(skip.path.relative_to(path)) for skip in found.skipped)


def test_a_folder(tmp_path: Path, write_audio: Writer) -> None:
    corpus = tmp_path / ".cache" / "corpus"  # Only names below the corpus count.
    for name in ("a.wav", ".b.wav", ".Trash/files/c.wav", "d/.store/e.wav"):
        write_audio(corpus / name)
    (corpus / "._a.wav").write_bytes(NOTES)
    (corpus / ".git").mkdir()  # Nothing is said of a hidden folder without audio.
    (corpus / ".notes.txt").write_text("a")
    (corpus / "train").symlink_to(corpus / "d" / ".store")  # A link that is not hidden is meant.
    found = find_audio(corpus, ["train"], None)
    assert [entry.id for entry in found.entries] == ["train/e"]
    (corpus / "train").unlink()
    assert hidden_in(corpus, ["a"]) == [".Trash", "._a.wav", ".b.wav", "d/.store"]
    (corpus / "a.wav").unlink()
    with pytest.raises(ValueError, match="contains no audio .*is hidden, since its name begins with a dot"):
        find_audio(corpus, None, None)


def test_hidden_audio_does_not_make_a_dataset_a_folder(tmp_path: Path, write_audio: Writer) -> None:
    audio = write_audio(tmp_path / ".cache" / "a.wav")
    rows = pa.array([{"bytes": audio.read_bytes(), "path": "b.wav"}])
    pq.write_table(pa.table({"audio": rows}), tmp_path / "data.parquet")
    (tmp_path / "._data.parquet").write_bytes(NOTES)
    assert hidden_in(tmp_path, ["b"]) == ["._data.parquet"]


def test_a_webdataset(tmp_path: Path, write_audio: Writer) -> None:
    audio = write_audio(tmp_path / "a.wav").read_bytes()
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for name, content in (("./._a.wav", NOTES), ("./a.wav", audio), ("./._b.wav", NOTES), ("./b.wav", audio)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "shards" / "._0.tar").write_bytes(NOTES)
    assert hidden_in(tmp_path / "shards", ["a", "b"]) == ["._0.tar", "0.tar", "0.tar"]


def test_tables(tmp_path: Path, write_audio: Writer) -> None:
    audio = write_audio(tmp_path / "audio" / "a.wav")
    for folder in (tmp_path / "kaldi" / "train", tmp_path / "kaldi" / ".backup"):
        folder.mkdir(parents=True)
        (folder / "wav.scp").write_text(f"a {audio}\n")
    found = find_audio(tmp_path / "kaldi", None, None)
    assert [(entry.id, entry.split) for entry in found.entries] == [("a", "train")]
    (tmp_path / "nemo").mkdir()
    for name in ("train.json", ".train.json"):
        (tmp_path / "nemo" / name).write_text(f'{{"audio_filepath": "{audio}"}}\n')
    assert [entry.split for entry in find_audio(tmp_path / "nemo", None, None).entries] == ["train"]
