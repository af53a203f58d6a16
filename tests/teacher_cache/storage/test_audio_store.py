"""Caches that refer to audio: an audio store, or another cache, holds it once for all of them."""

import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.derive import derive_cache
from ray_distill.teacher_cache.maintenance.info import info_table
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_audio, verify_cache
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.create import move_audio
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.targets.target_batch import CodedTargets

from ...tiny import TEACHER

Make = Callable[..., CacheSpec]
Refer = Callable[..., CacheSpec]
SHARD_SECONDS = 5.0


def masks(draws: int) -> MaskDraws:
    return MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=draws, seed=3)


@pytest.fixture
def store(tmp_path: Path, source_utterances: list[Utterance]) -> Path:
    """An audio store of the test speech, in shards as those of `make_cache`."""
    spec = CacheSpec.of_audio("test", SHARD_SECONDS)
    report = build_audio_store(tmp_path / "audio", spec, plan_audio(source_utterances, SHARD_SECONDS), workers=None)
    assert report.written == len(Cache.open(tmp_path / "audio").shards) > 2
    return tmp_path / "audio"


@pytest.fixture
def refer(cache_spec: Callable[..., CacheSpec], source_utterances: list[Utterance]) -> Refer:
    """Builds or extends a cache that refers to audio."""

    def make(
        location: Path, audio: Path | None, utterances: list[Utterance] | None = None, **changes: Any
    ) -> CacheSpec:
        there = Cache.open(location if audio is None else audio).spec
        reference = {"audio": "store", "audio_store": there.audio_fingerprint}
        spec = cache_spec(**reference | changes)
        plan = plan_shards(source_utterances if utterances is None else utterances, spec.shard_seconds)
        where = None if audio is None else str(audio)
        build_cache(location, spec, plan, TEACHER, teacher_name=TEACHER, workers=None, audio=where)
        return spec

    return make


def assert_same_batches(one: CacheReader, other: CacheReader) -> None:
    """Compare every batch of two utterances, and every utterance alone, under each draw, bit for bit."""
    assert one.ids == other.ids and one.failed == other.failed and one.draws == other.draws
    for draw in [*range(one.draws or 0)] or [None]:
        for first in range(0, len(one), 2):
            indices = [min(first + 1, len(one) - 1), first]
            mine, theirs = one.read(indices, draw), other.read(indices, draw)
            for name in ("waveforms", "lengths", "num_frames", "frame_mask"):
                ours, its = getattr(mine, name), getattr(theirs, name)
                assert (ours is None and its is None) or torch.equal(ours, its), name
            assert isinstance(mine.coded, CodedTargets) and isinstance(theirs.coded, CodedTargets)
            for (_, codes), (_, others) in zip(mine.coded.columns, theirs.coded.columns, strict=True):
                assert torch.equal(codes, others)
    assert torch.equal(one[0].waveform, other[0].waveform) and torch.equal(one[-1].targets, other[-1].targets)


@pytest.mark.parametrize("targets", ["clean_and_masked", "composite_only"])
def test_batches_are_those_of_a_cache_with_audio(
    tmp_path: Path, make_cache: Make, store: Path, refer: Refer, targets: str
) -> None:
    make_cache(tmp_path / "whole", codec="int8", targets=targets, masks=masks(1), layers=(1,))
    refer(tmp_path / "cache", store, codec="int8", targets=targets, masks=masks(1), layers=(1,))
    # It grows by layers and by draws as the other one does, from the audio that it refers to.
    make_cache(tmp_path / "whole", codec="int8", targets=targets, masks=masks(2))
    # Only the store has this audio now; the codec needs the training split.
    shutil.rmtree(tmp_path / "corpus" / "dev-tones")
    refer(tmp_path / "cache", None, codec="int8", targets=targets, masks=masks(2))
    assert verify_cache(tmp_path / "cache") == verify_cache(store) == []
    for split in ("train", "validation"):
        assert_same_batches(CacheReader(tmp_path / "cache", split), CacheReader(tmp_path / "whole", split))
    whole, cache, audio = (Cache.open(tmp_path / name) for name in ("whole", "cache", "audio"))
    assert cache_bytes(cache) < cache_bytes(whole) - 0.8 * cache_bytes(audio)
    assert cache.record["audio_path"] == "../audio" and audio.spec.audio_fingerprint == whole.spec.audio_fingerprint


def test_copies_and_windows_take_the_audio_along(tmp_path: Path, make_cache: Make, store: Path, refer: Refer) -> None:
    make_cache(tmp_path / "whole", codec="fp16")
    refer(tmp_path / "cache", store, codec="fp16")
    copied = CacheReader(tmp_path / "cache", "train", local=tmp_path / "copies")
    assert not copied.needs_window and copied.read_ahead is not None
    copied.read_ahead.expect([0, 1], 0)
    copied.read_ahead.clear()
    assert_same_batches(copied, CacheReader(tmp_path / "whole", "train"))
    shards = [path for folder in ("audio", "cache") for path in (tmp_path / folder).rglob("part-*.parquet")]
    validation = 2 * sum(shard.split == "validation" for shard in Cache.open(store).shards)
    assert len(list((tmp_path / "copies").glob("*.parquet"))) == len(shards) - validation
    own = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("part-*.parquet"))
    # Copies with room for the cache alone, but not for the audio too, are filled and emptied window by window.
    assert CacheReader(tmp_path / "cache", "train", local=tmp_path / "copies", local_gb=own / 1e9).needs_window


def test_utterances_may_be_in_other_shards_there(
    tmp_path: Path, make_cache: Make, store: Path, refer: Refer, source_utterances: list[Utterance]
) -> None:
    some = [utterance for n, utterance in enumerate(source_utterances) if n not in (1, 6)]
    plan = plan_shards(some, 3)
    spec = make_cache(tmp_path / "unused", codec="fp16").model_copy(update={"shard_seconds": 3.0})
    build_cache(tmp_path / "whole", spec, plan, TEACHER, teacher_name=TEACHER, workers=None)
    refer(tmp_path / "cache", store, some, codec="fp16", shard_seconds=3)
    for split in ("train", "validation"):
        assert_same_batches(CacheReader(tmp_path / "cache", split), CacheReader(tmp_path / "whole", split))
    other = [Utterance(u.id, u.path, u.num_samples, u.split, "0" * 64) for u in some]
    with pytest.raises(
        CacheError, match=r"can't refer to the audio at .*/audio, which has other audio for utterance \d"
    ):
        refer(tmp_path / "other", store, other)
    more = [*some, Utterance("new", some[0].path, some[0].num_samples, "train", some[0].sha256)]
    with pytest.raises(CacheError, match=r"/audio, which has no utterance new; set cache.audio_path to another place"):
        refer(tmp_path / "other", store, more)


def test_a_cache_with_audio_serves_as_a_store(tmp_path: Path, make_cache: Make, refer: Refer) -> None:
    make_cache(tmp_path / "whole", codec="fp16", audio="pcm")
    spec = refer(tmp_path / "cache", tmp_path / "whole", codec="fp16")
    assert_same_batches(CacheReader(tmp_path / "cache", "train"), CacheReader(tmp_path / "whole", "train"))
    with pytest.raises(CacheError, match=r"/cache refers to audio elsewhere itself; give the place of the audio store"):
        refer(tmp_path / "third", tmp_path / "cache")
    # Discrete targets beside the audio of the cache that they are derived from, and then beside what that one refers to.
    derive_cache(tmp_path / "whole", tmp_path / "units", "units:20", [2], audio=str(tmp_path / "whole"))
    derive_cache(tmp_path / "cache", tmp_path / "also", "units:20", [2])
    derive_cache(tmp_path / "whole", tmp_path / "copied", "units:20", [2])
    for name in ("units", "also"):
        derived = Cache.open(tmp_path / name)
        assert (derived.spec.audio_store, derived.record["audio_path"]) == (spec.audio_store, "../whole")
        assert_same_batches(CacheReader(tmp_path / name, "train"), CacheReader(tmp_path / "copied", "train"))


def test_a_moved_missing_or_other_store_is_refused_by_name(
    tmp_path: Path, store: Path, refer: Refer, make_cache: Make
) -> None:
    group = tmp_path / "group"
    group.mkdir()
    store = store.rename(group / "audio")
    refer(group / "cache", store, codec="fp16")
    moved = group.rename(tmp_path / "moved")
    assert len(CacheReader(moved / "cache", "train")[0].waveform) > 0, "both were moved together"
    elsewhere = (moved / "audio").rename(tmp_path / "elsewhere")
    lost = (
        rf"the cache at {moved}/cache refers to audio at {moved}/audio, but there is none; give its place as cache.aud"
    )
    with pytest.raises(CacheError, match=lost):
        CacheReader(moved / "cache", "train")
    assert [problem.kind for problem in verify_cache(moved / "cache")] == ["audio"]
    console = Console(width=400, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        console.print(info_table(moved / "cache"))
    assert "but there is none" in shown.get()
    reader = CacheReader(moved / "cache", "train", audio=str(elsewhere))
    assert torch.equal(pickle.loads(pickle.dumps(reader))[0].waveform, reader[0].waveform)
    assert verify_cache(moved / "cache", audio=str(elsewhere)) == []
    make_cache(tmp_path / "other", codec="fp16", audio="pcm")
    with pytest.raises(
        CacheError, match=r"fingerprint \w{12}\.\.\., but that at .*/other has \w{12}\.\.\.; give its place"
    ):
        CacheReader(moved / "cache", "train", audio=str(tmp_path / "other"))
    with pytest.raises(CacheError, match="/other has"):
        repair_cache(moved / "cache", audio=str(tmp_path / "other"))
    (done,) = repair_cache(moved / "cache", audio=str(elsewhere))
    assert done.endswith("/cache.json now names " + str(elsewhere) + " as the place of the audio")
    assert verify_cache(moved / "cache") == [] and CacheReader(moved / "cache", "train")[0].id
    for use in (repair_cache, verify_cache, partial(CacheReader, split="train")):
        with pytest.raises(
            CacheError, match="/other holds its audio itself, so the place .*/elsewhere of its audio does nothing"
        ):
            use(tmp_path / "other", audio=str(elsewhere))  # type: ignore[operator]


def test_a_place_that_is_not_beside_the_cache_is_not_opened_unasked(tmp_path: Path, store: Path, refer: Refer) -> None:
    refer(tmp_path / "cache", store, codec="fp16")
    for place in ("s3://somebody/audio", str(store), ""):
        move_audio(Cache.open(tmp_path / "cache"), place)
        with pytest.raises(CacheError, match="which is not opened unasked because a cache may come from a stranger"):
            CacheReader(tmp_path / "cache", "train")
        assert CacheReader(tmp_path / "cache", "train", audio=str(store))[0].id


def test_damage_of_either_is_found_and_repaired(tmp_path: Path, store: Path, refer: Refer) -> None:
    refer(tmp_path / "cache", store, codec="fp16")
    told = CliRunner().invoke(application, ["cache", "verify", str(tmp_path / "cache")]).output
    assert (
        f"cache is sound; of its audio only the sizes were checked, `ray-distill cache verify {store}` reads it" in told
    )
    with pytest.raises(CacheError, match="is an audio store, which has no features to derive targets from"):
        derive_cache(store, tmp_path / "units", "units:3", [1])
    files = [store / "audio" / "part-00001.parquet", tmp_path / "cache" / "clean" / "part-00000.parquet"]
    sound = [file.read_bytes() for file in files]
    for file, data in zip(files, sound, strict=True):
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (problem,) = verify_cache(tmp_path / "cache")
    assert problem.name == "clean/part-00000.parquet" and verify_cache(store)[0].name == "audio/part-00001.parquet"
    (problem,) = verify_audio(Cache.open(tmp_path / "cache"))
    assert problem.kind == "audio" and f"`ray-distill cache repair {store}` restores it" in problem.text
    files[0].write_bytes(sound[0][:-8])
    with pytest.raises(CacheError, match=f"audio/part-00001.parquet is missing or does not have .*repair {store}`"):
        CacheReader(tmp_path / "cache", "train")
    # The cache's own file comes back although a file of the audio, which is not needed for it, is damaged.
    with pytest.raises(CacheError, match=r"1 failure while repairing: .*part-00001.parquet has \d+ bytes"):
        repair_cache(tmp_path / "cache")
    assert files[1].read_bytes() == sound[1]
    assert [sentence.endswith("part-00001.parquet rebuilt") for sentence in repair_cache(store)] == [True]
    assert files[0].read_bytes() == sound[0]
    assert verify_cache(tmp_path / "cache") == verify_cache(store) == []


def test_audio_that_fails_is_left_out_everywhere(
    tmp_path: Path, make_cache: Make, refer: Refer, source_utterances: list[Utterance]
) -> None:
    broken = source_utterances[-2]
    Path(broken.path).write_bytes(b"no audio")
    spec = CacheSpec.of_audio("test", SHARD_SECONDS)
    plan = plan_audio(source_utterances, SHARD_SECONDS)
    with pytest.raises(CacheError, match="1 utterance failed while caching, but cache.max_failed=0 allows 0"):
        build_audio_store(tmp_path / "audio", spec, plan, workers=None, max_failed=0)
    build_audio_store(tmp_path / "audio", spec, plan, workers=None)
    refer(tmp_path / "cache", tmp_path / "audio", codec="fp16", masks=masks(1))
    make_cache(tmp_path / "whole", codec="fp16", masks=masks(1))
    assert list(failed_utterances(Cache.open(tmp_path / "audio"))) == [broken.id]
    reader = CacheReader(tmp_path / "cache", broken.split)
    assert_same_batches(reader, CacheReader(tmp_path / "whole", broken.split))
    assert broken.id not in reader.ids and len(reader.failed) == 1
    refer(tmp_path / "cache", None, codec="fp16", masks=masks(2))
    make_cache(tmp_path / "whole", codec="fp16", masks=masks(2))
    assert_same_batches(CacheReader(tmp_path / "cache", broken.split), CacheReader(tmp_path / "whole", broken.split))


def test_an_interrupted_store_goes_on_and_another_is_refused(
    tmp_path: Path, store: Path, source_utterances: list[Utterance]
) -> None:
    (store / "commits" / "audio" / "part-00001.json").unlink()
    plan = plan_audio(source_utterances, SHARD_SECONDS)
    spec = CacheSpec.of_audio("test", SHARD_SECONDS)
    report = build_audio_store(store, spec, plan, workers=None)
    assert (report.written, report.reused) == (1, len(Cache.open(store).shards) - 1)
    assert verify_cache(store) == []
    with pytest.raises(
        CacheError, match="holds something else than the audio of this corpus in such shards; set cache.au"
    ):
        build_audio_store(store, CacheSpec.of_audio("other", SHARD_SECONDS), plan, workers=None)
    assert Cache.open(store).record["spec"] == {
        "layers": [],
        "corpus": "test",
        "shard_seconds": SHARD_SECONDS,
        "audio": "flac",
        "schema_version": 2,
    }
