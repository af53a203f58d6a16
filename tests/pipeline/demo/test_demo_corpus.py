"""The demo corpus contains speech of several voices and is reproducible."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.teacher.speech import VARIANTS
from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.demo.demo_corpus import VOICES, make_demo_corpus
from ray_distill.pipeline.demo.phones import PHONES
from ray_distill.pipeline.probing.task import PHONES_FILE, read_task
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, num_frames

REPOSITORY = Path(__file__).resolve().parents[3]
needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng-loader is not installed (it is the [demo] extra)",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_corpus(tmp_path_factory.mktemp("demo") / "demo-corpus", minutes=1.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.flac"))}


@needs_espeak
def test_it_is_a_corpus_of_the_requested_size(demo: Path, tmp_path: Path) -> None:
    index = index_corpus(demo, output=tmp_path / "index")
    assert index.skipped == []
    assert 1.0 <= index.hours * 60 <= 1.6
    speakers = {
        split: {Path(u.path).parts[-3] for u in index.utterances if u.split == split}
        for split in ("train", "validation")
    }
    assert len(speakers["train"]) == 8 and len(speakers["validation"]) == 4
    variants = {split: {voice.name.partition("+")[2] for voice in VOICES[split]} for split in VOICES}
    assert not variants["train-demo"] & variants["dev-demo"]
    assert not variants["dev-demo"] & set(VARIANTS), "the teacher was trained on a voice of the validation split"


@needs_espeak
def test_every_frame_has_a_phone_where_it_sounds(demo: Path) -> None:
    task = read_task(demo / PHONES_FILE)
    assert task.kind == "frame" and set(task.vocabulary) <= set(PHONES) and len(task.vocabulary) > 35
    loud: dict[str, list[float]] = {}
    for example in task.examples:
        samples = load_audio(example.path)
        assert len(example.target) == num_frames(len(samples))
        frames = np.lib.stride_tricks.sliding_window_view(samples, RECEPTIVE_FIELD)[::FRAME_SAMPLES]
        for frame, phone in zip(frames, example.target, strict=True):
            crossings = float((np.diff(np.signbit(frame)) != 0).mean())
            loud.setdefault(phone, []).append(crossings)
        assert example.test == ("dev-demo" in example.path.parts)
    # Fricatives cross zero far more often than vowels, so labels and sounds are at the same times.
    assert min(np.median(loud[phone]) for phone in ("S", "SH")) > 3 * max(np.median(loud[p]) for p in ("AE", "IY", "M"))


@needs_espeak
def test_it_is_16_bit_flac_of_speech_not_silence(demo: Path) -> None:
    voices: dict[str, list[np.ndarray]] = {}
    for path in demo.rglob("*.flac"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        samples = soundfile.read(path)[0]
        voices.setdefault(path.parts[-3], []).append(samples)
        assert 1.0 < len(samples) / 16_000 < 8.0
        assert 0.03 < samples.std() < 0.3
        # Speech alternates between loud syllables and gaps.
        level = samples[: len(samples) // 400 * 400].reshape(-1, 400).std(1)
        assert np.percentile(level, 90) > 5 * np.percentile(level, 5)
    spectra = []
    for samples in voices.values():
        power = np.abs(np.fft.rfft(np.concatenate(samples), 1 << 20)) ** 2
        spectra.append(power.reshape(-1)[: 1 << 19].reshape(64, -1).sum(1))
        share = spectra[-1] / spectra[-1].sum()
        assert share[:8].sum() > 0.4 and share[8:32].sum() > 0.005  # below 1 kHz, 1 to 4 kHz
        spectra[-1] = np.log(share)
    # Voices differ from each other.
    for n, spectrum in enumerate(spectra):
        for other in spectra[:n]:
            assert np.abs(spectrum - other).mean() > 0.1


@pytest.mark.slow
@needs_espeak
def test_every_process_synthesises_the_same_corpus(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus;"
        "make_demo_corpus(Path(sys.argv[1]), 1.0)"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], cwd=REPOSITORY, check=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@needs_espeak
def test_a_complete_corpus_is_kept_and_an_incomplete_one_is_replaced(tmp_path: Path) -> None:
    folder = make_demo_corpus(tmp_path / "d", minutes=0.1)
    names = set(contents(folder))
    first = folder / min(names)
    first.unlink()
    make_demo_corpus(folder, minutes=0.1)
    assert not first.exists()
    for marker in folder.glob(".complete-*"):
        marker.unlink()
    (folder / "train-demo" / "0" / "0" / "0-0-9999.flac").write_bytes(b"half a file")
    make_demo_corpus(folder, minutes=0.1)
    # Lengths differ slightly within a process, so a voice may need one sentence more or less.
    count = sum(map(len, VOICES.values()))
    assert {name.split("/")[1] for name in contents(folder)} == {str(n) for n in range(count)}
    assert first.exists() and not (folder / "train-demo" / "0" / "0" / "0-0-9999.flac").exists()


def test_without_the_synthesiser_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match="install the 'demo' extra .* or set CORPUS"):
        make_demo_corpus(tmp_path / "d")
