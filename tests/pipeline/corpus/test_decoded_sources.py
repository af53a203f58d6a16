"""What was decoded once is not decoded again: after a kill, after a change of the corpus, and in another run."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ray_distill.pipeline.corpus import decoded_sources, decoding_work
from ray_distill.pipeline.corpus.decoded_sources import DECODED, DECODING, DecodedSources, rows_of, table_of
from ray_distill.pipeline.corpus.decoding import Decoded, Limits
from ray_distill.pipeline.corpus.found import FoundFile, FoundFiles, Skipped
from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.teacher_cache.storage.shard_plan import Utterance

Calls = list[str]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A manifest of 20 files, of which one is a text and one is short."""
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for n in range(20):
        samples = rng.normal(0, 0.1, 100 if n == 5 else 2000 + 100 * n)
        soundfile.write(tmp_path / "audio" / f"{n:02d}.wav", samples, 16_000)
    (tmp_path / "audio/11.wav").write_text("no audio")
    write_manifest(tmp_path / "corpus.csv", range(20))
    return tmp_path / "corpus.csv"


def write_manifest(file: Path, numbers: range) -> None:
    with file.open("w", newline="") as table:
        csv.writer(table).writerows([("path", "id"), *((f"audio/{n:02d}.wav", f"u{n:02d}") for n in numbers)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The ids of what is decoded."""
    made: Calls = []
    decode = decoding_work.decode

    def counted(entry: FoundFile, limits: Limits) -> Decoded:
        made.append(entry.id)
        return decode(entry, limits)

    monkeypatch.setattr(decoding_work, "decode", counted)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files that an index consists of."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_index_goes_on(corpus: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    index_corpus(corpus, output=tmp_path / "whole")
    monkeypatch.setattr(decoded_sources, "PART_SOURCES", 3)

    def copy(done: int, _: int) -> None:
        if done == 11:
            shutil.copytree(tmp_path / "killed", tmp_path / "index")  # What a kill would leave.

    index_corpus(corpus, output=tmp_path / "killed", progress=copy)
    assert sorted(path.name for path in (tmp_path / "index" / DECODING).iterdir()) == [
        f"part-{n:05d}.parquet" for n in range(3)
    ]
    calls.clear()
    seen: list[int] = []

    def stop(done: int, _: int) -> None:
        seen.append(done)
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_corpus(corpus, output=tmp_path / "index", progress=stop)
    assert seen[:2] == [9, 10] and "u08" not in calls
    calls.clear()
    index_corpus(corpus, output=tmp_path / "index", progress=lambda done, _: seen.append(done))
    assert seen[-4:] == [17, 18, 19, 20] and sorted(calls) == ["u17", "u18", "u19"]
    assert contents(tmp_path / "index") == contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert DECODED in contents(tmp_path / "whole")


def test_only_what_is_new_or_changed_is_decoded(corpus: Path, tmp_path: Path, calls: Calls) -> None:
    write_manifest(corpus, range(18))
    index_corpus(corpus, output=tmp_path / "index")
    changes: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: write_manifest(corpus, range(20)), ["u18", "u19"]),
        (lambda: os.utime(tmp_path / "audio/03.wav", ns=(1, 1)), ["u03"]),
        (lambda: soundfile.write(tmp_path / "audio/11.wav", np.zeros(3000), 16_000), ["u11"]),
        (lambda: write_manifest(corpus, range(1, 20)), []),
    ]
    for change, decoded in changes:
        change()
        calls.clear()
        index = index_corpus(corpus, output=tmp_path / "index")
        assert sorted(calls) == decoded and not index.reused
    index_corpus(corpus, output=tmp_path / "fresh")
    assert contents(tmp_path / "index") == contents(tmp_path / "fresh")
    calls.clear()
    index_corpus(corpus, validation_fraction=0.3, output=tmp_path / "index")
    assert not calls
    for settings in ({"max_seconds": 20.0}, {"min_seconds": 0.1}, {"channel": 0}, {"long_audio": "cut"}):
        calls.clear()
        index_corpus(corpus, output=tmp_path / "index", **settings)
        assert len(calls) == 19


def test_another_run_of_the_same_corpus_lends_what_it_decoded(corpus: Path, tmp_path: Path, calls: Calls) -> None:
    first = index_corpus(corpus, output=tmp_path / "first")
    calls.clear()
    others = [tmp_path / "nothing", tmp_path / "first"]
    assert index_corpus(corpus, output=tmp_path / "second", others=others).utterances == first.utterances
    assert not calls and contents(tmp_path / "first") == contents(tmp_path / "second")
    shutil.copy(corpus, tmp_path / "other.csv")
    index_corpus(tmp_path / "other.csv", output=tmp_path / "third", others=others)
    assert len(calls) == 20
    data = bytearray((tmp_path / "first" / DECODED).read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (tmp_path / "first" / DECODED).write_bytes(data)
    calls.clear()
    index_corpus(corpus, output=tmp_path / "fourth", others=others)
    assert (
        len(calls) == 20
        and contents(tmp_path / "fourth")["index.parquet"] == contents(tmp_path / "first")["index.parquet"]
    )


def test_remote_failures_are_tried_again(tmp_path: Path) -> None:
    entries = [FoundFile(name, Path(f"https:/host/{name}"), None) for name in "ab"]
    known = DecodedSources(FoundFiles.of(entries), np.array([[-1, 0]] * 2), "", tmp_path)
    results = [Utterance("a", "https://host/a", 16_000, "train", ""), Skipped(entries[1].path, "undecodable", "no")]
    rows = table_of(
        [row for (key, _), item in zip(known.unknown, results, strict=True) for row in rows_of(key, Decoded([item]))]
    )
    known.add(rows)
    assert [entry for _, entry in known.unknown] == entries[1:]
    known.add(rows, fresh=True)
    assert len(known.unknown) == 0 and known.results()[0].num_rows == 2
    local = DecodedSources(FoundFiles.of(entries), np.array([[1, 2]] * 2), "", tmp_path)
    local.add(rows)
    assert [entry for _, entry in local.unknown] == entries == [local.unknown[n][1] for n in range(2)]


def test_failures_of_other_remote_sources_take_no_result_away(tmp_path: Path) -> None:
    (entry,) = entries = [FoundFile("a", Path("https:/host/a"), None)]
    known = DecodedSources(FoundFiles.of(entries), np.array([[-1, 0]]), "", tmp_path)
    ((key, _),) = known.unknown
    rows = rows_of(key, Decoded([Utterance("a", "https://host/a", 16_000, "train", "")]))
    for other in (bytes(16), b"\xff" * 16):  # Before and after it in the order of keys.
        rows += rows_of(other, Decoded([Skipped(entry.path, "undecodable", "no")]))
    known.add(table_of(rows))
    assert len(known.unknown) == 0 and known.results()[0]["id"].to_pylist() == ["a"]


def test_few_sources_wait_for_a_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoding_work.os, "cpu_count", lambda: 2)
    taken = 0

    class Counted(list[tuple[bytes, FoundFile]]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            nonlocal taken
            for item in super().__iter__():
                taken += 1
                yield item

    sources = Counted((b"%016d" % n, FoundFile(str(n), tmp_path / "missing.wav", None)) for n in range(500))
    rows = decoding_work.decode_here(sources, Limits(0.025, 40))
    assert next(rows)["reason"].to_pylist() == ["missing"]
    assert taken <= 2 * decoding_work._WAITING
    rows.close()
