"""Caches and indexes of earlier versions, whose hashes of resampled audio depend on the machine."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ray_distill.pipeline.corpus import index as corpus_index
from ray_distill.pipeline.corpus.cached_corpus import known_fingerprint
from ray_distill.pipeline.corpus.found import SkippedFiles
from ray_distill.pipeline.corpus.index import CorpusIndex, index_corpus
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.create import move_audio
from ray_distill.teacher_cache.storage.shard_plan import Utterance, Utterances, plan_shards

from ...tiny import TEACHER

Make = Callable[..., CacheSpec]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six files of 8 kHz, and one of 16 kHz."""
    (tmp_path / "audio").mkdir()
    for n in range(7):
        wave = 0.3 * np.random.default_rng(n).standard_normal(4_000 + 700 * n).clip(-3, 3)
        soundfile.write(tmp_path / "audio" / f"u{n}.wav", wave, 16_000 if n == 6 else 8_000)
    return tmp_path / "audio"


def as_earlier(index: CorpusIndex) -> CorpusIndex:
    """Return the index as an earlier version made it, on a machine that rounds differently."""
    earlier = [
        u if ":" not in u.sha256 else replace(u, sha256=hashlib.sha256(u.id.encode()).hexdigest())
        for u in index.utterances
    ]
    return CorpusIndex(Utterances.of(earlier), index.skipped)


def build(folder: Path, cache_spec: Make, index: CorpusIndex, **changes: object) -> Cache:
    spec = cache_spec(corpus=index.fingerprint, **changes)
    plan = plan_shards(index.utterances, spec.shard_seconds)
    build_cache(folder, spec, plan, TEACHER, teacher_name=TEACHER, workers=None)
    return Cache.open(folder)


def test_a_cache_of_an_earlier_version_serves_a_new_index(corpus: Path, tmp_path: Path, cache_spec: Make) -> None:
    index = index_corpus(corpus, output=tmp_path / "index")
    earlier = as_earlier(index)
    assert index.fingerprint != earlier.fingerprint
    cache = build(tmp_path / "cache", cache_spec, earlier, layers=(1,))
    assert known_fingerprint(cache, index) == earlier.fingerprint
    assert known_fingerprint(cache, earlier) == earlier.fingerprint
    # The cache grows with the new index.
    grown = replace(earlier, utterances=index.utterances)
    spec = cache_spec(corpus=earlier.fingerprint, layers=(1, 2))
    build_cache(
        tmp_path / "cache",
        spec,
        plan_shards(grown.utterances, spec.shard_seconds),
        TEACHER,
        teacher_name=TEACHER,
        workers=None,
    )
    assert not Cache.open(tmp_path / "cache").missing(spec)


def test_another_corpus_is_not_taken_for_that_of_the_cache(corpus: Path, tmp_path: Path, cache_spec: Make) -> None:
    index = index_corpus(corpus, output=tmp_path / "index")
    cache = build(tmp_path / "cache", cache_spec, as_earlier(index), layers=(1,))
    members = index.utterances

    def known(*changed: Utterance) -> bool:
        other = CorpusIndex(Utterances.of(changed), SkippedFiles())
        return known_fingerprint(cache, other) != other.fingerprint

    assert known(*members)
    assert not known(*members[:-1])
    assert not known(replace(members[0], num_samples=members[0].num_samples + 1), *members[1:])
    assert not known(replace(members[0], id="other"), *members[1:])
    assert not known(*members[:-1], replace(members[-1], sha256="0" * 64)), "at 16 kHz the hash is exact"
    wave, rate = soundfile.read(corpus / "u0.wav")
    soundfile.write(corpus / "u0.wav", wave + 0.001, rate)
    assert not known(*index_corpus(corpus, output=tmp_path / "other").utterances), "the audio differs by 33 steps"


def test_an_index_of_an_earlier_version_is_reused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_index, "_SCHEMA", 2)
    earlier = index_corpus(corpus, output=tmp_path / "index")
    monkeypatch.undo()
    again = index_corpus(corpus, output=tmp_path / "index")
    assert again.reused and again.fingerprint == earlier.fingerprint
    soundfile.write(corpus / "u9.wav", np.zeros(9_000), 8_000)
    assert not index_corpus(corpus, output=tmp_path / "index").reused


def test_a_given_place_of_the_audio_is_heard(corpus: Path, tmp_path: Path, cache_spec: Make) -> None:
    index = index_corpus(corpus, output=tmp_path / "index")
    earlier = as_earlier(index)
    audio = CacheSpec.of_audio(earlier.fingerprint, 5)
    build_audio_store(tmp_path / "store", audio, plan_audio(earlier.utterances, 5), workers=None)
    spec = cache_spec(
        corpus=earlier.fingerprint, layers=(1,), audio="store", audio_store=audio.audio_fingerprint, codec="fp16"
    )
    plan = plan_shards(earlier.utterances, 5)
    place = str(tmp_path / "store")
    build_cache(tmp_path / "cache", spec, plan, TEACHER, teacher_name=TEACHER, workers=None, audio=place)
    moved = move_audio(Cache.open(tmp_path / "cache"), "s3://bucket/store")  # It is not opened unasked.
    assert known_fingerprint(moved, index, place) == earlier.fingerprint
