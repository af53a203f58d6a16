"""Lhotse's Shar, as its library writes it, and the tables of Hugging Face's audio folders."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.corpus.labels import Label, read_labels
from ray_distill.pipeline.corpus.search import find_audio
from ray_distill.teacher_cache.audio import load_audio, load_identified_audio

from .test_formats import check, refuse, write_json, write_tar, write_text

Writer = Callable[..., Path]


def cut(name: str, duration: float = 0.5, **more: Any) -> dict[str, Any]:
    """Return a line of a file with cuts, as Lhotse 1.32 writes it."""
    source = {"type": "shar", "channels": [0], "source": ""}
    recording = {"id": name, "sources": [source], "sampling_rate": 16_000, "num_samples": 8000, "duration": 0.5}
    supervision = {
        "id": name,
        "recording_id": name,
        "start": -0.05,  # A little more than the cut, as trimming leaves it.
        "duration": duration + 0.1,
        "text": f"text {name}",
        "speaker": "s",
    }
    whole = {"id": name, "start": 0, "duration": duration, "channel": 0, "supervisions": [supervision]}
    return whole | {"recording": recording | {"channel_ids": [0]}, "type": "MonoCut"} | more


def test_shar(tmp_path: Path, write_audio: Writer) -> None:
    files = {name: write_audio(tmp_path / f"{name}.flac", 0.5) for name in ("a.b", "c", "d")}
    data = {name: file.read_bytes() for name, file in files.items()}
    shards = tmp_path / "shar"
    write_json(shards / "train/cuts.000000.jsonl.gz", cut("a.b"), cut("c", 0.2, start=0.1))
    write_tar(shards / "train/recording.000000.tar", {"a.b.flac": data["a.b"], "a.b.json": b"{}", "c.flac": data["c"]})
    write_json(shards / "dev/cuts.000000.jsonl.gz", cut("d"))
    write_tar(shards / "dev/recording.000000.tar", {"d.flac": data["d"]})
    write_tar(shards / "dev/features.000000.tar", {"d.npy": b"?"})
    expected = [("a.b", "train", "s", "text a.b"), ("c", "train", "s", "text c"), ("d", "validation", "s", "text d")]
    index = check(shards, tmp_path, "lhotse_shar", expected)
    assert index.utterances[0].sha256 == load_identified_audio(files["a.b"])[1]
    assert index.utterances[1].num_samples == 3200
    assert (load_audio(index.utterances[1].path) == load_audio(files["c"])[1600:4800]).all()
    assert index.notes == (f"the fields features of the shards in {shards} are not used; only recording is",)
    assert [s.origin for s in index.splits] == ["folder dev", "folder train"]
    assert find_audio(shards / "train", None, None).format == "lhotse_shar", "one split alone"

    write_tar(shards / "dev/recording.000000.tar", {"e.flac": data["d"]})
    refuse(shards, "line 1 of .*dev/cuts.000000.jsonl.gz has the cut 'd', which has no audio in .*recording.000000.tar")
    link = tarfile.TarInfo("d.flac")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(shards / "dev/recording.000000.tar", {"d.flac": link})
    refuse(shards, "has the cut 'd', which has no audio")
    (shards / "dev/recording.000000.tar").write_bytes(b"no tar" * 1000)
    refuse(shards, "dev/recording.000000.tar can't be read as a tar file")
    (shards / "dev/recording.000000.tar").rename(shards / "dev/recording.000000.tar.gz")
    refuse(
        shards,
        "there is no .*recording.000000.tar, which has the audio.*; decompress recording.000000.tar.gz",
        "lhotse_shar",
    )
    write_json(shards / "dev/cuts.000000.jsonl.gz", cut("d", type="MixedCut"))
    write_tar(shards / "dev/recording.000000.tar", {})
    refuse(shards, "is a MixedCut; only MonoCut and MultiCut")


def test_channels_of_shar(tmp_path: Path, write_audio: Writer) -> None:
    stereo = write_audio(tmp_path / "x.flac", 0.5, channels=2)
    cuts = [cut(f"x{channel}", channel=channel) for channel in (3, 5)]
    for line in cuts:
        line["recording"]["channel_ids"] = [3, 5]
    write_json(tmp_path / "c/cuts.000000.jsonl", *cuts)
    write_tar(tmp_path / "c/recording.000000.tar", {f"x{n}.flac": stereo.read_bytes() for n in (3, 5)})
    assert [entry.channel for entry in find_audio(tmp_path / "c", None, None).entries] == [0, 1]
    write_json(tmp_path / "c/cuts.000000.jsonl", cuts[0] | {"channel": 4})
    refuse(tmp_path / "c", "names channel 4, which its recording lacks")


def test_what_tables_of_audio_folders_say_in_vain_is_said(tmp_path: Path, write_audio: Writer) -> None:
    for name in ("train/1", "dev/2"):
        write_audio(tmp_path / f"c/{name}.wav")
    table = tmp_path / "c/metadata.csv"

    def notes() -> tuple[str, ...]:
        return index_corpus(tmp_path / "c", output=tmp_path / "index").notes

    write_text(table, "file_name,text", "train/1.wav,one", "dev/2.wav,two")
    assert notes() == ()
    write_text(table, "file_name,text", "train/1.wav,one", "train/1.wav,two", "train/absent.wav,three")
    assert notes() == (
        f"{table} names files that don't exist (1 of 2), such as train/absent.wav",
        f"{table} has several rows for the same file (1 of 2), such as train/1.wav; the last one is used",
    )
    write_text(table, "file_name,foo", "train/1.wav,one")
    assert [note.split(";")[0] for note in notes()] == [f"{table} has no column of transcripts or speakers"]
    write_text(table, "file,text", "train/1.wav,one")
    assert notes() == (f"{table} has no column file_name, so nothing of it is used",)


def test_audio_folders_have_their_transcripts(tmp_path: Path, write_audio: Writer) -> None:
    for name in ("train/x/1", "train/2", "dev/3", "dev/4"):
        write_audio(tmp_path / f"c/{name}.wav")
    write_text(
        tmp_path / "c/train/metadata.csv",
        "file_name,transcription,speaker_id",
        'x/1.wav,"one, two",7',
        "./2.wav,three,8",
    )
    write_json(tmp_path / "c/dev/metadata.jsonl", {"file_name": "3.wav", "text": "four"}, {"file_name": "absent.wav"})
    expected = [
        ("dev/3", "validation", "", "four"),
        ("dev/4", "validation", "", ""),
        ("train/2", "train", "8", "three"),
        ("train/x/1", "train", "7", "one, two"),
    ]
    check(tmp_path / "c", tmp_path, "folder", expected)
    write_text(tmp_path / "c/dev/metadata.jsonl", '{"file_name": "3.wav"}', "no JSON")
    with pytest.raises(ValueError, match=r"line 2 of .*metadata\.jsonl is not JSON"):
        index_corpus(tmp_path / "c", output=tmp_path / "other")
    # Other tables of that name are left alone.
    write_text(tmp_path / "c/dev/metadata.jsonl", '{"path": "3.wav"}', "no JSON")
    index_corpus(tmp_path / "c", output=tmp_path / "third")
    assert read_labels(tmp_path / "third").keys() == {"train/2", "train/x/1"}
    assert read_labels(tmp_path / "third")["train/2"] == Label("8", "three")
