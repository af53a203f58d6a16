"""The plan of shards, a cache's identity and the checks that no other cache is used in its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec, LayerSet, Part, content_key, fingerprint
from ray_distill.teacher_cache.storage.create import create_cache
from ray_distill.teacher_cache.storage.json_record import decode_record, encode_record
from ray_distill.teacher_cache.storage.shard_plan import PLAN_SCHEMA, Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store


def utterances(count: int, split: str = "train", seconds: float = 2.0) -> list[Utterance]:
    return [Utterance(f"{split}-{i}", f"{i}.wav", int(16_000 * seconds) + i, split, "0") for i in range(count)]


def spec(**changes: object) -> CacheSpec:
    values = {
        "teacher": "t",
        "num_layers": 4,
        "dim": 8,
        "layers": (1, 2, 3, 4),
        "masks": MaskDraws(draws=2),
        "codec": "fp16",
        "corpus": "c",
        "shard_seconds": 10,
        "batch_seconds": 5,
    }
    stored = {"audio": "store"} if "audio_store" in changes else {}
    return CacheSpec.model_validate(values | stored | changes)


def create(location: Path, **changes: object) -> Cache:
    plan = plan_shards(utterances(5), 10)
    return create_cache(Store(location), spec(**changes), plan, teacher_name="a", teacher_spec="b", state={})


CHANGES: dict[str, Any] = {
    "derived_from": "a" * 64,
    "teacher": "u",
    "num_layers": 5,
    "dim": 9,
    "layers": (1, 2),
    "masks": MaskDraws(draws=1),
    "targets": "composite_only",
    "codec": "fp32",
    "corpus": "d",
    "shard_seconds": 11,
    "batch_seconds": 6,
    "precision": "bf16",
    "audio": "pcm",
    "audio_store": "b" * 64,
    "frame_rate": "75",
}


def test_plan_is_independent_of_order_and_complete() -> None:
    corpus = utterances(23) + utterances(4, "validation")
    plan = plan_shards(corpus, 10)
    assert plan.cast(PLAN_SCHEMA).equals(plan_shards(corpus[::-1], 10).cast(PLAN_SCHEMA))
    assert sorted(plan["id"].to_pylist()) == sorted(u.id for u in corpus)
    by_shard: dict[int, list[dict[str, Any]]] = {}
    for row in plan.to_pylist():
        by_shard.setdefault(row["shard"], []).append(row)
    assert sorted(by_shard) == list(range(len(by_shard)))
    for rows in by_shard.values():
        assert len({row["split"] for row in rows}) == 1
        assert sum(row["num_samples"] for row in rows) <= 10 * 16_000
        assert [row["row"] for row in rows] == list(range(len(rows)))
        assert [row["num_samples"] for row in rows] == sorted((row["num_samples"] for row in rows), reverse=True)


def test_an_utterance_longer_than_a_shard_gets_its_own() -> None:
    plan = plan_shards(utterances(3, seconds=30), 10)
    assert plan["shard"].to_pylist() == [0, 1, 2]


def test_the_fingerprint_depends_on_every_field() -> None:
    assert set(CHANGES) == set(CacheSpec.model_fields) - {"schema_version"}
    whole = (LayerSet(layers=(1, 2, 3, 4)),)
    found = {fingerprint(spec(**{key: value}), whole) for key, value in CHANGES.items()}
    found |= {fingerprint(spec(), whole), fingerprint(spec(), (LayerSet(layers=(1, 2, 3, 4), state="s"),))}
    assert len(found) == len(CHANGES) + 2
    assert fingerprint(spec(), whole) == fingerprint(spec(), whole)


def test_the_content_key_depends_on_what_determines_the_content_only() -> None:
    whole, clean, masked = LayerSet(layers=(1, 2, 3, 4)), Part("clean"), Part("masked", draw=0)

    def key(part: Part, **changes: object) -> str:
        return content_key(spec(**changes), whole, part, 0, "train")

    for name, value in CHANGES.items():
        same = name in ("layers", "masks")  # Only the file's own set of layers matters, and draws have separate files.
        assert (key(clean, **{name: value}) == key(clean)) == same, name
    other = MaskDraws(policy=MaskPolicy(mask_prob=0.3), draws=2)
    assert key(masked, masks=other) != key(masked)
    assert key(clean, masks=other) == key(clean)
    assert key(masked, masks=MaskDraws(draws=2, seed=1)) != key(masked)
    assert key(masked, masks=MaskDraws(draws=7)) == key(masked)


@pytest.mark.parametrize("name", sorted(set(CHANGES) - {"layers", "masks", "audio_store"}))
def test_using_a_cache_of_something_else_names_the_difference(tmp_path: Path, name: str) -> None:
    cache = create(tmp_path / "cache")
    with pytest.raises(
        CacheError,
        match=rf"cache \(\d+ utterances, [\d.]+ m?i?[sn] of audio\) was made for something else \({name}: .* -> .*\); set cache.path",
    ) as caught:
        cache.covers(spec(**{name: CHANGES[name]}))
    assert str(caught.value).count("->") == 1


def test_other_masks_are_an_error_but_more_or_fewer_draws_are_not(tmp_path: Path) -> None:
    cache = create(tmp_path / "cache")
    assert cache.covers(spec())
    assert cache.covers(spec(masks=MaskDraws(draws=1), layers=(2, 4)))
    assert cache.covers(spec(masks=MaskDraws(draws=0, seed=9)))
    assert not cache.covers(spec(masks=MaskDraws(draws=3)))
    with pytest.raises(CacheError, match=r"masks.policy_of_draw_1.mask_prob: 0.8 -> 0.5\)"):
        cache.covers(spec(masks=MaskDraws(draws=2, policies=(MaskPolicy(), MaskPolicy(mask_prob=0.5)))))
    with pytest.raises(CacheError, match=r"masks.seed: 0 -> 1\)"):
        cache.covers(spec(masks=MaskDraws(draws=1, seed=1)))


@pytest.mark.parametrize(("has", "needed"), [(2, 0), (0, 1)])
def test_composite_caches_with_and_without_draws_do_not_serve_each_other(tmp_path: Path, has: int, needed: int) -> None:
    cache = create(tmp_path / "cache", targets="composite_only", masks=MaskDraws(draws=has))
    assert cache.covers(spec(targets="composite_only", masks=MaskDraws(draws=has)))
    with pytest.raises(CacheError, match=rf"\(masks.draws: {has} -> {needed}\)"):
        cache.covers(spec(targets="composite_only", masks=MaskDraws(draws=needed)))


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match=r"holds files \(such as thesis.tex\) but no cache.json"):
        create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(CacheError, match="there is no teacher cache at"):
        Cache.open(tmp_path)


def test_an_altered_identity_is_noticed(tmp_path: Path) -> None:
    create(tmp_path)
    path = tmp_path / "cache.json"
    sound = path.read_text()
    for altered in (sound.replace('"fp16"', '"fp32"'), sound + " ", sound[:-2], "{", "[]", '{"seal": 3}'):
        path.write_text(altered)
        with pytest.raises(
            CacheError, match=rf"cache.json is damaged .*; `ray-distill cache repair {tmp_path}` restores it"
        ):
            Cache.open(tmp_path)
    record = decode_record(sound.encode())
    record["spec"]["schema_version"] = 99
    path.write_bytes(encode_record(record))
    with pytest.raises(CacheError, match="has schema version 99, but this program reads version 2"):
        Cache.open(tmp_path)


def test_records_are_plain_json() -> None:
    data = encode_record({"b": 1, "a": [2]})
    assert list(json.loads(data)) == ["a", "b", "seal"]
    assert decode_record(data) == {"a": [2], "b": 1}


def test_files_are_written_atomically(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(OSError, match="disk"), store.create("clean/part-00000.parquet") as path:
        path.write_bytes(b"half")
        raise OSError("disk full")
    assert list((tmp_path / "clean").iterdir()) == []
    with store.create("clean/part-00000.parquet") as path:
        path.write_bytes(b"whole")
        assert store.size("clean/part-00000.parquet") is None
    assert store.read("clean/part-00000.parquet") == b"whole"
    (tmp_path / "clean" / ".part-00001.parquet.abc.tmp").write_bytes(b"left by a killed writer")
    assert store.names() == ["clean/part-00000.parquet"]
    store.remove_leftovers()
    assert [path.name for path in (tmp_path / "clean").iterdir()] == ["part-00000.parquet"]
