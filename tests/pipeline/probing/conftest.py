"""Fixtures shared by the tests of probes."""

from pathlib import Path

import numpy as np
import pytest
import soundfile


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    """A folder of tones whose pitches give their class and their sequence, with a manifest of each kind."""
    rng = np.random.default_rng(0)
    pitches = {"a": 300.0, "b": 900.0, "c": 2700.0}
    labels, transcripts = ["path,label,split"], ["path,transcript,split"]
    for n in range(40):
        word = "".join(rng.permutation(list("abc"))[: rng.integers(1, 4)])
        time = np.arange(4800) / 16_000
        silence = np.zeros(1600)
        pieces = [piece for letter in word for piece in (0.3 * np.sin(2 * np.pi * pitches[letter] * time), silence)]
        wave = np.concatenate([silence, *pieces]) + 0.003 * rng.normal(size=1600 + 6400 * len(word))
        soundfile.write(tmp_path / f"{n}.flac", wave, 16_000, subtype="PCM_16")
        split = "test" if n % 4 == 3 else "train"
        labels.append(f"{n}.flac,{word[0]},{split}")
        transcripts.append(f"{n}.flac,{word},{split}")
    (tmp_path / "first.csv").write_text("\n".join(labels))
    (tmp_path / "words.csv").write_text("\n".join(transcripts))
    return tmp_path
