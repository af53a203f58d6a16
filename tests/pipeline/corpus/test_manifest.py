"""Manifests: columns, splits, quotes and encodings."""

import codecs
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_distill.pipeline.corpus.formats import manifest, manifest_table
from ray_distill.pipeline.corpus.formats.file_splits import located
from ray_distill.pipeline.corpus.formats.text_lines import seconds_of, text_of
from ray_distill.pipeline.corpus.found import FoundFile, Search, piece_id, without_suffix
from ray_distill.pipeline.corpus.search import FoundCorpus, find_audio


def find(tmp_path: Path, text: str | bytes, train: list[str] | None = None) -> FoundCorpus:
    path = tmp_path / "m.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return find_audio(path, train, None)


@pytest.mark.parametrize("name", ["val", "validation", "valid", "Dev", "devel", "heldout", "held-out"])
def test_validation_rows_are_used(tmp_path: Path, name: str) -> None:
    rows = [f"t{n}.wav,train" for n in range(30)] + [f"v{n}.wav,{name}" for n in range(10)]
    found = find(tmp_path, "path,split\n" + "\n".join(rows))
    assert [entry.role for entry in found.entries] == ["train"] * 30 + ["validation"] * 10
    assert [(split.name, split.files, split.origin) for split in found.splits] == sorted(
        [("train", 30, "column split of m.csv"), (name, 10, "column split of m.csv")]
    )


@pytest.mark.parametrize("name", ["test", "TEST", "eval", "other"])
def test_rows_of_other_splits_are_counted_and_listed(tmp_path: Path, name: str) -> None:
    found = find(tmp_path, f"path,split\na.wav,train\nb.wav,{name}\nc.wav,{name}\n")
    assert [(skip.path.name, skip.reason) for skip in found.skipped] == [
        ("b.wav", "unused_split"),
        ("c.wav", "unused_split"),
    ]
    assert {split.name: (split.files, split.role) for split in found.splits} == {
        "train": (1, "train"),
        name: (2, "not used"),
    }
    with pytest.raises(ValueError, match=r"the split 'train_dev' of .* could be for train or validation; set"):
        find(tmp_path, "path,split\na.wav,train\nb.wav,train_dev\n")


def test_names_of_columns(tmp_path: Path) -> None:
    found = find(tmp_path, 'Path, ID , SPLIT,text, duration\na.wav, 007, train, "one, two", 1\n b.wav , 8,dev,x,2\n')
    assert [(entry.path.name, entry.id, entry.split) for entry in found.entries] == [
        ("a.wav", "007", "train"),
        ("b.wav", "8", "dev"),
    ]
    assert len(found.notes) == 1 and "the columns duration of" in found.notes[0]
    table = pa.table({"PATH": ["a.wav", "b.wav"], "Split ": ["train", "val"]})
    pq.write_table(table, tmp_path / "m.parquet")
    assert [entry.role for entry in find_audio(tmp_path / "m.parquet", None, None).entries] == ["train", "validation"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,start,duration\na.wav,0,1\na.wav,1,2\n", "the column 'duration', but pieces of files are given by"),
        ("path,start,end\na.wav,0,1\na.wav,2,1\n", "row 2 of the manifest .*m.csv has a piece from 2 s to 1 s; its end must"),
        ("path,start\na.wav,nan\n", "the start in row 1 of .* is 'nan'; give seconds"),
        ("path,channel\na.wav,left\n", "the channel in row 1 of .* is 'left'; give a number, counted from 0, or mix"),
        ("path,offset_seconds\na.wav,0\n", "the column 'offset_seconds'"),
        ("path,path\na.wav,b.wav\n", "has 2 columns 'path'; rename or remove"),
        ("path,text,Text\na.wav,b,c\n", "has 2 columns 'text'"),
        ("path;split\na.wav;train\n", "separate the columns by commas"),
        ("path,split\na.wav,train,x\n", "line 2 has 3 values, but the first line names 2 columns"),
        ('path,text\na.wav,x\n"b\nc.wav",y\n', "the path of line 3 has several lines"),
        ('path,text\na.wav,x\nb.wav,"y" z\n', "line 3 has a quote"),
        (b"path\n\xff.wav\n", "save it as UTF-8"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(tmp_path, text)


@pytest.mark.parametrize("quoted", ['"{}.wav,x', '{}.wav,"x'])
def test_an_open_quote_is_refused_with_its_line(tmp_path: Path, quoted: str) -> None:
    rows = [quoted.format(n) if n == 10 else f"{n}.wav,x" for n in range(1, 41)]
    with pytest.raises(ValueError, match=r"line 11 has a quote that isn't closed"):
        find(tmp_path, "path,text\n" + "\n".join(rows) + "\n")
    rows[29] = '30.wav,"x, y"'
    with pytest.raises(ValueError, match=r"line 11 has a quote that isn't closed"):
        find(tmp_path, "path,text\n" + "\n".join(rows) + "\n")


def test_texts_may_have_quotes_and_several_lines(tmp_path: Path) -> None:
    found = find(tmp_path, 'path,text\na.wav,"one ""two""\nthree"\n\nb.wav,5" tall\n')
    assert [entry.id for entry in found.entries] == ["a", "b"]


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (b"", "utf-16-le"),
        (b"", "utf-16-be"),
    ],
)
def test_encodings(tmp_path: Path, mark: bytes, encoding: str) -> None:
    text = "path,split\r\nä.wav,train\r\nb.wav,dev\r\n"
    found = find(tmp_path, mark + text.encode(encoding))
    assert [(entry.path.name, entry.role) for entry in found.entries] == [("b.wav", "validation"), ("ä.wav", "train")]


PATHS = (
    *("a.wav", "/b/c.d/e.flac", "./f.wav", "g//h.wav", "i/../j.wav", ".k", "l/.wav", "m..wav", "n.", "o/", "..", "p\u00a0.wav"),
    *("s3://bucket/q.flac", "https://host/r%20s.ogg?t", "file:///tmp/u%20v.wav", "{w}.wav", "y/z"),
)  # fmt: skip
STARTS = ("", "0", "1.5", "1e1", "0_1", " 2 ", ".5", "3.", "12.340000001")
CHANNELS = ("", "0", "1.0", "mix", "12", "\u0663")
TEXTS = ("", "two  spaces", " around ", "a\tb", "c\u2003d", 'e "f", g')


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_columns_have_the_values_of_their_rows(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_BATCH", 5)
    monkeypatch.setattr(manifest_table, "_BATCH", 7)
    rows = [
        {
            "path": f"{PATHS[n % len(PATHS)]}",
            "start": STARTS[n % len(STARTS)],
            "end": "" if n % 4 else "99",
            "channel": CHANNELS[n % len(CHANNELS)],
            "speaker": TEXTS[n % len(TEXTS)],
            "text": TEXTS[n % 5],
        }
        for n in range(len(PATHS) * len(STARTS))
    ]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet", row_group_size=20)
    else:
        rows = [{name: text_of(value) for name, value in row.items()} for row in rows]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(manifest.find(tmp_path / f"m.{kind}", Search()))
    for row, entry in zip(rows, found, strict=True):
        start, end = (seconds_of(row[name], "") for name in ("start", "end"))
        channel = (
            {"": None, "mix": "mix"}.get(row["channel"])
            if row["channel"] in ("", "mix")
            else int(float(row["channel"]))
        )
        path, inside = located(tmp_path, row["path"])
        id = piece_id(without_suffix(row["path"]), start, end, channel)
        texts = text_of(row["speaker"]), text_of(row["text"])
        assert entry == FoundFile(id, path, None, "", None, start, end, channel, *texts, inside)


def test_memory_grows_by_few_bytes_per_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_table, "_BATCH", 1000)
    find(tmp_path, "path,id\na.wav,a\n")
    peaks, sizes = [], []
    for rows in (2_000, 8_000):
        text = "path,id\n" + "".join(f"/corpus/{n % 50}/{n:09d}.flac,{n:09d}\n" for n in range(rows))
        (tmp_path / f"{rows}.csv").write_text(text)
        tracemalloc.start()
        found = find_audio(tmp_path / f"{rows}.csv", None, None).entries
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(found.table.nbytes)
    # A FoundFile with its Path has more than 700 bytes.
    assert (peaks[1] - peaks[0]) / 6_000 < 40
    assert (sizes[1] - sizes[0]) / 6_000 < 80
