"""Caches and the audio to which they refer, when one of them lies, moved, lost utterances or is another kind of cache."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_audio, verify_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.audio_place import holder_of, recorded_place
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.create import move_audio
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store

from ...tiny import TEACHER

SHARD_SECONDS = 5.0


def store_audio(location: Path, utterances: list[Utterance], max_failed: float = 0.001) -> Path:
    spec, plan = CacheSpec.of_audio("test", SHARD_SECONDS), plan_audio(utterances, SHARD_SECONDS)
    build_audio_store(location, spec, plan, workers=None, max_failed=max_failed)
    return location


def refer(
    location: Path, audio: Path, utterances: list[Utterance], cache_spec: Callable[..., CacheSpec], **changes: object
) -> Path:
    fingerprint = Cache.open(audio).spec.audio_fingerprint
    spec = cache_spec(audio="store", audio_store=fingerprint, codec="fp16", **changes)
    plan = plan_shards(utterances, spec.shard_seconds)
    build_cache(location, spec, plan, TEACHER, teacher_name=TEACHER, workers=None, audio=str(audio))
    return location


@pytest.fixture
def audio(tmp_path: Path, source_utterances: list[Utterance]) -> Path:
    return store_audio(tmp_path / "audio", source_utterances)


@pytest.fixture
def cache(
    tmp_path: Path, audio: Path, source_utterances: list[Utterance], cache_spec: Callable[..., CacheSpec]
) -> Path:
    return refer(tmp_path / "cache", audio, source_utterances, cache_spec)


def test_a_recorded_place_can_not_name_another_server(cache: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(cache), f"/{tmp_path.name}/cache", recursive=True)
    there = Cache.open(f"memory://{tmp_path.name}/cache")
    for place in ("../audio?endpoint_override=evil.example", "../audio#x", "../a::memory"):
        moved = move_audio(there, place)
        with pytest.raises(CacheError, match="which is not opened unasked because a cache may come from a stranger"):
            holder_of(moved)
    files.rm(f"/{tmp_path.name}", recursive=True)


def test_places_in_one_bucket_keep_the_options_of_the_location(tmp_path: Path) -> None:
    options = "?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9"
    bucket, other = Store(f"s3://bucket/caches/a{options}"), Store(f"s3://bucket/audio{options.replace(':9', ':8')}")
    assert recorded_place(bucket, Store(f"s3://bucket/audio{options}")) == "../../audio"
    assert recorded_place(bucket, other) == other.location, "another server"
    assert recorded_place(Store(tmp_path / "a?b"), Store(tmp_path / "audio")) == "../audio"


def test_a_given_place_serves_all_of_a_repair(cache: Path, audio: Path, tmp_path: Path) -> None:
    files, place = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/audio"
    files.put(str(audio), f"/{tmp_path.name}/audio", recursive=True)
    shutil.rmtree(audio)
    damaged = cache / "clean" / "part-00000.parquet"
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:100])
    done = repair_cache(cache, audio=place)
    assert [sentence.split()[-1] for sentence in done] == ["audio", "rebuilt"] and damaged.read_bytes() == sound
    assert verify_cache(cache, audio=place) == []
    files.rm(f"/{tmp_path.name}", recursive=True)


def test_a_repair_leaves_out_nothing_that_the_file_held(
    cache: Path, audio: Path, tmp_path: Path, source_utterances: list[Utterance]
) -> None:
    lost = next(utterance for utterance in source_utterances if utterance.split == "train")
    Path(lost.path).write_bytes(b"no audio")
    lacking = store_audio(tmp_path / "lacking", source_utterances)
    shard = next(shard for shard in Cache.open(cache).shards if lost.id in list(shard.utterances.ids()))
    damaged = cache / "clean" / f"part-{shard.number:05d}.parquet"
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:100])
    with pytest.raises(CacheError, match=f"1 failure while caching: utterance {lost.id}: "):
        repair_cache(cache, audio=str(lacking))
    repair_cache(cache, audio=str(audio))
    assert damaged.read_bytes() == sound and verify_cache(cache) == []


def test_audio_without_any_utterance_of_a_split_is_refused(
    cache: Path, tmp_path: Path, source_utterances: list[Utterance]
) -> None:
    for utterance in source_utterances:
        if utterance.split == "train":
            Path(utterance.path).write_bytes(b"no audio")
    empty = store_audio(tmp_path / "empty", source_utterances, max_failed=100)
    with pytest.raises(CacheError, match=r"the audio at .*/empty lacks utterance \S+ of the cache at .*/cache"):
        CacheReader(cache, "train", audio=str(empty))


def test_audio_of_another_length_is_refused(cache: Path, tmp_path: Path, source_utterances: list[Utterance]) -> None:
    first = next(utterance for utterance in source_utterances if utterance.split == "train")
    soundfile.write(first.path, np.zeros(8_000), 16_000)
    digest = hashlib.sha256(load_audio(Path(first.path)).tobytes()).hexdigest()
    shorter = Utterance(first.id, first.path, 8_000, first.split, digest)
    others = [utterance for utterance in source_utterances if utterance is not first]
    other = store_audio(tmp_path / "other", [shorter, *others])
    with pytest.raises(CacheError, match=rf"/other lacks utterance {first.id} of the cache"):
        CacheReader(cache, "train", audio=str(other))


def test_an_utterance_of_another_split_is_refused(
    tmp_path: Path, audio: Path, source_utterances: list[Utterance], cache_spec: Callable[..., CacheSpec]
) -> None:
    first = next(utterance for utterance in source_utterances if utterance.split == "train")
    others = [utterance for utterance in source_utterances if utterance is not first]
    moved = Utterance(first.id, first.path, first.num_samples, "validation", first.sha256)
    with pytest.raises(CacheError, match=rf"/audio, which has another split for {first.id}; set cache.audio_path"):
        refer(tmp_path / "cache", audio, [moved, *others], cache_spec)


def test_an_audio_store_has_no_targets(audio: Path) -> None:
    with pytest.raises(
        CacheError, match=r"/audio is an audio store, which has no targets; give the cache of a teacher"
    ):
        CacheReader(audio, "train")


def test_the_folder_of_the_audio_is_no_link(audio: Path, cache: Path, tmp_path: Path) -> None:
    (audio / "audio").rename(tmp_path / "elsewhere")
    (audio / "audio").symlink_to(tmp_path / "elsewhere")
    for use in (verify_cache, repair_cache):
        with pytest.raises(CacheError, match="/audio/audio is a symbolic link, which is not followed in a cache"):
            use(audio)
    with pytest.raises(CacheError, match="is a symbolic link"):
        verify_audio(Cache.open(cache))
