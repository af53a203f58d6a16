"""A cache of pieces and of audio inside other files: it is built, read, repaired from a moved corpus, and computed online."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from ray_distill.teacher_cache.audio import load_identified_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.teachers import load_teacher

from ...tiny import TEACHER


def test_pieces_in_a_cache(tmp_path: Path, cache_spec: Callable[..., CacheSpec]) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    noise = (0.2 * np.random.default_rng(0).standard_normal((3 * 8_000, 2))).clip(-1, 1)
    soundfile.write(corpus / "call.wav", noise, 8_000)
    soundfile.write(corpus / "whole.flac", noise[:8_000, 0], 16_000)
    data = (corpus / "whole.flac").read_bytes()
    pq.write_table(pa.table({"audio": [{"bytes": data, "path": "x"}] * 2}), corpus / "rows.parquet", row_group_size=1)
    call = str(corpus / "call.wav")
    addresses = {
        "a": AudioAddress(call, start=0, end=8_000, channel=0),
        "b": AudioAddress(call, start=8_000, end=14_000, channel=1),
        "c": AudioAddress(call, start=14_000),
        "d": AudioAddress(str(corpus / "rows.parquet"), row=1, column="audio", end=4_000),
        "e": AudioAddress(str(corpus / "whole.flac")),
    }
    waveforms, utterances = {}, []
    for id, address in addresses.items():
        waveforms[id], identity = load_identified_audio(address)
        utterances.append(Utterance(id, address.encode(), len(waveforms[id]), "train", identity))
    spec = cache_spec(TEACHER, masks=MaskDraws(draws=0))
    build_cache(tmp_path / "cache", spec, plan_shards(utterances, 5), TEACHER, teacher_name=TEACHER, workers=None)
    reader = CacheReader(tmp_path / "cache", "train")
    cached = reader.read(range(5), None)
    assert sorted(cached.ids) == list("abcde")
    online = OnlineReader([utterances["abcde".index(id)] for id in cached.ids], load_teacher(TEACHER), spec.masks)
    again = online.read(range(5), None)
    assert (cached.waveforms == again.waveforms).all()
    for row, id in enumerate(cached.ids):
        length = len(waveforms[id])
        assert np.abs(cached.waveforms[row, :length].numpy() - waveforms[id]).max() <= 2**-16
    shutil.move(corpus, tmp_path / "moved")
    damaged = tmp_path / "cache/clean/part-00000.parquet"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:100] + b"damage" + before[106:])
    assert repair_cache(tmp_path / "cache", corpus_moved=(str(corpus), str(tmp_path / "moved")))
    assert damaged.read_bytes() == before and verify_cache(tmp_path / "cache") == []
