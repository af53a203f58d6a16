"""Corpora written by the libraries of their formats, which need not be installed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ray_distill.pipeline.corpus.index import find_audio, index_corpus
from ray_distill.pipeline.corpus.labels import Label, read_labels
from ray_distill.teacher_cache.audio import load_identified_audio


@pytest.fixture
def files(tmp_path: Path, write_audio: Callable[..., Path]) -> dict[str, Path]:
    return {f"u{n}": write_audio(tmp_path / "wav" / f"u{n}.wav", 0.5 + 0.1 * n) for n in range(6)}


def check(path: Path, tmp_path: Path, format: str, files: dict[str, Path]) -> None:
    index = index_corpus(path, output=tmp_path / "index")
    assert index.format == format
    assert {u.id: u.sha256 for u in index.utterances} == {
        name: load_identified_audio(file)[1] for name, file in files.items()
    }
    assert {u.id for u in index.utterances if u.split == "validation"} == {"u4", "u5"}
    assert read_labels(tmp_path / "index") == {name: Label(f"s{name}", f"text {name}") for name in files}


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_datasets(tmp_path: Path, files: dict[str, Path], kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    from datasets.table import embed_table_storage

    rows = {
        "audio": [str(file) for file in files.values()],
        "text": [f"text {name}" for name in files],
        "speaker": [f"s{name}" for name in files],
    }
    whole = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    splits = datasets.DatasetDict(train=whole.select(range(4)), validation=whole.select(range(4, 6)))
    if kind == "disk":
        splits.save_to_disk(tmp_path / "corpus")
    else:
        for name, split in splits.items():
            embedded = split.with_format("arrow").map(embed_table_storage, batched=True)  # As push_to_hub does.
            for n in range(2):
                file = tmp_path / "corpus/data" / f"{name}-{n:05}-of-00002.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                embedded.shard(2, n, contiguous=True).to_parquet(file)
    check(tmp_path / "corpus", tmp_path, "huggingface", files)


@pytest.mark.parametrize("kind", ["supervisions", "cuts"])
def test_lhotse(tmp_path: Path, files: dict[str, Path], kind: str) -> None:
    lhotse = pytest.importorskip("lhotse")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, names in (("train", list(files)[:4]), ("dev", list(files)[4:])):
        recordings = lhotse.RecordingSet.from_recordings(lhotse.Recording.from_file(files[name]) for name in names)
        supervisions = lhotse.SupervisionSet.from_segments(
            lhotse.SupervisionSegment(name, name, 0, recordings[name].duration, text=f"text {name}", speaker=f"s{name}")
            for name in names
        )
        if kind == "cuts":
            cuts = lhotse.CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
            cuts.trim_to_supervisions().to_file(folder / f"cuts_{split}.jsonl.gz")
        else:
            recordings.to_file(folder / f"toy_recordings_{split}.jsonl.gz")
            supervisions.to_file(folder / f"toy_supervisions_{split}.jsonl.gz")
    check(folder, tmp_path, "lhotse", files)


def test_windows_of_lhotse_have_no_transcript_of_more_than_they_hold(tmp_path: Path, files: dict[str, Path]) -> None:
    lhotse = pytest.importorskip("lhotse")
    recordings = lhotse.RecordingSet.from_recordings([lhotse.Recording.from_file(files["u5"])])  # 1 s
    segments = [lhotse.SupervisionSegment(f"s{n}", "u5", 0.5 * n, 0.5, text=f"half {n}") for n in range(2)]
    whole = lhotse.CutSet.from_manifests(recordings, lhotse.SupervisionSet.from_segments(segments))
    (tmp_path / "corpus").mkdir()
    for length, expected in ((0.5, ["half 0", "half 1"]), (0.25, ["", "", "", ""])):
        whole.cut_into_windows(length).to_file(tmp_path / "corpus/cuts.jsonl.gz")
        assert [entry.text for entry in find_audio(tmp_path / "corpus", None, None).entries] == expected


def test_lhotse_shar(tmp_path: Path, files: dict[str, Path]) -> None:
    lhotse = pytest.importorskip("lhotse")
    for split, names in (("train", list(files)[:4]), ("dev", list(files)[4:])):
        cuts = []
        for name in names:
            recording = lhotse.Recording.from_file(files[name])
            supervision = lhotse.SupervisionSegment(
                name, name, 0, recording.duration, text=f"text {name}", speaker=f"s{name}"
            )
            cuts.append(recording.to_cut().with_id(name))
            cuts[-1].supervisions = [supervision]
        (tmp_path / "corpus" / split).mkdir(parents=True)
        lhotse.CutSet.from_cuts(cuts).to_shar(tmp_path / "corpus" / split, fields={"recording": "wav"}, shard_size=3)
    check(tmp_path / "corpus", tmp_path, "lhotse_shar", files)


def test_webdataset(tmp_path: Path, files: dict[str, Path]) -> None:
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "corpus").mkdir()
    for split, names in (("train", list(files)[:4]), ("dev", list(files)[4:])):
        with webdataset.ShardWriter(str(tmp_path / "corpus" / f"{split}-%06d.tar"), maxcount=3, verbose=0) as shards:
            for name in names:
                labels = {"text": f"text {name}", "speaker": f"s{name}"}
                shards.write({"__key__": name, "wav": files[name].read_bytes(), "json": labels})
    check(tmp_path / "corpus", tmp_path, "webdataset", files)
