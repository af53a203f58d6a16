"""Suffixes: all formats of libsndfile are found and decoded, and other audio is listed."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.corpus.search import find_audio
from ray_distill.pipeline.corpus.suffixes import FORMAT_SUFFIXES, UNSUPPORTED


def test_every_format_of_libsndfile_is_used(tmp_path: Path) -> None:
    wave = 0.3 * np.sin(np.arange(8000) * 0.1)
    ids = set()
    for kind in sorted(set(soundfile.available_formats()) - {"RAW", "XI"}):  # They don't say their sampling rate.
        for suffix in FORMAT_SUFFIXES[kind].split():
            path = tmp_path / "c" / f"{kind}.{suffix.upper() if len(ids) % 2 else suffix}"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, wave, 16_000, format=kind, subtype="OPUS" if suffix == "opus" else None)
            ids.add(path.name)
    index = index_corpus(tmp_path / "c", output=tmp_path / "i")
    assert {Path(utterance.path).name for utterance in index.utterances} == ids
    # Sound Designer II stores its format in a second file, which a Macintosh hides.
    assert {skip.path.name for skip in index.skipped} <= {"._SD2.sd2"}


def test_audio_that_cannot_be_decoded_is_listed(tmp_path: Path) -> None:
    names = ["x.m4a", "x.webm", "x.WMA", "x.aac", "x.amr", "x.pcm"]
    for name in [*names, "notes.txt", "cover.jpg"]:
        (tmp_path / name).write_bytes(b"?")
    with pytest.raises(
        ValueError, match=r"contains no audio \(1 .aac, 1 .amr, 1 .m4a, 1 .pcm, 1 .webm, 1 .wma files can't"
    ):
        find_audio(tmp_path, None, None)
    (tmp_path / "x.wav").touch()
    found = find_audio(tmp_path, None, None)
    assert {(skip.path.name, skip.reason) for skip in found.skipped} == {(name, "unsupported_format") for name in names}
    assert all("convert it to flac or wav" in skip.message for skip in found.skipped)
    assert ".wav" not in UNSUPPORTED
