"""Pieces of files and channels, from a manifest to the index, and long recordings that are cut."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from ray_distill.pipeline.corpus.index import CorpusIndex, index_corpus
from ray_distill.pipeline.corpus.labels import Label, read_labels
from ray_distill.pipeline.corpus.long_audio import cut_points
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.source_audio import load_waveform

Writer = Callable[..., Path]


def bounds(index: CorpusIndex) -> dict[str, tuple[int | None, int | None]]:
    return {u.id: (u.address.start, u.address.end) for u in index.utterances}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_pieces_of_a_manifest(tmp_path: Path, write_audio: Writer, kind: str) -> None:
    write_audio(tmp_path / "a.flac", 3, 8_000)
    write_audio(tmp_path / "b.wav", 1)
    rows = [
        ("path", "start", "end", "split", "speaker", "text"),
        ("a.flac", "0", "1.00006", "train", "s1", 'he said "yes'),
        ("a.flac", "1.00006", "", "train", "s1", "x"),
        ("a.flac", "", "0.5", "dev", "s2", ""),
        ("b.wav", "", "", "train", "", ""),
        ("a.flac", "2", "3.05", "train", "", ""),
        ("a.flac", "2", "3.2", "train", "", ""),
    ]
    manifest = tmp_path / f"m.{kind}"
    if kind == "jsonl":
        lines = [
            "{"
            + ", ".join(f'"{k}": "{v}"'.replace('said "', "said '") for k, v in zip(rows[0], row, strict=True))
            + "}"
            for row in rows[1:]
        ]
        manifest.write_text("\n".join(lines))
    else:
        quoted = [[f'"{v.replace(chr(34), chr(34) * 2)}"' if kind == "csv" else v for v in row] for row in rows]
        manifest.write_text("\n".join(("," if kind == "csv" else "\t").join(row) for row in quoted))
    index = index_corpus(manifest, output=tmp_path / "i")
    assert bounds(index) == {
        "a_00000.00_00001.00": (0, 8000),
        "a_00001.00_end": (8000, None),
        "a_00000.00_00000.50": (None, 4000),
        "b": (None, None),
        "a_00002.00_00003.05": (16_000, 24_000),
    }
    assert [(skip.reason, skip.path.name) for skip in index.skipped] == [("outside", "a.flac")]
    assert "a.flac (samples 16000 to 25600) is outside the audio, which has 24000 samples" in index.skipped[0].message
    found = {u.id: u for u in index.utterances}
    assert found["a_00000.00_00000.50"].split == "validation"
    assert found["b"].path == str(tmp_path / "b.wav")
    samples, _ = soundfile.read(tmp_path / "a.flac", dtype="int16")
    soundfile.write(tmp_path / "piece.wav", samples[8000:], 8_000)
    assert np.array_equal(load_audio(found["a_00001.00_end"].path), load_audio(tmp_path / "piece.wav"))
    for utterance in index.utterances:
        assert len(load_waveform(utterance)) == utterance.num_samples
    assert index_corpus(manifest, output=tmp_path / "i").reused
    labels = read_labels(tmp_path / "i")
    assert labels["a_00001.00_end"] == Label("s1", "x") and "b" not in labels
    assert labels["a_00000.00_00001.00"].text.startswith("he said")
    assert (index.labels.transcripts, index.labels.speakers) == (2, 2)
    manifest.write_text(manifest.read_text().replace("1.00006", "1.25"))
    changed = index_corpus(manifest, output=tmp_path / "i")
    assert not changed.reused and changed.fingerprint != index.fingerprint


def test_channels(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "calls" / "a.wav", 1, 8_000, 2)
    write_audio(tmp_path / "calls" / "b.wav", 1, 8_000, 2)
    write_audio(tmp_path / "calls" / "c.wav", 1, 8_000, 1)
    plain = index_corpus(tmp_path / "calls", output=tmp_path / "i")
    assert len(plain.notes) == 1 and plain.notes[0].startswith("2 of 3 utterances have several channels, and the mean")
    again = index_corpus(tmp_path / "calls", output=tmp_path / "i")
    assert again.reused and again.notes == plain.notes, "it is said each time"
    mixed = index_corpus(tmp_path / "calls", channel="mix", output=tmp_path / "j")
    assert mixed.notes == () and mixed.utterances == plain.utterances
    second = index_corpus(tmp_path / "calls", channel=1, validation_fraction=0.5, output=tmp_path / "k")
    assert [(skip.path.name, skip.reason) for skip in second.skipped] == [("c.wav", "no_channel")]
    rows = "path,channel\n" + "".join(f"calls/{name}.wav,{channel}\n" for name in "ab" for channel in (0, 1))
    (tmp_path / "m.csv").write_text(rows)
    both = index_corpus(tmp_path / "m.csv", channel=0, output=tmp_path / "l")
    assert [u.id for u in both.utterances] == ["calls/a_c0", "calls/a_c1", "calls/b_c0", "calls/b_c1"]
    assert len({u.sha256 for u in both.utterances}) == 4 and both.notes == ()
    assert {u.sha256 for u in second.utterances} < {u.sha256 for u in both.utterances}


def blocks(samples: np.ndarray, size: int) -> list[np.ndarray]:
    return [samples[n : n + size].astype(np.float32) for n in range(0, len(samples), size)]


def test_cuts_are_in_pauses_whatever_the_blocks() -> None:
    rate = 8_000
    samples = 0.3 * np.sin(np.arange(60 * rate) * 0.3)
    for pause in (18.5, 31.0, 49.0):
        samples[round(pause * rate) : round((pause + 0.4) * rate)] *= 0.01
    points = cut_points(blocks(samples, 100_000), rate, 20, 0.025)
    assert points == cut_points(blocks(samples, 333), rate, 20, 0.025)
    assert points[0] == 0 and points[-1] == len(samples)
    for point, pause in zip(points[1:-1], (18.5, 31.0, 49.0), strict=True):
        assert pause + 0.1 <= point / rate <= pause + 0.3


@pytest.mark.parametrize("seconds", [20.0, 20.01, 20.04, 40.0, 40.01, 59.99, 63.7])
@pytest.mark.parametrize("level", [0.0, 0.5])
@pytest.mark.parametrize("rate", [8_000, 22_050])
def test_windows_cover_everything(seconds: float, level: float, rate: int) -> None:
    samples = level * np.random.default_rng(0).standard_normal(round(seconds * rate))
    points = cut_points(blocks(samples, 65_536), rate, 20, 0.5)
    lengths = np.diff(points) / rate
    assert points[0] == 0 and points[-1] == len(samples)
    assert lengths.max() <= 20 and lengths.min() >= 0.5
    assert len(lengths) <= 2 * seconds / 20


def test_long_recordings_are_cut(tmp_path: Path, write_audio: Writer) -> None:
    write_audio(tmp_path / "c" / "talk.ogg", 5.3)
    write_audio(tmp_path / "c" / "short.wav", 1)
    (tmp_path / "c" / "talk.txt").write_text("a long talk")
    with pytest.raises(ValueError, match="1 too_long"):
        index_corpus(tmp_path / "c", max_seconds=2, output=tmp_path / "i")
    write_audio(tmp_path / "c" / "brief.wav", 0.5)
    skipping = index_corpus(tmp_path / "c", max_seconds=2, output=tmp_path / "i")
    assert skipping.notes == (
        "1 recording longer than 2 s was skipped; set corpus.long_audio=cut to cut them at pauses",
    )
    index = index_corpus(tmp_path / "c", max_seconds=2, long_audio="cut", output=tmp_path / "i")
    windows = [u for u in index.utterances if u.id not in ("short", "brief")]
    assert windows[0].id.startswith("talk_00000.00_0000") and windows[-1].id.endswith("_00005.30")
    ends = [(u.address.start, u.address.end) for u in windows]
    assert [end for _, end in ends[:-1]] == [start for start, _ in ends[1:]] and ends[-1][1] == 84_800
    assert sum(u.num_samples for u in windows) == 84_800 and all(u.num_samples <= 32_000 for u in windows)
    counts = f"1 recording longer than 2 s was cut into {len(windows)} utterances"
    assert index.notes == (counts,)
    assert read_labels(tmp_path / "i") == {}, "the transcript is that of the recording"
    assert index_corpus(tmp_path / "c", max_seconds=2, long_audio="cut", output=tmp_path / "i").reused


def test_urls_in_a_manifest(tmp_path: Path, write_audio: Writer) -> None:
    file = write_audio(tmp_path / "a.flac", 1)
    # One file each: threads that open the same file of this file system share its position.
    fsspec.filesystem("memory").pipe({f"/corpus/{name}.flac": file.read_bytes() for name in "ab"})
    rows = [
        "memory://corpus/a.flac,0,0.5",
        "memory://corpus/b.flac,0.5,",
        f"file://{file},,",
        "memory://corpus/no.wav,,",
    ]
    (tmp_path / "m.csv").write_text("path,start,end\n" + "\n".join(rows))
    index = index_corpus(tmp_path / "m.csv", output=tmp_path / "i")
    assert [u.num_samples for u in index.utterances] == [16_000, 8_000, 8_000]
    assert [str(skip.path) for skip in index.skipped] == ["memory:/corpus/no.wav"]
    assert (
        "\nmemory://corpus/no.wav,undecodable,memory://corpus/no.wav can't be read"
        in (tmp_path / "i/skipped.csv").read_text()
    )
    assert index_corpus(tmp_path / "m.csv", output=tmp_path / "i").reused
