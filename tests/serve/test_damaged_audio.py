"""Seeded mutations of audio in every accepted format are decoded or refused, and never make the service fail.

``python -m tests.serve.test_damaged_audio 20000`` runs more cases.
"""

import io
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from ray_distill.serve.api.errors import STATUS, ServiceError
from ray_distill.serve.decoding import decode

FORMATS = [("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]


def mutate(audio: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite a few bytes, mostly in the header; then possibly cut out or double a part, or cut off the end."""
    data = bytearray(audio)
    for _ in range(rng.integers(1, 6)):
        reach = 100 if rng.random() < 0.6 else len(data)
        data[rng.integers(min(reach, len(data)))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
    start, end = sorted(rng.integers(0, len(data) + 1, 2))
    kind = rng.integers(5)
    if kind == 0:
        del data[start:end]
    elif kind == 1:
        data[end:end] = data[start:end]
    elif kind == 2:
        del data[max(end, 1) :]
    return bytes(data)


def run(cases: int, seed: int = 0) -> Counter[str]:
    """Return the outcomes of ``cases`` mutations, with the formats in turn."""
    rng = np.random.default_rng(seed)
    sources = []
    for name, subtype in FORMATS:
        buffer = io.BytesIO()
        soundfile.write(buffer, rng.normal(0, 0.1, 4800), 16_000, format=name, subtype=subtype)
        sources.append(buffer.getvalue())
    outcomes: Counter[str] = Counter()
    for case in range(cases):
        try:
            waveform = decode(mutate(sources[case % len(sources)], rng), max_seconds=5)
            assert waveform.dtype == np.float32 and 400 <= len(waveform) <= 5 * 16_000 + 1
            assert np.isfinite(waveform).all() and np.abs(waveform).max() <= 1
            outcomes["decoded"] += 1
        except ServiceError as error:
            outcomes[error.error_type] += 1
    assert {STATUS[kind] for kind in outcomes if kind != "decoded"} <= {400, 413, 422}  # type: ignore[index]
    return outcomes


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_audio_is_decoded_or_refused(seed: int) -> None:
    outcomes = run(1000, seed)
    assert outcomes["decoded"] > 50 and outcomes["undecodable"] > 50


def test_samples_on_the_scale_of_integers_are_refused() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-20_000, 20_000, 8000), 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(ServiceError, match=r"samples far outside \[-1, 1\]") as caught:
        decode(buffer.getvalue(), max_seconds=5)
    assert caught.value.error_type == "undecodable"


if __name__ == "__main__":
    print(run(int(sys.argv[1])))
