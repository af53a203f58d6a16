"""Utterances that fail while a cache is built: left out, recorded with the reason, counted, and limited."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.failed_utterances import allowed_failures, failed_utterances, reason_of
from ray_distill.teacher_cache.storage.json_record import decode_record, encode_record
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.teachers import Teacher

from ...tiny import TEACHER

Make = Callable[..., CacheSpec]
Spoil = Callable[..., None]


def draws(count: int) -> MaskDraws:
    return MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=count, seed=3)


@pytest.fixture
def build(cache_spec: Make, source_utterances: list[Utterance]) -> Callable[..., Cache]:
    """Build a cache of the test speech, in this process. ``changes`` are fields of its specification."""

    def run(location: Path, max_failed: float = 3, **changes: Any) -> Cache:
        spec = cache_spec(**changes)
        plan = plan_shards(source_utterances, spec.shard_seconds)
        build_cache(location, spec, plan, TEACHER, teacher_name=TEACHER, workers=None, max_failed=max_failed)
        return Cache.open(location)

    return run


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Make a layer of the teacher NaN for an utterance, in the clean or in the masked pass."""
    compute = Teacher.hidden_states

    def spoilt(utterance: Utterance, layer: int, masked: bool = False) -> None:
        before = Teacher.hidden_states

        def hidden_states(
            self: Teacher,
            waveforms: torch.Tensor,
            lengths: torch.Tensor,
            frame_mask: torch.Tensor | None = None,
            layers: Sequence[int] | None = None,
            **options: Any,
        ) -> torch.Tensor:
            states = before(self, waveforms, lengths, frame_mask, layers, **options)
            if masked == (frame_mask is not None) and layer in (layers or ()):
                states[lengths == utterance.num_samples, list(layers or ()).index(layer)] = torch.nan
            return states

        monkeypatch.setattr(Teacher, "hidden_states", hidden_states)

    assert compute is Teacher.hidden_states
    return spoilt


def train(utterances: list[Utterance]) -> list[Utterance]:
    return [utterance for utterance in utterances if utterance.split == "train"]


def contents(root: Path) -> dict[str, bytes]:
    files = [path for folder in ("clean", "masked", "commits") for path in (root / folder).rglob("*.*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.parametrize("codec", ["fp32", "pca", "int8"])
def test_a_hidden_state_that_is_not_finite_fails_its_utterance(
    tmp_path: Path, build: Callable[..., Cache], spoil: Spoil, source_utterances: list[Utterance], codec: str
) -> None:
    sound = CacheReader(build(tmp_path / "sound", codec=codec).store, "train")
    victim = train(source_utterances)[2]
    spoil(victim, layer=2)
    cache = build(tmp_path / "cache", codec=codec)
    reason = "a hidden state of layer 2 is not finite"
    assert list(failed_utterances(cache)) == [victim.id]
    assert failed_utterances(cache)[victim.id].startswith(reason)
    assert verify_cache(tmp_path / "cache") == []
    reader = CacheReader(tmp_path / "cache", "train")
    assert reader.failed.keys() == {victim.id}
    assert len(reader) == len(reader.num_samples) == len(reader.num_frames) == len(train(source_utterances)) - 1
    assert reader.ids == [name for name in sound.ids if name != victim.id]
    # Each place of the reader has its own row, in both passes.
    for index, item in enumerate(reader):
        expected = sound[sound.ids.index(item.id)]
        assert item.id == reader.ids[index] and torch.equal(item.waveform, expected.waveform)
        if codec == "fp32":
            assert torch.equal(item.targets, expected.targets)
    assert len(CacheReader(tmp_path / "cache", "validation")) == len(source_utterances) - len(train(source_utterances))


def test_audio_that_cannot_be_decoded_fails_its_utterance(
    tmp_path: Path, build: Callable[..., Cache], source_utterances: list[Utterance]
) -> None:
    missing, changed, damaged = train(source_utterances)[:3]
    Path(missing.path).unlink()
    Path(changed.path).write_bytes(Path(source_utterances[-1].path).read_bytes())
    Path(damaged.path).write_bytes(b"fLaC but no more")
    cache = build(tmp_path / "cache", codec="int8")
    reasons = failed_utterances(cache)
    assert reasons.keys() == {missing.id, changed.id, damaged.id}
    assert "No such file" in reasons[missing.id] and "can't be decoded as audio" in reasons[damaged.id]
    assert "has changed since the corpus was indexed" in reasons[changed.id]
    assert not reasons.keys() & set(CacheReader(tmp_path / "cache", "train").ids)
    with pytest.raises(CacheError, match=r"cache.max_failed=2 allows 2 of 12") as caught:
        build(tmp_path / "other", max_failed=2)
    assert f"{missing.path}" in str(caught.value) and "\n" not in str(caught.value)


def test_too_many_failures_stop_the_build_and_are_computed_again(
    tmp_path: Path, build: Callable[..., Cache], source_utterances: list[Utterance]
) -> None:
    victims = {utterance.path: Path(utterance.path).read_bytes() for utterance in source_utterances[:4]}
    for path in victims:
        Path(path).unlink()
    with pytest.raises(
        CacheError, match=r"^4 utterances failed while caching, but cache.max_failed=3 allows 3 of 12 \("
    ) as caught:
        build(tmp_path / "cache")
    assert "; and 1 more); repair these files" in str(caught.value)
    assert failed_utterances(Cache.open(tmp_path / "cache")) == {}, "no failure is recorded for good"
    for path, data in victims.items():
        Path(path).write_bytes(data)
    build(tmp_path / "cache")
    build(tmp_path / "sound")
    assert contents(tmp_path / "cache") == contents(tmp_path / "sound")


def test_a_failed_utterance_survives_growth_and_repair(
    tmp_path: Path, build: Callable[..., Cache], spoil: Spoil, source_utterances: list[Utterance]
) -> None:
    in_clean, in_draw = train(source_utterances)[1:3]
    spoil(in_clean, layer=1)
    build(tmp_path / "cache", masks=draws(1), layers=(1,))
    Path(in_clean.path).unlink()  # Further files take the audio from the cache.
    spoil(in_draw, layer=2, masked=True)
    cache = build(tmp_path / "cache", masks=draws(2), layers=(1, 2))
    assert failed_utterances(cache).keys() == {in_clean.id, in_draw.id}
    both = CacheReader(tmp_path / "cache", "train")
    assert {in_clean.id, in_draw.id}.isdisjoint(both.ids)
    (lower,) = {in_draw.id} & set(CacheReader(tmp_path / "cache", "train", layers=(1,)).ids)
    assert lower == in_draw.id, "the file of layer 1 has the utterance that fails in layer 2"
    assert in_draw.id in CacheReader(tmp_path / "cache", "train", targets="clean_only").ids
    assert both.read(range(len(both)), 1).targets.isfinite().all()

    sound = contents(tmp_path / "cache")
    for name in sound:
        if name.startswith("masked/draw=1"):
            (tmp_path / "cache" / name).unlink()
    repair_cache(tmp_path / "cache")
    assert contents(tmp_path / "cache") == sound
    assert verify_cache(tmp_path / "cache") == []


def test_repair_does_not_leave_out_further_utterances(
    tmp_path: Path, build: Callable[..., Cache], source_utterances: list[Utterance]
) -> None:
    known, lost = train(source_utterances)[:2]
    data = Path(known.path).read_bytes()
    Path(known.path).unlink()
    cache = build(tmp_path / "cache")
    recorded = failed_utterances(cache)
    place = next(shard.number for shard in cache.shards if known.id in [u.id for u in shard.utterances])
    shard = tmp_path / f"cache/clean/part-{place:05d}.parquet"
    sound = shard.read_bytes()
    shard.unlink()
    repair_cache(tmp_path / "cache")
    assert shard.read_bytes() == sound and failed_utterances(cache) == recorded
    Path(known.path).write_bytes(data)
    for other in cache.shards:
        (tmp_path / f"cache/clean/part-{other.number:05d}.parquet").unlink(missing_ok=True)
    Path(lost.path).unlink()
    with pytest.raises(CacheError, match=rf"1 failure while caching: {lost.path} can't be decoded"):
        repair_cache(tmp_path / "cache")


def test_a_shard_and_a_split_may_fail_as_a_whole(
    tmp_path: Path, build: Callable[..., Cache], source_utterances: list[Utterance]
) -> None:
    for utterance in source_utterances:
        if utterance.split == "validation":
            Path(utterance.path).unlink()
    build(tmp_path / "cache")
    assert verify_cache(tmp_path / "cache") == []
    with pytest.raises(CacheError, match="all utterances of split 'validation' failed when the cache at .* was built"):
        CacheReader(tmp_path / "cache", "validation")
    build(tmp_path / "cache", masks=draws(3))  # The audio of the empty shard comes from the cache.


def test_records_that_do_not_fit_the_plan_are_damage(tmp_path: Path, build: Callable[..., Cache]) -> None:
    cache = build(tmp_path / "cache")
    commit = tmp_path / "cache" / cache.files(cache.shards[0])[0].commit
    record = decode_record(commit.read_bytes())
    for failed, message in (
        ({"nobody": "why"}, "it names failed utterances that are not in its shard"),
        ({cache.shards[0].utterances[0].id: "why"}, "rows and 1 failed utterances of"),
    ):
        commit.write_bytes(encode_record(record | {"failed": failed}))
        assert [message in problem.text for problem in verify_cache(tmp_path / "cache")] == [True]
        with pytest.raises(CacheError, match=message):
            CacheReader(tmp_path / "cache", cache.shards[0].split)
    commit.write_bytes(encode_record(record | {"failed": ["a list"]}))
    with pytest.raises(CacheError, match="failed is not a table of texts"):
        failed_utterances(cache)
    commit.write_bytes(encode_record(record | {"failed": {cache.shards[0].utterances[0].id: "\x1b[2J"}}))
    with pytest.raises(CacheError, match="of some that can't be printed"):
        failed_utterances(cache)


def test_a_foreign_shard_of_equal_size_is_noticed_without_checksums(
    tmp_path: Path, build: Callable[..., Cache]
) -> None:
    """The footer names the content. Shards of earlier versions, without it, stay readable."""
    cache = build(tmp_path / "cache")
    file = cache.files(cache.shards[0])[0]
    path = tmp_path / "cache" / file.name
    build(tmp_path / "other", masks=MaskDraws(draws=1), precision="bf16")
    foreign = (tmp_path / "other" / file.name).read_bytes()
    commit = tmp_path / "cache" / file.commit
    record = decode_record(commit.read_bytes())
    split = cache.shards[0].split
    path.write_bytes(foreign)
    commit.write_bytes(encode_record(record | {"bytes": len(foreign)}))
    with pytest.raises(CacheError, match=f"{file.name} is damaged .it belongs to another file or cache"):
        CacheReader(tmp_path / "cache", split).read([0], None)
    table = pq.read_table(path).replace_schema_metadata({})
    pq.write_table(table, path, row_group_size=1, use_dictionary=False)
    commit.write_bytes(encode_record(record | {"bytes": path.stat().st_size}))
    assert len(CacheReader(tmp_path / "cache", split).read([0], None).ids) == 1


def test_a_reason_is_one_printable_line() -> None:
    assert reason_of(ValueError("a\nb\x1b[2J\udc80.wav")) == "a b?[2J?.wav"
    assert len(reason_of(ValueError("x" * 5000))) == 1000


def test_allowed_failures() -> None:
    assert [allowed_failures(share, 12_000) for share in (0, 0.001, 0.0001, 1, 7)] == [0, 12, 3, 1, 7]
