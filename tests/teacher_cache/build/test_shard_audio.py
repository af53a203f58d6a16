"""Decoded audio of a shard: what failed is left out, and a shard with too many failures is not finished."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ray_distill.teacher_cache.build.audio_store import plan_audio, write_audio
from ray_distill.teacher_cache.build.shard_audio import ShardAudio
from ray_distill.teacher_cache.embedded_audio import ENCODERS
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.create import create_cache
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.storage.store import Store

WAVES = [np.full(800, n / 8, np.float32) for n in (1, 2, 3)]


def test_what_failed_elsewhere_is_left_out_of_the_audio() -> None:
    shard: Any = SimpleNamespace(utterances=[SimpleNamespace(id=name) for name in "abc"])
    audio = ShardAudio([*WAVES[:2], np.zeros(0, np.float32)], [b"1", b"2", b""], {"c": "no audio"})
    left = audio.without(shard, {"b": "NaN", "c": "other"})
    assert [len(wave) for wave in left.waveforms] == [800, 0, 0] and left.waveforms[0] is WAVES[0]
    assert left.waveforms[1].dtype == np.float32 and left.embedded == [b"1", b"", b""]
    assert left.failed == {"b": "NaN", "c": "no audio"}, "the reason found here is the first cause"
    assert audio.without(shard, {}) is audio
    nothing = ShardAudio([], [], {}, "the disk is gone")
    assert nothing.without(shard, {"b": "NaN"}) is nothing


def test_a_shard_of_an_audio_store_with_too_many_failures_is_not_finished(tmp_path: Path) -> None:
    spec = CacheSpec.of_audio("test", 5.0)
    utterances = [Utterance(name, f"/{name}.flac", 800, "train", name * 64) for name in "abc"]
    store = Store(tmp_path / "audio")
    cache: Cache = create_cache(store, spec, plan_audio(utterances, 5.0), teacher_name="", teacher_spec="", state={})
    (shard,) = cache.shards
    encoded = {u.id: ENCODERS[spec.audio](wave) for u, wave in zip(utterances, WAVES, strict=True)}
    waves = [np.zeros(0, np.float32) if u.id != "a" else WAVES[0] for u in shard.utterances]
    data = [b"" if u.id != "a" else encoded["a"] for u in shard.utterances]
    audio = ShardAudio(waves, data, {"b": "cut", "c": "empty"})
    (file,) = cache.files(shard)
    for limit, finished in ((0, False), (1, False), (2, True)):
        record = write_audio(cache, shard, audio, limit)
        assert json.loads(record["failed"]) == audio.failed and record["failures"] == [] and not record["full"]
        assert (store.size(file.commit) is not None) == finished == (record["bytes"] > 0)
    assert write_audio(cache, shard, audio, 0)["failed"] == "{}", "a finished shard is left as it is"
