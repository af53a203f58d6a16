"""The identity of a file's audio does not depend on the machine, and records of earlier versions stay usable."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ray_distill.teacher_cache import audio
from ray_distill.teacher_cache.audio import load_audio, load_identified_audio
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.shard_plan import Utterance


def write(
    path: Path, rate: int, seconds: float = 1.7, channels: int = 1, subtype: str | None = None, seed: int = 0
) -> Path:
    wave = 0.3 * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels)).clip(-3, 3)
    soundfile.write(path, wave, rate, subtype=subtype)
    return path


def utterance(path: Path, sha256: str) -> Utterance:
    return Utterance(path.stem, str(path), len(load_audio(path)), "train", sha256)


def hash_of_waveform(path: Path) -> str:
    """Return what earlier versions stored."""
    return hashlib.sha256(load_audio(path).tobytes()).hexdigest()


def test_the_identity_does_not_depend_on_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resample = audio._resample

    def on_another_processor(samples: np.ndarray, rate: int) -> np.ndarray:
        return np.nextafter(resample(samples, rate), np.float32(1))

    paths = [write(tmp_path / f"u{n}.wav", rate, 0.6, seed=n) for n, rate in enumerate((8_000, 22_050, 44_100, 8_000))]
    here = [load_identified_audio(path) for path in paths]
    monkeypatch.setattr(audio, "_resample", on_another_processor)
    there = [load_identified_audio(path) for path in paths]
    assert all(
        hash_of_waveform(path) != hashlib.sha256(wave).hexdigest() for path, (wave, _) in zip(paths, here, strict=True)
    )
    assert [identity for _, identity in here] == [identity for _, identity in there]
    assert [identity.partition(":")[0] for _, identity in here] == ["8000", "22050", "44100", "8000"]
    assert len({identity for _, identity in here}) == 4


def test_the_identity_is_that_of_the_audio(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.wav", 16_000, channels=2)
    assert load_identified_audio(plain)[1] == hash_of_waveform(plain), "as earlier versions, if nothing is resampled"
    samples, _ = soundfile.read(plain, dtype="int16")
    soundfile.write(tmp_path / "copy.flac", samples, 16_000)
    with soundfile.SoundFile(tmp_path / "tagged.wav", "w", 16_000, 2) as file:
        file.title = "a tag"
        file.write(samples)
    assert len({load_identified_audio(tmp_path / name)[1] for name in ("plain.wav", "copy.flac", "tagged.wav")}) == 1
    soundfile.write(tmp_path / "faster.wav", samples, 22_050)
    soundfile.write(tmp_path / "other.wav", samples, 11_025)
    names = ("plain.wav", "faster.wav", "other.wav")
    assert len({load_identified_audio(tmp_path / name)[1] for name in names}) == 3, "the rate counts"


@pytest.mark.parametrize("suffix", ["mp3", "ogg"])
def test_lossy_audio_is_identified_by_its_bytes(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", 16_000)
    expected = f"file:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    waveform, identity = load_identified_audio(path)
    assert identity == expected
    assert np.array_equal(waveform, load_audio(path))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 8_000)
    member = utterance(path, load_identified_audio(path)[1])
    assert len(load_waveform(member)) == member.num_samples
    write(path, 8_000, seed=1)
    with pytest.raises(ValueError, match="a.wav has changed since the corpus was indexed; run the index stage again"):
        load_waveform(member)


def test_a_hash_of_an_earlier_version_is_compared_where_that_is_possible(tmp_path: Path) -> None:
    resampled, lossy, exact = (
        write(tmp_path / name, rate) for name, rate in (("a.wav", 8_000), ("b.ogg", 16_000), ("c.wav", 16_000))
    )
    for path in (resampled, lossy):
        member = utterance(path, "0" * 64)  # As another processor computed it.
        assert len(load_waveform(member)) == member.num_samples
        with pytest.raises(ValueError, match="on a machine that rounds differently; repair the cache there, or remove"):
            load_waveform(member, exact=True)
        load_waveform(utterance(path, hash_of_waveform(path)), exact=True)
        write(path, 8_000 if path == resampled else 16_000, 2.0)
        with pytest.raises(ValueError, match="has changed"):
            load_waveform(member)
    member = utterance(exact, hash_of_waveform(exact))
    assert torch.tensor(load_waveform(member)).abs().max() > 0
    write(exact, 16_000, seed=1)
    with pytest.raises(ValueError, match="has changed"):
        load_waveform(member)
