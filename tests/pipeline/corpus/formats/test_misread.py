"""Corpora of which a part would be dropped or read as something else are refused in a sentence, or read as they are meant."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_distill.pipeline.corpus.search import find_audio

Writer = Callable[..., Path]


def audio(*files: Path | None) -> pa.Array:
    rows = [None if file is None else {"bytes": file.read_bytes(), "path": file.name} for file in files]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def refuse(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_audio(path, None, None)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes columns to a Parquet file of a dataset, and returns its folder."""

    def write(**columns: Any) -> Path:
        folder = tmp_path / "dataset"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")
        return folder

    return write


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_that_says_the_split_by_another_name_is_refused(
    tmp_path: Path, write_audio: Writer, kind: str
) -> None:
    files = [write_audio(tmp_path / f"{n}.wav") for n in range(3)]

    def manifest(**columns: list[Any]) -> Path:
        names, rows = list(columns), list(zip(*columns.values(), strict=True))
        path = tmp_path / f"audio.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table(columns), path)
        elif kind == "csv":
            path.write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows)]) + "\n")
        else:
            path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
        return path

    paths = [str(file) for file in files]
    message = (
        r"the column 'subset' of the manifest .* seems to say what is for training, as with 'test'; rename it to split"
    )
    refuse(manifest(path=paths, subset=["train", "test", "dev"]), message)
    assert len(find_audio(manifest(path=paths, subset=["a", "b", "c"], fold=[1, 2, 3]), None, None).entries) == 3
    assert len(find_audio(manifest(path=paths, subset=["test"] * 3, split=["train"] * 3), None, None).entries) == 3


def test_one_of_several_columns_of_audio_is_not_chosen(
    tmp_path: Path, table: Callable[..., Path], write_audio: Writer
) -> None:
    one, two = write_audio(tmp_path / "1.wav"), write_audio(tmp_path / "2.wav")
    message = r"0001\.parquet has several columns of audio, noisy, clean, of which one is used; rename it to audio"
    refuse(table(noisy=audio(one), clean=audio(two)), message)
    found = find_audio(table(noisy=audio(one), audio=audio(two)), None, None)
    assert [entry.inside and entry.inside.column for entry in found.entries] == ["audio"]


def test_the_column_split_of_a_dataset_counts(tmp_path: Path, table: Callable[..., Path], write_audio: Writer) -> None:
    files = [write_audio(tmp_path / f"{n}.wav") for n in range(3)]
    splits = ["train", "validation", "test"]
    # The hub names a dataset that is pushed as a whole "train".
    for kind in (pa.string(), pa.dictionary(pa.int32(), pa.string())):
        found = find_audio(table(audio=audio(*files), split=pa.array(splits, kind)), None, None)
        assert [(entry.id, entry.role, entry.origin) for entry in found.entries] == [
            ("0", "train", "column split"),
            ("1", "validation", "column split"),
        ]
        assert [skip.reason for skip in found.skipped] == ["unused_split"]
    refuse(table(audio=audio(*files), split=["train", "test", None]), "row 2 of .* has no split; fill in the column")
    found = find_audio(table(audio=audio(*files), split=[0, 1, 2]), None, None)
    assert {entry.split for entry in found.entries} == {"train"}


def test_columns_of_pieces_in_a_dataset_are_said(
    tmp_path: Path, table: Callable[..., Path], write_audio: Writer
) -> None:
    file = write_audio(tmp_path / "1.wav")
    (note,) = find_audio(table(audio=audio(file), begin_time=[0.5], end_time=[0.7], duration=[0.2]), None, None).notes
    assert "the columns begin_time, end_time of" in note and "each row's whole audio is an utterance" in note


def test_a_dataset_without_bytes_says_what_it_has(
    tmp_path: Path, table: Callable[..., Path], write_audio: Writer
) -> None:
    file = write_audio(tmp_path / "1.wav")
    for column in ([file.read_bytes()], [str(file)], [{"audio": {"bytes": b"", "path": ""}}], [[0.5]]):
        refuse(
            table(audio=column, text=["x"]), r"0001\.parquet has no column with the bytes .* columns are audio, text;"
        )
    refuse(table(audio=audio(file, None)), "row 1 of .* has neither the bytes of audio nor the name of a file; remove")


def test_a_folder_counts_before_a_link_to_it(tmp_path: Path, write_audio: Writer) -> None:
    for name in ("train/a", "dev/b"):
        write_audio(tmp_path / "corpus" / f"{name}.wav")
    (tmp_path / "corpus/backup").mkdir()
    (tmp_path / "corpus/backup/now").symlink_to("../train")
    (tmp_path / "corpus/all").symlink_to("train")
    (tmp_path / "corpus/train/again").symlink_to("..")
    found = find_audio(tmp_path / "corpus", None, None)
    assert [(entry.id, entry.role) for entry in found.entries] == [("dev/b", "validation"), ("train/a", "train")]


def test_a_recording_of_kaldi_has_one_file(tmp_path: Path, write_audio: Writer) -> None:
    one, two = write_audio(tmp_path / "1.wav"), write_audio(tmp_path / "2.wav")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/wav.scp").write_text(f"r {one}\nr {one}\n")
    assert len(find_audio(tmp_path / "data", None, None).entries) == 1
    (tmp_path / "data/wav.scp").write_text(f"r {one}\nr {two}\n")
    refuse(tmp_path / "data", r"line 2 of .*wav.scp names '.*2\.wav' as the recording 'r', which is '.*1\.wav' before")
    (tmp_path / "data/wav.scp").write_text(f"r {one}\n")
    (tmp_path / "data/segments").write_text("")
    refuse(tmp_path / "data", "is in the format kaldi, but names no audio; add audio")


def test_speaker_0_of_a_webdataset(tmp_path: Path, write_audio: Writer) -> None:
    file = write_audio(tmp_path / "a.wav")
    (tmp_path / "a.json").write_text(json.dumps({"speaker_id": 0, "text": ""}))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(file, "a.wav")
        tar.add(tmp_path / "a.json", "a.json")
    (entry,) = find_audio(tmp_path / "train.tar", None, None).entries
    assert (entry.speaker, entry.text) == ("0", "")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"path": "a.wav", "text": {"raw": "x"}}', r'the text .* is \{"raw": "x"\}; give one text'),
        ("a.jsonl", '{"path": ["a.wav", "b.wav"]}', r"the path of an object in the manifest .*a\.jsonl is \["),
        ("a.jsonl", '{"path": "a.wav", "segments": [{"start": 0, "end": 1}]}', "has the column 'segments', but pieces"),
        ("a.csv", "path,from,to\na.wav,0,1", "has the column 'from', but pieces of files are given by"),
        ("a.csv", "path,tstart,tend\na.wav,0,1", "has the column 'tstart', but pieces of files are given by"),
        ("a.csv", "path;start;end\na.wav;0,5;1,5", "; separate the columns by commas, and write numbers with a dot$"),
        (
            "a.tsv",
            "path,split\na.wav,train",
            "no column 'path'; its columns are path,split; separate the columns by tabs$",
        ),
        ("a.json", '{"audio_filepath": ["a.wav", "b.wav"]}', "has a list as audio_filepath, but each utterance must"),
    ],
)
def test_lines_that_say_more_than_is_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    refuse(tmp_path / name, message)


def test_the_row_numbers_of_pandas_are_not_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",path,link_to_source\n0,a.wav,x\n")
    (note,) = find_audio(tmp_path / "a.csv", None, None).notes
    assert note.startswith("the columns link_to_source of")
