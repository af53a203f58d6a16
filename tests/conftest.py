"""Fixtures for all tests."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.teachers import load_teacher

from .tiny import TEACHER

# The models are tiny, so more threads would only cost time, above all on a busy machine.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no worker is left with a long file at the end (see `make test`)."""
    marks = ("slow", "server", "browser")
    slow = {item.path for item in items if any(item.get_closest_marker(mark) for mark in marks)}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the optional folder of golden tensors, speech and trained teachers beside the repository; skip the test without it."""
    folder = Path(os.environ.get("SHARED_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"needs the shared test data, which is not in {folder}; set SHARED_DATA to its folder")
    return folder


@pytest.fixture
def speech_folder(tmp_path: Path) -> Path:
    """Write twelve short waveforms (0.6 to 2.2 s) of modulated tones to a folder with two splits in LibriSpeech's layout."""
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
def source_utterances(speech_folder: Path) -> list[Utterance]:
    """Return the utterances of speech_folder as a cache build expects them."""
    found = []
    for path in sorted(speech_folder.rglob("*.flac")):
        waveform = load_audio(path)
        split = "train" if path.relative_to(speech_folder).parts[0].startswith("train") else "validation"
        digest = hashlib.sha256(waveform.tobytes()).hexdigest()
        found.append(Utterance(path.stem, str(path), len(waveform), split, digest))
    return found


@pytest.fixture
def cache_spec() -> Callable[..., CacheSpec]:
    """Return a function that makes the spec of a small cache of `TEACHER`: two draws, fp32, several shards. Keywords change it."""

    def make(teacher: str = TEACHER, **changes: object) -> CacheSpec:
        loaded = load_teacher(teacher)
        values = {
            "teacher": loaded.fingerprint,
            "num_layers": loaded.num_layers,
            "dim": loaded.dim,
            "layers": range(1, loaded.num_layers + 1),
            "masks": MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=2, seed=3),
            "codec": "fp32",
            "corpus": "test",
            "shard_seconds": 5,
            "batch_seconds": 6,
            "frame_rate": loaded.stated_rate,
        }
        return CacheSpec.model_validate(values | changes)

    return make


@pytest.fixture
def make_cache(cache_spec: Callable[..., CacheSpec], source_utterances: list[Utterance]) -> Callable[..., CacheSpec]:
    """Return a function that builds such a cache of the test speech at a location, in this process, and returns its spec.

    ``place`` is the location of the audio to which the cache refers.
    """

    def make(location: Path | str, teacher: str = TEACHER, *, place: str | None = None, **changes: object) -> CacheSpec:
        spec = cache_spec(teacher, **changes)
        plan = plan_shards(source_utterances, spec.shard_seconds)
        build_cache(location, spec, plan, teacher, teacher_name=teacher, workers=None, audio=place)
        return spec

    return make


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps transformers off the network, and lets it copy the code of exported folders to a temporary folder."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (the dev extra has it)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        modules = tmp_path_factory.mktemp("modules")
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
        yield
