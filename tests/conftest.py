"""Fixtures shared by all tests."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from teacher_cache.audio import load_audio
from teacher_cache.layout import SourceUtterance

# Tiny models: threads cost more than they bring, above all on a busy machine.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of golden tensors, speech and trained teachers that may lie beside the repository."""
    folder = Path(os.environ.get("SHARED_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"needs the shared test data, which is not at {folder} (set SHARED_DATA to its folder)")
    return folder


@pytest.fixture
def speech_folder(tmp_path: Path) -> Path:
    """A folder of twelve short waveforms (0.6 to 2.2 s) with some structure, in two splits of LibriSpeech's layout."""
    rng = np.random.default_rng(0)
    for n in range(12):
        samples = int(16_000 * (0.6 + 0.14 * n))
        time = np.arange(samples) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * (120 + 30 * n) * time) * np.sin(2 * np.pi * 3 * time) + 0.02 * rng.normal(
            size=samples
        )
        split = "dev-tones" if n % 4 == 3 else "train-tones"
        path = tmp_path / "corpus" / split / str(n) / "0" / f"{n}-0-0000.flac"
        path.parent.mkdir(parents=True)
        soundfile.write(path, wave, 16_000, subtype="PCM_16")
    return tmp_path / "corpus"


@pytest.fixture
def source_utterances(speech_folder: Path) -> list[SourceUtterance]:
    """The utterances of speech_folder, as a cache build takes them."""
    found = []
    for path in sorted(speech_folder.rglob("*.flac")):
        waveform = load_audio(path)
        split = "train" if path.relative_to(speech_folder).parts[0].startswith("train") else "validation"
        digest = hashlib.sha256(waveform.tobytes()).hexdigest()
        found.append(SourceUtterance(path.stem, str(path), len(waveform), split, digest))
    return found
