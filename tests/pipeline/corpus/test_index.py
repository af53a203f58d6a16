"""Corpora: the three kinds, the list of broken files, and the reuse of an index that is still valid."""

import csv
import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from ray_distill.pipeline.corpus import decoding
from ray_distill.pipeline.corpus.index import CorpusIndex, index_corpus
from ray_distill.teacher_cache.audio import load_audio


def write(path: Path, seconds: float = 0.3, rate: int = 16_000, channels: int = 1, pitch: float = 200) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, np.stack([wave] * channels, 1), rate)
    return path


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    root = tmp_path / "LibriSpeech"
    for split, speaker in (("train-clean-5", 19), ("train-clean-5", 26), ("dev-clean", 84), ("test-clean", 61)):
        for n in range(2):
            write(root / split / str(speaker) / "7" / f"{speaker}-7-000{n}.flac", 0.3 + 0.1 * n, pitch=100 + speaker)
    (root / "SPEAKERS.TXT").write_text("not audio")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for n, suffix in enumerate(("wav", "flac", "ogg", "mp3", "WAV")):
        write(root / f"sub-{n % 2}" / f"clip{n}.{suffix}", 0.5, 44_100, 2, 150 + 50 * n)
    return root


def ids(index: CorpusIndex, split: str) -> list[str]:
    return [utterance.id for utterance in index.utterances if utterance.split == split]


def test_librispeech(librispeech: Path, tmp_path: Path) -> None:
    seen = []
    index = index_corpus(
        librispeech, output=tmp_path / "index", progress=lambda done, total: seen.append((done, total))
    )
    assert ids(index, "train") == ["19-7-0000", "19-7-0001", "26-7-0000", "26-7-0001"]
    assert ids(index, "validation") == ["84-7-0000", "84-7-0001"]
    assert {skip.reason for skip in index.skipped} == {"unused_split"} and index.num_unused == 2 and not index.reused
    assert seen == [(n, 6) for n in range(1, 7)]
    first = index.utterances[0]
    assert first.path == str(librispeech / "train-clean-5/19/7/19-7-0000.flac")
    assert first.num_samples == 4800
    assert first.sha256 == hashlib.sha256(load_audio(first.path).tobytes()).hexdigest()
    assert index.hours == pytest.approx(6 * 0.35 / 3600)


def test_named_splits(librispeech: Path, tmp_path: Path) -> None:
    index = index_corpus(
        librispeech,
        train_splits=["dev-clean", "test-clean"],
        validation_splits=["train-clean-5"],
        output=tmp_path / "i",
    )
    assert {name[:2] for name in ids(index, "train")} == {"84", "61"}
    assert {name[:2] for name in ids(index, "validation")} == {"19", "26"}
    only = index_corpus(librispeech, train_splits=["test-clean"], output=tmp_path / "j")
    assert {name[:2] for name in ids(only, "train")} == {"61"}
    assert {name[:2] for name in ids(only, "validation")} == {"84"}


def test_a_split_alone_lends_some_of_its_own_for_validation(librispeech: Path, tmp_path: Path) -> None:
    shutil.rmtree(librispeech / "dev-clean")
    index = index_corpus(librispeech, output=tmp_path / "index")
    assert len(ids(index, "train")) == 3
    assert len(ids(index, "validation")) == 1


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train_splits": ["train-clean-100"]},
            "no split 'train-clean-100'; its splits are dev-clean, test-clean, train-clean-5",
        ),
        ({"validation_splits": ["dev"]}, "no split 'dev'"),
        ({"train_splits": ["a,b"]}, r"no split 'a,b'; .*; several are written as a list, \[a,b\]$"),
        ({"train_splits": ["dev-clean"], "validation_splits": ["dev-clean"]}, "used for both training and validation"),
        ({"train_splits": []}, "left for the train split"),
    ],
)
def test_wrong_splits(librispeech: Path, tmp_path: Path, splits: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index_corpus(librispeech, output=tmp_path / "index", **splits)


def test_no_split_for_training(librispeech: Path, tmp_path: Path) -> None:
    shutil.rmtree(librispeech / "train-clean-5")
    with pytest.raises(
        ValueError, match="starts with 'train'; set corpus.train_splits to some of dev-clean, test-clean"
    ):
        index_corpus(librispeech, output=tmp_path / "index")


def test_a_file_beside_the_splits_and_a_stem_twice_are_listed(librispeech: Path, tmp_path: Path) -> None:
    write(librispeech / "stray.flac")
    write(librispeech / "train-clean-5" / "99" / "7" / "19-7-0000.flac")
    index = index_corpus(librispeech, output=tmp_path / "index")
    assert {(skip.path.name, skip.reason) for skip in index.skipped} == {
        ("stray.flac", "no_split"),
        ("19-7-0000.flac", "duplicate_id"),
        ("61-7-0000.flac", "unused_split"),
        ("61-7-0001.flac", "unused_split"),
    }
    assert len(index.utterances) == 6


def test_a_folder_of_anything(folder: Path, tmp_path: Path) -> None:
    index = index_corpus(folder, output=tmp_path / "index")
    assert {u.id for u in index.utterances} == {
        "sub-0/clip0",
        "sub-1/clip1",
        "sub-0/clip2",
        "sub-1/clip3",
        "sub-0/clip4",
    }
    assert len(ids(index, "validation")) == 1
    assert all(u.num_samples == pytest.approx(8000, abs=2500) for u in index.utterances)
    with pytest.raises(ValueError, match="has no splits, so 'train' can't be one"):
        index_corpus(folder, train_splits=["train"], output=tmp_path / "other")


def test_the_held_out_part_is_a_matter_of_ids(tmp_path: Path) -> None:
    for n in range(20):
        write(tmp_path / "a" / f"{n}.wav", 0.05)
    held_out = ids(index_corpus(tmp_path / "a", validation_fraction=0.2, output=tmp_path / "i"), "validation")
    assert len(held_out) == 4
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert ids(index_corpus(tmp_path / "b", validation_fraction=0.2, output=tmp_path / "j"), "validation") == held_out
    # Damage to a held-out file does not leave the validation split empty.
    (tmp_path / "a" / f"{held_out[0]}.wav").write_bytes(b"RIFF")
    again = index_corpus(tmp_path / "a", validation_fraction=0.01, output=tmp_path / "i")
    assert len(ids(again, "validation")) == 1 and again.skipped[0].reason == "undecodable"


def test_ambiguous_stems_keep_their_suffix(tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac", "b.wav"):
        write(tmp_path / "c" / name)
    index = index_corpus(tmp_path / "c", output=tmp_path / "index")
    assert [u.id for u in index.utterances] == ["a.flac", "a.wav", "b"]


def test_linked_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    (folder / "cycle").symlink_to(folder)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "speech").symlink_to(folder)
    assert len(index_corpus(tmp_path / "linked", output=tmp_path / "index").utterances) == 5


def test_audio_that_occurs_twice_is_used_and_said(tmp_path: Path) -> None:
    first = write(tmp_path / "c/train/a.wav", pitch=100)
    for n in range(3):
        write(tmp_path / f"c/train/other{n}.wav", pitch=300 + 50 * n)
    write(tmp_path / "c/dev/d.wav", pitch=150)
    assert index_corpus(tmp_path / "c", output=tmp_path / "plain").notes == ()
    (tmp_path / "c/train/b.wav").symlink_to(first)
    os.link(first, tmp_path / "c/train/hard.wav")
    again = "2 utterances have the same audio as another one, such as train/a and train/b, and all are used; remove links and copies"
    for _ in range(2):  # Also if the index is only read again.
        index = index_corpus(tmp_path / "c", output=tmp_path / "index")
        assert len(index.utterances) == 7 and len(index.notes) == 1 and index.notes[0].startswith(again)
    soundfile.write(tmp_path / "c/dev/copy.flac", soundfile.read(first, dtype="int16")[0], 16_000)
    (note,) = index_corpus(tmp_path / "c", output=tmp_path / "index").notes
    assert note.startswith("3 utterances have the same audio as another one")
    assert (
        "; the audio of 1 is in both the train and the validation split, so the validation loss is lower than" in note
    )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest(folder: Path, tmp_path: Path, kind: str) -> None:
    rows = {
        "path": ["folder/sub-0/clip0.wav", str(folder / "sub-1" / "clip1.flac"), "folder/nowhere.wav"],
        "id": ["0012", "b", "c"],
        "split": ["train", "valid", "train"],
        "text": ["one, two", "three", "four"],
    }
    manifest = tmp_path / f"corpus.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(rows), manifest)
    else:
        with manifest.open("w", newline="") as file:
            csv.writer(file).writerows([rows.keys(), *zip(*rows.values(), strict=True)])
    index = index_corpus(manifest, output=tmp_path / "index")
    assert [(u.id, u.split, u.path) for u in index.utterances] == [
        ("0012", "train", str(folder / "sub-0" / "clip0.wav")),
        ("b", "validation", str(folder / "sub-1" / "clip1.flac")),
    ]
    assert [(skip.path.name, skip.reason) for skip in index.skipped] == [("nowhere.wav", "missing")]


def test_manifest_of_paths_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path\nfolder/sub-0/clip0.wav\nfolder/sub-1/clip1.flac\nfolder/sub-1/clip1.flac\n")
    index = index_corpus(tmp_path / "m.csv", output=tmp_path / "index")
    assert [u.id for u in index.utterances] == ["folder/sub-0/clip0", "folder/sub-1/clip1"]
    assert [skip.reason for skip in index.skipped] == ["duplicate_id"]
    assert index.skipped[0].message.endswith("clip1.flac is listed twice")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "file\na.wav\n", "no column 'path'; its columns are file"),
        ("m.csv", "path,id\na.wav,\n", "row 1 of the manifest .* has no id"),
        ("m.csv", "path,id\na.wav\n", "can't be read"),
        ("m.csv", "", "can't be read"),
        ("m.csv", "path\n", "has a header, but no rows"),
        ("m.parquet", "path\na.wav\n", "can't be read"),
        ("m.txt", "path\na.wav\n", "neither a folder of audio nor a manifest"),
    ],
)
def test_wrong_manifests(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        index_corpus(tmp_path / name, output=tmp_path / "index")


def test_nothing_there_and_no_audio(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no corpus at"):
        index_corpus(tmp_path / "nowhere", output=tmp_path / "index")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="contains no audio"):
        index_corpus(tmp_path / "texts", output=tmp_path / "index")


def test_every_broken_file_is_listed_with_its_reason(folder: Path, tmp_path: Path) -> None:
    (folder / "zero.wav").write_bytes(b"")
    soundfile.write(folder / "nothing.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "brief.wav", np.zeros(399), 16_000)
    soundfile.write(folder / "endless.flac", np.zeros(16_000 * 3), 16_000)
    (folder / "text, with a comma.mp3").write_text("no audio at all")
    data = (folder / "sub-1" / "clip1.flac").read_bytes()
    (folder / "cut.flac").write_bytes(data[: len(data) // 2])
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    (folder / "gone.wav").symlink_to(folder / "nowhere")
    expected = {
        "zero.wav": "empty",
        "nothing.wav": "empty",
        "brief.wav": "too_short",
        "endless.flac": "too_long",
        "text, with a comma.mp3": "undecodable",
        "cut.flac": "undecodable",
        "nan.wav": "undecodable",
        "gone.wav": "missing",
    }
    bad_name = os.fsencode(folder) + b"/bad-\xff.wav"
    shutil.copy(folder / "sub-0" / "clip0.wav", bad_name)
    expected[os.fsdecode(b"bad-\xff.wav")] = "bad_name"
    index = index_corpus(folder, max_seconds=2, output=tmp_path / "index")
    assert {skip.path.name: skip.reason for skip in index.skipped} == expected
    assert len(index.utterances) == 5
    with (tmp_path / "index" / "skipped.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["path"]).name: row["reason"] for row in rows} == expected
    assert all(row["message"] for row in rows)
    again = index_corpus(folder, max_seconds=2, output=tmp_path / "index")
    assert again.reused and again.skipped == index.skipped


def test_nothing_usable_is_refused_every_time(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / "c" / f"{n}.wav", 0.01)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no usable audio is left for the train split .*3 too_short"):
            index_corpus(tmp_path / "c", output=tmp_path / "index")


def test_one_file_can_not_be_both_splits(tmp_path: Path) -> None:
    write(tmp_path / "c" / "a.wav")
    with pytest.raises(ValueError, match="no usable audio is left for the validation split"):
        index_corpus(tmp_path / "c", output=tmp_path / "index")


def test_reuse_without_decoding(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_corpus(folder, output=tmp_path / "index")

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "load_identified_audio", never)
        again = index_corpus(folder, output=tmp_path / "index")
        assert again.reused
        assert again.utterances == index.utterances and again.fingerprint == index.fingerprint
        assert CorpusIndex.load(tmp_path / "index").utterances == index.utterances
        for changed in ({"max_seconds": 30.0}, {"channel": 0}):
            with pytest.raises(AssertionError, match="decoded again"):
                index_corpus(folder, output=tmp_path / "index", **changed)
    # Files that were touched, replaced, added or removed are noticed.
    os.utime(folder / "sub-0" / "clip0.wav", ns=(1, 1))
    assert not index_corpus(folder, output=tmp_path / "index").reused
    write(folder / "sub-0" / "clip0.wav", pitch=999)
    changed_audio = index_corpus(folder, output=tmp_path / "index")
    assert not changed_audio.reused and changed_audio.fingerprint != index.fingerprint
    write(folder / "new.wav")
    assert len(index_corpus(folder, output=tmp_path / "index").utterances) == 6
    (folder / "new.wav").unlink()
    assert index_corpus(folder, output=tmp_path / "index").fingerprint == changed_audio.fingerprint
    # A missing file of the index is written again.
    (tmp_path / "index" / "index.parquet").unlink()
    with pytest.raises(ValueError, match="run the index stage"):
        CorpusIndex.load(tmp_path / "index")
    assert index_corpus(folder, output=tmp_path / "index").fingerprint == changed_audio.fingerprint


def test_the_fingerprint_is_of_audio_and_splits_not_of_places(librispeech: Path, tmp_path: Path) -> None:
    index = index_corpus(librispeech, output=tmp_path / "i")
    shutil.copytree(librispeech, tmp_path / "moved")
    assert index_corpus(tmp_path / "moved", output=tmp_path / "j").fingerprint == index.fingerprint
    other = index_corpus(librispeech, validation_splits=["test-clean"], output=tmp_path / "k")
    assert other.fingerprint != index.fingerprint


def test_real_librispeech(shared: Path, tmp_path: Path) -> None:
    index = index_corpus(shared / "speech" / "LibriSpeech", output=tmp_path / "index")
    assert index.num_unused == len(index.skipped)
    assert len(index.utterances) + index.num_unused == len(list((shared / "speech").rglob("*.flac")))
    assert 0 < len(ids(index, "validation")) < len(ids(index, "train"))


def test_folders_that_cannot_be_read_are_said(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir, closed = os.scandir, [speech_folder / "train-tones" / "0"]

    def guarded(folder: str) -> object:
        if Path(folder) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))  # Root can read every folder.
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    index = index_corpus(speech_folder, output=tmp_path / "index")
    assert [(skip.path, skip.reason) for skip in index.skipped] == [(closed[0], "unreadable_folder")]
    assert f"the folder {closed[0]} can't be read (Permission denied)" in (tmp_path / "index/skipped.csv").read_text()
    assert len(index.utterances) == 11
    is_file = Path.is_file

    def guarded_file(path: Path) -> bool:
        if path.parent in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", guarded_file)  # Formats look into folders for their files.
    assert len(index_corpus(speech_folder, output=tmp_path / "again").utterances) == 11
    closed[0] = speech_folder
    with pytest.raises(ValueError, match=f"the folder {speech_folder} can't be read"):
        index_corpus(speech_folder, output=tmp_path / "index")


def test_a_corpus_below_a_folder_that_is_not_utf8_is_one_sentence(tmp_path: Path) -> None:
    below = tmp_path / os.fsdecode(b"bad\xff")
    below.mkdir()
    (below / "train-a.wav").touch()
    (below / "m.csv").write_text("path,split\ntrain-a.wav,train\n")
    for corpus in (below, below / "m.csv"):
        with pytest.raises(
            ValueError, match=r"^the path of the corpus, .*bad.udcff.*, is not valid UTF-8; rename the folder$"
        ):
            index_corpus(corpus, output=tmp_path / "index")
