"""Corpora in the formats of other toolkits: each is recognised, read with its splits and labels, and refused where it is wrong."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_distill.pipeline.corpus.formats import FORMATS, check_format
from ray_distill.pipeline.corpus.formats.text_lines import MAX_LINE
from ray_distill.pipeline.corpus.index import CorpusIndex, index_corpus
from ray_distill.pipeline.corpus.labels import Label, read_labels
from ray_distill.pipeline.corpus.search import find_audio
from ray_distill.teacher_cache.audio import load_audio, load_identified_audio

Writer = Callable[..., Path]


def write_text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_json(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def check(path: Path, tmp_path: Path, format: str, expected: Sequence[tuple[str, str, str, str]]) -> CorpusIndex:
    """Index a corpus, and compare its format and the id, split, speaker and text of its utterances."""
    index = index_corpus(path, output=tmp_path / "index")
    labels = read_labels(tmp_path / "index")
    found = [
        (u.id, u.split, labels.get(u.id, Label("", "")).speaker, labels.get(u.id, Label("", "")).text)
        for u in index.utterances
    ]
    assert index.format == format and found == list(expected)
    assert index_corpus(path, format=format, output=tmp_path / "index").reused
    return index


def refuse(path: Path, message: str, format: str | None = None) -> None:
    with pytest.raises(ValueError, match=message):
        find_audio(path, None, None, format=format)


def test_nemo(tmp_path: Path, write_audio: Writer) -> None:
    for name in "abc":
        write_audio(tmp_path / "wav" / f"{name}.wav", 1)
    train = [
        {"audio_filepath": "../wav/a.wav", "offset": 0.25, "duration": 0.5, "text": "one"},
        {"audio_filepath": str(tmp_path / "wav/b.wav"), "duration": 0.999, "text": "two", "speaker": 7},
    ]
    write_json(tmp_path / "m/train_manifest.json", *train)
    write_json(tmp_path / "m/dev.jsonl", {"audio_filepath": "../wav/c.wav", "duration": 1, "text": "three"})
    whole = (tmp_path / "wav/b").as_posix()
    index = check(
        tmp_path / "m",
        tmp_path,
        "nemo",
        [
            ("../wav/a_00000.25_00000.75", "train", "", "one"),
            ("../wav/c", "validation", "", "three"),
            (whole, "train", "7", "two"),
        ],
    )
    assert [u.num_samples for u in index.utterances] == [8_000, 16_000, 16_000]
    alone = find_audio(tmp_path / "m/dev.jsonl", ["dev"], None)
    assert alone.format == "nemo" and [entry.role for entry in alone.entries] == ["train"]
    for record, message in (
        (
            {"audio_filepath": "a.wav", "offset": -1, "duration": 2},
            r"the offset in line 2 of .*x\.json is '-1'; give sec",
        ),
        ({"audio": "a.wav"}, "line 2 of .* has no audio_filepath"),
        ({"audio_filepath": "a.wav", "shard_id": 0}, "line 2 of .* is a file inside a tar file"),
    ):
        refuse(write_json(tmp_path / "x.json", train[0], record), message)
    write_text(tmp_path / "x.json", json.dumps(train[0]), "{")
    refuse(tmp_path / "x.json", "line 2 of .* is not JSON")


@pytest.mark.parametrize(("suffix", "lines"), [("wrd", "ONE TWO|THREE"), ("ltr", "O N E | T W O ||T H R E E |")])
def test_fairseq(tmp_path: Path, write_audio: Writer, suffix: str, lines: str) -> None:
    for name in ("a/1.flac", "a/2.flac", "3.flac"):
        write_audio(tmp_path / "audio" / name)
    root = str(tmp_path / "audio")
    write_text(tmp_path / "m/train.tsv", root, "a/1.flac\t4800", "3.flac\t4800")
    write_text(tmp_path / "m/valid.tsv", root, "a/2.flac\t4800")
    first, second = ("ONE TWO", "THREE") if suffix == "wrd" else ("O N E | T W O |", "T H R E E |")
    write_text(tmp_path / f"m/train.{suffix}", first, second)
    expected = [("3", "train", "", "THREE"), ("a/1", "train", "", "ONE TWO"), ("a/2", "validation", "", "")]
    check(tmp_path / "m", tmp_path, "fairseq", expected)
    write_text(tmp_path / f"m/train.{suffix}", "ONE")
    refuse(tmp_path / "m", rf"train\.{suffix} has 1 lines, but .*train\.tsv has 2 files")
    write_text(tmp_path / "m/valid.tsv", root, "a/2.flac\t4800", "a/3.flac")
    refuse(tmp_path / "m/valid.tsv", r"line 3 of .* is 'a/3.flac'; give a path, a tab and a number of samples")


def test_kaldi(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "downloads/rec1.flac", 2)
    write_audio(tmp_path / "downloads/rec2.wav", 1, 8_000)
    data = write_audio(tmp_path / "downloads/rec3.wav", 0.5).read_bytes()
    (tmp_path / "raw.ark").write_bytes(b"rec3 " + data)
    train, dev = tmp_path / "data/train", tmp_path / "data/dev"
    scp = write_text(train / "wav.scp", "rec1 downloads/rec1.flac", f"rec2  {tmp_path}/downloads/rec2.wav")
    segments = write_text(train / "segments", "u1 rec1 0.0 0.75", "u2\trec1 0.75 -1", "u3 rec2 0.25 0.5")
    write_text(train / "utt2spk", "u1\ts1", "u2 s1", "u3 s2")
    write_text(train / "text", "u1 hello world", "u3")
    write_text(dev / "wav.scp", "rec3 raw.ark:5")
    expected = [
        ("rec3", "validation", "", ""),
        ("u1", "train", "s1", "hello world"),
        ("u2", "train", "s1", ""),
        ("u3", "train", "s2", ""),
    ]
    index = check(tmp_path / "data", tmp_path, "kaldi", expected)
    assert [u.num_samples for u in index.utterances] == [8_000, 12_000, 20_000, 4_000]
    assert index.utterances[0].sha256 == load_identified_audio(tmp_path / "downloads/rec3.wav")[1]
    segments.write_text("u1 rec1 0.0 0.75\nu2 rec9 0 1\n")
    refuse(train, r"line 2 of .*segments names the recording 'rec9', which is not in .*wav\.scp")
    segments.write_text("u1 rec1 0.0\n")
    refuse(train, "line 1 of .*segments is 'u1 rec1 0.0'; give an utterance, a recording, a start and an end")
    write_text(scp, "rec1 a.wav", f"rec2 touch {tmp_path}/ran |")
    refuse(train, r"line 2 of .*wav\.scp is a command \('touch .* \|'\), which is never run; run it yourself")
    assert not (tmp_path / "ran").exists()


def recording(name: str, path: str, channels: Sequence[int] = (0,), **more: Any) -> dict[str, Any]:
    sources = [{"type": "file", "channels": list(channels), "source": path}]
    return {"id": name, "sources": sources, "sampling_rate": 16_000, "num_samples": 32_000, "duration": 2.0} | more


def test_lhotse_supervisions(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "download/a.wav", 2, channels=2)
    write_audio(tmp_path / "download/b.wav", 2)
    folder = tmp_path / "data/manifests"
    for split, name, channels in (("train", "a", (0, 1)), ("dev", "b", (0,))):
        write_json(folder / f"x_recordings_{split}.jsonl.gz", recording(name, f"download/{name}.wav", channels))
        pieces = [
            {"id": f"{name}-{n}", "recording_id": name, "start": 0.5 * n, "duration": 0.5, "channel": channel}
            | {"text": f"text {n}", "speaker": f"s{channel}"}
            for n, channel in enumerate(channels)
        ]
        write_json(folder / f"x_supervisions_{split}.jsonl.gz", *pieces)
    expected = [
        ("a-0", "train", "s0", "text 0"),
        ("a-1", "train", "s1", "text 1"),
        ("b-0", "validation", "s0", "text 0"),
    ]
    index = check(folder, tmp_path, "lhotse", expected)
    assert [(u.address.start, u.address.end, u.address.channel) for u in index.utterances] == [
        (0, 8_000, 0),
        (8_000, 16_000, 1),
        (0, 8_000, None),
    ]
    (folder / "x_recordings_dev.jsonl.gz").unlink()
    refuse(
        folder, r"x_supervisions_dev\.jsonl\.gz needs the manifest of its recordings beside it, named x_recordings_dev"
    )


def test_lhotse_cuts_and_recordings(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "a.wav", 2)
    write_audio(tmp_path / "b.wav", 2)
    one = {"id": "c1", "type": "MonoCut", "start": 0.1, "duration": 0.2, "channel": 0} | {
        "recording": recording("a", "a.wav"),
        "supervisions": [{"text": "x", "speaker": "s"}, {"text": "y", "speaker": "s"}],
    }
    whole = one | {"id": "c2", "start": 0.0, "duration": 2.0, "supervisions": [], "recording": recording("b", "b.wav")}
    cuts = write_json(tmp_path / "m/cuts_train.jsonl", one, whole)
    expected = [("c1", "train", "s", "x y"), ("c2", "validation", "", "")]
    index = check(tmp_path / "m", tmp_path, "lhotse", expected)
    assert [(u.address.start, u.address.end) for u in index.utterances] == [(1_600, 4_800), (None, None)]
    for changed, message in (
        ({"type": "MixedCut"}, "line 2 of .* is a MixedCut; only MonoCut and MultiCut"),
        ({"recording": recording("a", "a.wav", transforms=[{"name": "Speed"}])}, "that is to be changed"),
        ({"recording": None}, "line 2 of .* has no recording with sources"),
        ({"duration": None}, "line 2 of .* has no duration"),
        ({"supervisions": ["x"]}, "line 2 of .* has supervisions that are no list of objects"),
        ({"recording": recording("a", "a.wav", sources=["a.wav"])}, "line 2 of .* has a source that is no object"),
        (
            {"recording": recording("a", "", sources=[{"type": "command", "channels": [0], "source": "sox"}])},
            "line 2 of .* has a recording from a 'command' source; only files and URLs are read, and commands are never run",
        ),
    ):
        refuse(write_json(cuts, one, one | changed), message)
    cuts.unlink()
    write_json(tmp_path / "m/recordings.jsonl", recording("a", "a.wav"), recording("b", "b.wav"))
    found = find_audio(tmp_path / "m", None, None)
    assert [(entry.id, entry.start, entry.path) for entry in found.entries] == [
        ("a", None, tmp_path / "a.wav"),
        ("b", None, tmp_path / "b.wav"),
    ]


def audio_table(files: Sequence[Path | None], **columns: list[Any]) -> pa.Table:
    audio = [{"bytes": None if file is None else file.read_bytes(), "path": file and file.name} for file in files]
    schema = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"audio": pa.array(audio, schema), **columns})


@pytest.mark.parametrize("kind", ["parquet", "compressed", "stream", "file"])
def test_huggingface(tmp_path: Path, write_audio: Writer, kind: str) -> None:
    files = [write_audio(tmp_path / "wav" / f"{n}.flac", 0.3 + 0.1 * n) for n in range(5)]
    for split, shard, members in (("train", 0, files[:2]), ("train", 1, files[2:3]), ("validation", 0, files[3:])):
        table = audio_table(
            members, transcription=[f"t {file.stem}" for file in members], speaker_id=[int(f.stem) for f in members]
        )
        if kind in ("parquet", "compressed"):
            path = tmp_path / "corpus/data" / f"{split}-{shard:05}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "compressed":
                pq.write_table(table, path, row_group_size=1)
            else:  # As the library writes it.
                pq.write_table(table, path, compression="none", use_dictionary=False, data_page_size=1)
        else:
            path = tmp_path / "corpus" / split / f"data-{shard:05}-of-00002.arrow"
            path.parent.mkdir(parents=True, exist_ok=True)
            new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            with new(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=1)
    expected = [(str(n), "train" if n < 3 else "validation", str(n), f"t {n}") for n in range(5)]
    index = check(tmp_path / "corpus", tmp_path, "huggingface", expected)
    assert [u.sha256 for u in index.utterances] == [load_identified_audio(file)[1] for file in files]
    address = index.utterances[1].address
    assert (address.row, address.column) == (1, "audio") if kind == "compressed" else address.offset and address.size
    assert len(load_audio(index.utterances[1].path)) == 6_400


def test_huggingface_ids_and_paths(tmp_path: Path, write_audio: Writer) -> None:
    files = [write_audio(tmp_path / "c" / f"{n}.wav") for n in range(3)]
    named = audio_table(files, id=["x", "y", "z"], text=["1", "2", "3"])
    pq.write_table(named, tmp_path / "named.parquet")
    found = find_audio(tmp_path / "named.parquet", None, None)
    assert found.format == "huggingface" and [entry.id for entry in found.entries] == ["x", "y", "z"]
    assert [entry.inside and entry.inside.name for entry in found.entries] == ["0.wav", "1.wav", "2.wav"]
    same = audio_table([files[0], files[0]])
    pq.write_table(same, tmp_path / "same.parquet")
    assert [entry.id for entry in find_audio(tmp_path / "same.parquet", None, None).entries] == ["same/0", "same/1"]
    # Rows without bytes name files, which must be inside the folder.
    mixed = pa.array(
        [{"bytes": None, "path": "0.wav"}, {"bytes": files[1].read_bytes(), "path": "1.wav"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"audio": mixed}), tmp_path / "c/mixed.parquet")
    found = find_audio(tmp_path / "c/mixed.parquet", None, None)
    assert [(entry.path.name, entry.inside is None) for entry in found.entries] == [
        ("0.wav", True),
        ("mixed.parquet", False),
    ]
    (tmp_path / "c/link.wav").symlink_to(tmp_path / "named.parquet")
    for path in ("../named.parquet", str(tmp_path / "named.parquet"), "link.wav"):
        outside = pa.array([{"bytes": None, "path": path}], mixed.type)
        pq.write_table(pa.table({"audio": outside}), tmp_path / "c/out.parquet")
        refuse(tmp_path / "c/out.parquet", "row 0 of .*out.parquet has no bytes of audio, but names .* not inside")
    pq.write_table(pa.table({"audio": [[0.1, 0.2]]}), tmp_path / "array.parquet")
    refuse(tmp_path / "array.parquet", "has no column with the bytes of audio", "huggingface")


def test_a_compressed_or_damaged_arrow_file_is_refused(tmp_path: Path, write_audio: Writer) -> None:
    table = audio_table([write_audio(tmp_path / "a.wav")])
    path = tmp_path / "c/train/data.arrow"
    path.parent.mkdir(parents=True)
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    refuse(tmp_path / "c", "data.arrow is compressed, so its audio can't be read in place; save it without")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refuse(tmp_path / "c", "data.arrow can't be read")


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_webdataset(tmp_path: Path, write_audio: Writer) -> None:
    files = [write_audio(tmp_path / f"{n}.flac", 0.3 + 0.1 * n) for n in range(4)]
    data = [file.read_bytes() for file in files]
    link = tarfile.TarInfo("evil.wav")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    labels = json.dumps({"text": "from json", "speaker": 5}).encode()
    first = {"x/a.flac": data[0], "x/a.txt": b"from txt\n", "x/b.json": labels, "x/b.flac": data[1], "x/b.txt": b"no"}
    write_tar(tmp_path / "c/train-000000.tar", first | {"evil.wav": link, "x/c.m4a": b"?"})
    write_tar(tmp_path / "c/train-000001.tar", {"x/c.flac": data[2]})
    write_tar(tmp_path / "c/dev.tar", {"d.flac": data[3], "d.cls": b"3"})
    expected = [
        ("d", "validation", "", ""),
        ("x/a", "train", "", "from txt"),
        ("x/b", "train", "5", "from json"),
        ("x/c", "train", "", ""),
    ]
    index = check(tmp_path / "c", tmp_path, "webdataset", expected)
    assert [u.sha256 for u in index.utterances] == [load_identified_audio(files[n])[1] for n in (3, 0, 1, 2)]
    assert sorted(skip.message.split(" in ")[0] for skip in index.skipped) == ["evil.wav", "x/c.m4a"]
    write_tar(tmp_path / "c/train-000002.tar", {"x/c.flac": data[0]})
    ids = [entry.id for entry in find_audio(tmp_path / "c", None, None).entries]
    assert ids == ["dev/d", "train-000000/x/a", "train-000000/x/b", "train-000001/x/c", "train-000002/x/c"]
    (tmp_path / "c/train-000002.tar").write_bytes(b"no tar" * 1000)
    refuse(tmp_path / "c", r"train-000002\.tar can't be read as a tar file")
    (tmp_path / "c/train-000002.tar").rename(tmp_path / "c/train-000002.tar.gz")
    refuse(tmp_path / "c", r"train-000002\.tar\.gz is compressed, so its audio can't be read in place")


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_pieces_without_samples_are_listed(tmp_path: Path, write_audio: Writer, suffix: str) -> None:
    name = write_audio(tmp_path / f"a.{suffix}", 1).name
    pieces = [("u", 0, 0.4), ("v", 0.4, 0.8), ("w", 0.5, 0.5)]
    write_text(tmp_path / "k/wav.scp", f"r {tmp_path / name}")
    write_text(tmp_path / "k/segments", *(f"{id} r {start} {end}" for id, start, end in pieces))
    write_json(tmp_path / "l/recordings.jsonl", recording("r", str(tmp_path / name)))
    write_json(
        tmp_path / "l/supervisions.jsonl",
        *({"recording_id": "r", "id": id, "start": s, "duration": e - s, "channel": 0} for id, s, e in pieces),
    )
    corpora = [
        write_text(tmp_path / "m.csv", "path,start,end", *(f"{name},{start},{end}" for _, start, end in pieces)),
        write_json(
            tmp_path / "n.json", *({"audio_filepath": name, "offset": s, "duration": e - s} for _, s, e in pieces)
        ),
        tmp_path / "k",
        tmp_path / "l",
    ]
    for number, path in enumerate(corpora):
        index = index_corpus(path, output=tmp_path / f"i{number}", validation_fraction=0.5)
        assert len(index.utterances) == 2 and [skip.reason for skip in index.skipped] == ["empty"], path


def test_webdataset_lists_a_second_audio_of_a_key(tmp_path: Path, write_audio: Writer) -> None:
    data = [write_audio(tmp_path / f"{n}.wav", 0.3 + 0.1 * n).read_bytes() for n in range(3)]
    members = {"a.1.wav": data[0], "a.2.txt": b"other", "a.1.txt": b"mine", "a.2.wav": data[1], "b.wav": data[2]}
    shard = write_tar(tmp_path / "c/train.tar", members)
    with tarfile.open(shard, "a") as tar:  # As `tar -r` appends a file once more.
        info = tarfile.TarInfo("b.wav")
        info.size = len(data[0])
        tar.addfile(info, io.BytesIO(data[0]))
    found = find_audio(tmp_path / "c", None, None)
    assert [(entry.id, entry.text) for entry in found.entries] == [("a", "mine"), ("b", "")]
    assert [skip.reason for skip in found.skipped] == ["duplicate_id"] * 2
    assert [skip.message.split(" in ")[0] for skip in found.skipped] == [
        "a.2.wav is the second audio of the key 'a'",
        "b.wav is the second audio of the key 'b'",
    ]


def test_common_voice(tmp_path: Path, write_audio: Writer) -> None:
    for name in "abcd":
        write_audio(tmp_path / "cv/clips" / f"common_voice_{name}.mp3")
    header = "client_id\tpath\tsentence\tage"
    rows = {name: f'spk{name}\tcommon_voice_{name}.mp3\t"Say" {name}.\t' for name in "abcd"}
    write_text(tmp_path / "cv/train.tsv", header, rows["a"], rows["b"])
    write_text(tmp_path / "cv/dev.tsv", header, rows["c"])
    write_text(tmp_path / "cv/validated.tsv", header, *rows.values())
    write_text(tmp_path / "cv/clip_durations.tsv", "clip\tduration")
    expected = [
        (f"common_voice_{name}", "train" if name in "ab" else "validation", f"spk{name}", f'"Say" {name}.')
        for name in "abc"
    ]
    check(tmp_path / "cv", tmp_path, "common_voice", expected)
    wider = find_audio(tmp_path / "cv", ["validated"], None)
    roles = {entry.id[-1]: entry.role for entry in wider.entries}
    assert roles == {"a": "train", "b": "train", "c": "validation", "d": "train"}, (
        "what is validated on isn't trained on"
    )
    write_text(tmp_path / "cv/train.tsv", header, "too\tfew")
    refuse(tmp_path / "cv", r"train\.tsv can't be read \(line 2 has 2 values, but the first line names 4 columns\)")


def test_voxpopuli(tmp_path: Path, write_audio: Writer) -> None:
    header = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender"
    for split, id in (("train", "20130207-0900-PLENARY-7-en_1"), ("dev", "20140303-0900-PLENARY-2-en_2")):
        write_audio(tmp_path / "en" / id[:4] / f"{id}.ogg")
        write_text(tmp_path / f"en/asr_{split}.tsv", header, f"{id}\tRaw.\traw\t77\t{split}\tmale")
    expected = [
        ("20130207-0900-PLENARY-7-en_1", "train", "77", "raw"),
        ("20140303-0900-PLENARY-2-en_2", "validation", "77", "raw"),
    ]
    check(tmp_path / "en", tmp_path, "voxpopuli", expected)


def test_labels_beside_the_audio_of_a_folder(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "libri/train-clean/19/7/19-7-0000.flac")
    write_audio(tmp_path / "libri/dev-clean/84/7/84-7-0000.flac")
    write_text(tmp_path / "libri/train-clean/19/7/19-7.trans.txt", "19-7-0000 HELLO WORLD")
    expected = [("19-7-0000", "train", "19", "HELLO WORLD"), ("84-7-0000", "validation", "84", "")]
    check(tmp_path / "libri", tmp_path, "folder", expected)
    write_audio(tmp_path / "mls/train/audio/1/2/1_2_000000.flac")
    write_audio(tmp_path / "mls/dev/audio/3/4/3_4_000000.flac")
    write_text(tmp_path / "mls/train/transcripts.txt", "1_2_000000\tbonjour")
    expected = [
        ("dev/audio/3/4/3_4_000000", "validation", "3", ""),
        ("train/audio/1/2/1_2_000000", "train", "1", "bonjour"),
    ]
    check(tmp_path / "mls", tmp_path, "folder", expected)
    for name in ("SA1", "SA2"):
        write_audio(tmp_path / f"timit/TRAIN/DR1/FCJF0/{name}.WAV", format="NIST", subtype="PCM_16")
    write_audio(tmp_path / "timit/TEST/DR1/FAKS0/SA1.WAV", format="NIST", subtype="PCM_16")
    write_text(tmp_path / "timit/TRAIN/DR1/FCJF0/SA1.TXT", "0 4800 She had your dark suit.")
    index = index_corpus(tmp_path / "timit", output=tmp_path / "index")
    assert sorted(u.id for u in index.utterances) == ["TRAIN/DR1/FCJF0/SA1", "TRAIN/DR1/FCJF0/SA2"]
    assert read_labels(tmp_path / "index") == {
        "TRAIN/DR1/FCJF0/SA1": Label("FCJF0", "She had your dark suit."),
        "TRAIN/DR1/FCJF0/SA2": Label("FCJF0", ""),
    }


def test_an_archive_beside_its_audio_is_left_alone(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "c/a.wav")
    write_audio(tmp_path / "c/b.wav")
    write_tar(tmp_path / "c/download.tar", {"a.wav": (tmp_path / "c/a.wav").read_bytes()})
    assert find_audio(tmp_path / "c", None, None).format == "folder"
    assert [entry.id for entry in find_audio(tmp_path / "c", None, None, format="webdataset").entries] == ["a"]


def test_a_format_that_is_named_but_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="there is no corpus format 'esp'; the formats are kaldi, lhotse_shar, lhotse, nemo"
    ):
        check_format("esp")
    path = write_text(tmp_path / "c/x.csv", "path", "a.wav").parent
    for name in sorted(FORMATS.keys() - {"manifest"}):
        with pytest.raises(ValueError, match=str(path)):
            find_audio(path, None, None, format=name)
    refuse(path, "c is a folder, but a manifest is a file", "manifest")


def test_lines_have_limits(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"audio_filepath": "a.wav"}\n{"text": "' + b"x" * MAX_LINE))
    refuse(path, "line 2 of .* has more than 16 MiB")


def test_a_level_too_high_or_too_deep_is_refused(tmp_path: Path, write_audio: Writer) -> None:
    voice = tmp_path / "cv" / "en"
    for name in "ab":
        write_audio(voice / "clips" / f"{name}.wav", 1)
        write_text(
            voice / f"{'train' if name == 'a' else 'test'}.tsv", "client_id\tpath\tsentence", f"x\t{name}.wav\thi"
        )
    refuse(voice / "clips", r"clips has the clips of all splits of a Common Voice corpus; give .*/cv/en, whose tables")
    refuse(
        tmp_path / "cv",
        r"cv is no corpus with tables itself, but .*/cv/en is one in the format common_voice; give that folder",
    )
    refuse(tmp_path, r"but .*/cv/en is one in the format common_voice")
    assert len(find_audio(voice / "clips", ["."], None, format="folder").entries) == 2
    write_text(tmp_path / "k" / "data" / "train" / "wav.scp", f"a {voice / 'clips' / 'a.wav'}")
    refuse(tmp_path / "k", r"k is no corpus with tables itself, but .*/k/data is one in the format kaldi")


def test_another_format_in_the_folder_is_named(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "a.wav", 1)
    write_json(tmp_path / "train.json", {"audio_filepath": "a.wav", "duration": 1.0, "text": "one"})
    assert find_audio(tmp_path, None, None).notes == []
    table = pa.table({"audio": [{"bytes": (tmp_path / "a.wav").read_bytes(), "path": "a.wav"}]})
    (tmp_path / "pq").mkdir()
    pq.write_table(table, tmp_path / "pq" / "train-00000-of-00001.parquet")
    notes = find_audio(tmp_path, None, None).notes
    assert len(notes) == 1 and "also has data in the format huggingface, which is not used; corpus.format" in notes[0]


def test_ljspeech_has_its_transcripts(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "wavs" / "LJ001-0001.wav", 1)
    write_audio(tmp_path / "wavs" / "LJ001-0002.wav", 1)
    write_text(tmp_path / "metadata.csv", "LJ001-0001|In 1455|In fourteen fifty-five", "LJ001-0002|Two|Two")
    index_corpus(tmp_path, output=tmp_path / "index", validation_fraction=0.5)
    assert read_labels(tmp_path / "index")["wavs/LJ001-0001"] == Label("", "In fourteen fifty-five")


def test_manifests_say_what_to_rename(tmp_path: Path, write_audio: Writer) -> None:
    refuse(
        write_text(tmp_path / "a.csv", "Audio,text", "a.wav,hi"),
        "no column 'path'.*; rename the column 'Audio' to path$",
    )
    refuse(write_text(tmp_path / "b.csv", "path,text"), "has a header, but no rows")
    write_audio(tmp_path / "a.wav", 1)
    late = write_text(tmp_path / "c.csv", "path,start,end", "a.wav,1200,1800")
    with pytest.raises(ValueError, match=r"1 outside.*; one of them: .*a\.wav"):
        index_corpus(late, output=tmp_path / "index")
