"""Skipped files in a table: the same lists, messages, CSV files and hashes as from one object for each."""

import csv
import hashlib
import io
import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from ray_distill.pipeline.corpus import found as found_module
from ray_distill.pipeline.corpus import index_files, search, splits
from ray_distill.pipeline.corpus.found import FoundFile, FoundFiles, Search, Skipped, SkippedFiles
from ray_distill.pipeline.corpus.index import CorpusIndex, index_corpus
from ray_distill.pipeline.corpus.index_files import index_states, read_skipped, write_skipped
from ray_distill.pipeline.corpus.search import find_audio
from ray_distill.teacher_cache.sources.address import AudioAddress

PATHS = (
    *("/b/z.wav", "/b/\udcff.wav", "/b/\udc80.wav", "/b/\udcc3.wav", "/b/é.wav", "/b/\ud7ff", "/b/\uffee", "/b/😀"),
    *("/b/z.wav", "/b/a,b", '/b/"q"', "/b/line\nbreak", "/b/re\rturn", "/b/ta\tb", "/b/\x7f", "/b/back\\slash", "a b"),
    *("https:/host/x.wav", "s3:/b", "s3:/\udcff", "S3:/b", "//b/c", "."),
)
MESSAGES = (
    "plain",
    "",
    'has "quotes", and a comma',
    "two\r\nlines",
    "ünï",
    "bad \udcfe",
    " spaces ",
    "NA",
    "it's",
    '"',
)
REASONS = ("undecodable", "too_long", "unused_split", "own reason, of another package", "é")


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in (
        (found_module, ("_BATCH", "_SKIPPED_ROWS")),
        (index_files, ("_TEXTS",)),
        (search, ("_COMPARED",)),
        (splits, ("_ROWS",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 3)


def listed() -> list[Skipped]:
    return [
        Skipped(Path(PATHS[n % len(PATHS)]), REASONS[n % len(REASONS)], MESSAGES[n % len(MESSAGES)]) for n in range(60)
    ]


def csv_of(skipped: list[Skipped]) -> bytes:
    """Return the file as it was written from objects."""
    report = io.StringIO(newline="")
    writer = csv.writer(report)
    writer.writerow(["path", "reason", "message"])
    for skip in skipped:
        place = re.sub(r"^([a-z][a-z0-9+.-]*):/(?!/)", r"\1://", str(skip.path))
        writer.writerow([place, skip.reason, skip.message])
    return report.getvalue().encode(errors="surrogateescape")


def test_a_table_is_a_list_of_skipped_files() -> None:
    expected = listed()
    skipped = SkippedFiles()
    assert skipped == [] and not skipped
    skipped.append(expected[0])
    skipped += expected[1:5]
    skipped.extend(SkippedFiles.of(expected[5:]))
    assert len(skipped) == 60 and list(skipped) == expected and skipped == SkippedFiles.of(expected)
    assert (
        skipped != SkippedFiles.of(expected[::-1]) and skipped != expected[1:] and SkippedFiles.of(skipped) is skipped
    )
    assert [skipped[n] for n in (0, 7, -1)] == [expected[n] for n in (0, 7, -1)]
    assert skipped[3:50:4] == expected[3:50:4] and isinstance(skipped[:2], SkippedFiles)
    with pytest.raises(IndexError):
        _ = skipped[60]
    assert list(skipped.counts().items()) == list(Counter(skip.reason for skip in expected).items())
    assert list(skipped.sorted_by_path()) == sorted(expected, key=lambda skip: str(skip.path))
    assert SkippedFiles().sorted_by_path() == [] and not SkippedFiles().counts()


def test_the_csv_file_is_that_of_the_csv_module(tmp_path: Path) -> None:
    for expected in (listed(), listed()[:1], []):
        write_skipped(tmp_path / "skipped.csv", SkippedFiles.of(expected))
        assert (tmp_path / "skipped.csv").read_bytes() == csv_of(expected)
        assert list(read_skipped(tmp_path / "skipped.csv")) == expected


@pytest.mark.parametrize("content", ["path,reason\na,b\n", "path,reason,message\na\n", ""])
def test_a_damaged_csv_file_is_no_complete_index(tmp_path: Path, content: str) -> None:
    soundfile.write(tmp_path / "a.wav", np.ones(8000) * 0.1, 16_000)
    soundfile.write(tmp_path / "b.wav", np.ones(9000) * 0.1, 16_000)
    index_corpus(tmp_path, output=tmp_path / "index")
    (tmp_path / "index/skipped.csv").write_text(content)
    with pytest.raises(ValueError, match="has no complete corpus index"):
        CorpusIndex.load(tmp_path / "index")


def test_the_state_is_that_of_earlier_versions() -> None:
    entries = [
        FoundFile("a", Path("/c/a.wav"), "train", role="train"),
        FoundFile("é", Path("/c/é.wav"), None, start=0.5, channel="mix"),
        FoundFile("z", Path("/c/z.tar"), None, inside=AudioAddress("/c/z.tar", offset=512, size=9)),
    ]
    stamps = [(5, 6), None, (7, 8)]
    for skipped in (listed(), listed()[:1], []):
        files: list[object] = []
        for entry, stamp in zip(entries, stamps, strict=True):
            files.append([entry.id, str(entry.path), entry.role, *(stamp or ["missing"])])
            inside = None if entry.inside is None else entry.inside.encode()
            piece = [entry.start, entry.end, entry.channel, inside]
            if any(value is not None for value in piece):
                files.append(piece)
        expected = []
        for schema in (3, 2):
            content = json.dumps([schema, files, [[str(skip.path), skip.reason] for skip in skipped], [0.05, 40.0]])
            expected.append(json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest()}))
        array = np.array([stamp or (-1, 0) for stamp in stamps])
        assert index_states((3, 2), FoundFiles.of(entries), array, SkippedFiles.of(skipped), [0.05, 40.0]) == expected


IDS = ("plain", "it's", 'say "x"', "'\"", "back\\slash", "ünï", "ta\tb", "\x7f", "\u2003", "", "a-1_b.c/d~")


def test_messages_of_unused_splits_are_those_of_python() -> None:
    names = ("test", "it's", "été")
    entries = [FoundFile(f"{id}", Path(f"/c/{n}.wav"), names[n % 3]) for n, id in enumerate(IDS * 2)]
    entries.append(FoundFile("without", Path("/c/w.wav"), None))
    used = [FoundFile(f"u{n}", Path(f"/c/u{n}.wav"), "train") for n in range(4)]
    mixed = FoundFiles.of([*used[:2], *entries, *used[2:]])
    # Tables of other packages may have any text of a path.
    paths = [f"/c//./{Path(path).name}" for path in mixed.table["path"].to_pylist()]
    mixed = FoundFiles(mixed.table.set_column(1, "path", pa.array(paths, pa.large_string())))
    chosen, unused, _ = splits.assign_splits(mixed, None, None, Path("/c"))
    assert [entry.id for entry in chosen] == ["u0", "u1", "u2", "u3"]
    assert list(unused) == [
        Skipped(
            entry.path,
            "unused_split",
            f"{entry.id!r} is in the split {entry.split!r}, which is not used; add it to corpus.train_splits to use it",
        )
        for entry in entries
    ]


def test_every_duplicate_is_compared_with_the_first() -> None:
    entries = [FoundFile("a", Path("/c/a.wav"), None)] * 5
    entries += [FoundFile(f"b{n}", Path(f"/c/{n}.wav"), None) for n in range(5)]
    entries += [FoundFile("c", Path(f"/c/c{n}.wav"), None, channel=n % 2) for n in range(8)]
    entries += [FoundFile("d", Path("/c/d0.wav"), None, role="validation"), FoundFile("d", Path("/c/d1.wav"), None)]
    used, skipped = search._unique(FoundFiles.of(entries))
    assert [entry.id for entry in used] == ["a", *(f"b{n}" for n in range(5)), "c", "d"]
    assert [(str(skip.path), skip.reason) for skip in skipped] == [
        *[("/c/a.wav", "duplicate_id")] * 4,
        *((f"/c/c{n}.wav", "duplicate_id") for n in range(1, 8)),
        ("/c/d1.wav", "duplicate_id"),
    ]
    assert skipped[0].message == "/c/a.wav is listed twice"
    assert skipped[6].message == "/c/c3.wav (channel 1) has the same id as /c/c0.wav (channel 0): 'c'"


@pytest.mark.parametrize("way", ["append", "add", "list"])
def test_a_format_reports_skipped_files_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    class Format:
        def find(self, path: Path, search: Search) -> list[FoundFile]:
            if way == "append":
                for skip in listed():
                    search.skipped.append(skip)
            elif way == "add":
                search.skipped += listed()
            else:
                search.skipped = listed()  # type: ignore[assignment]
            return [FoundFile(str(n), path / f"{n}.wav", "test" if n % 2 else "train") for n in range(10)]

    monkeypatch.setattr(search, "open_format", lambda _: Format())
    found = find_audio(tmp_path, None, None, format="own")
    assert list(found.skipped[:60]) == listed() and found.skipped.counts()["unused_split"] == 12 + 5


def grown(folder: Path, rows: int) -> tuple[int, int]:
    """Return the peak of Python's and NumPy's memory and what Arrow keeps, for an index of which nearly all rows are not used."""
    text = "path,id,split\n" + "".join(f"/corpus/{n:09d}.flac,{n:09d},test\n" for n in range(rows))
    (folder / f"{rows}.csv").write_text(text + "a.wav,a,train\nb.wav,b,dev\n")
    sizes = []
    for _ in range(2):  # The second one is read.
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        index = index_corpus(folder / f"{rows}.csv", output=folder / str(rows))
        assert index.num_unused == len(index.skipped) == rows
        sizes.append((tracemalloc.get_traced_memory()[1], pa.total_allocated_bytes() - before))
        tracemalloc.stop()
        del index
    return max(python for python, _ in sizes), max(arrow for _, arrow in sizes)


def test_memory_grows_by_few_bytes_per_skipped_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(found_module, "_BATCH", 1000)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.full(8000, 0.1 if name == "a" else 0.2), 16_000)
    grown(tmp_path, 10)
    (python, arrow), (more_python, more_arrow) = grown(tmp_path, 2_000), grown(tmp_path, 8_000)
    # A Skipped with its Path and its message has about 1,000 bytes. What is left of them is the order.
    assert (more_python - python) / 6_000 < 40
    # A path of 22 bytes, a message of 104, and 20 bytes for where they are and for the reason.
    assert (more_arrow - arrow) / 6_000 < 170
