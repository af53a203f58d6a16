import json
from pathlib import Path

import pytest

from teacher_cache.layout import (
    CacheError,
    CacheSpec,
    MaskDraws,
    SourceUtterance,
    open_or_create,
    plan_shards,
    read_spec,
    remove_leftovers,
    written_whole,
)


def utterances(count: int, split: str = "train", seconds: float = 2.0) -> list[SourceUtterance]:
    return [SourceUtterance(f"{split}-{i}", f"{i}.wav", int(16_000 * seconds) + i, split, "0") for i in range(count)]


def spec(**changes: object) -> CacheSpec:
    values = {
        "teacher": "t",
        "num_layers": 4,
        "dim": 8,
        "layers": (1, 2, 3, 4),
        "masks": MaskDraws(),
        "codec": "fp16",
        "corpus": "c",
        "shard_seconds": 10,
        "batch_seconds": 5,
    }
    return CacheSpec.model_validate(values | changes)


def test_plan_is_independent_of_order_and_complete() -> None:
    corpus = utterances(23) + utterances(4, "validation")
    plan = plan_shards(corpus, 10)
    assert plan.equals(plan_shards(corpus[::-1], 10))
    assert sorted(plan["id"].to_pylist()) == sorted(u.id for u in corpus)
    by_shard: dict[int, list[dict]] = {}
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


def test_fingerprint_depends_on_every_field() -> None:
    base = spec()
    changes = {
        "teacher": "u",
        "num_layers": 5,
        "dim": 9,
        "layers": (1, 2),
        "masks": MaskDraws(draws=2),
        "codec": "fp32",
        "corpus": "d",
        "shard_seconds": 11,
        "batch_seconds": 6,
    }
    fingerprints = {spec(**{key: value}).fingerprint for key, value in changes.items()}
    assert len(fingerprints | {base.fingerprint}) == len(changes) + 1
    assert spec().fingerprint == base.fingerprint


def test_a_cache_of_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    plan = plan_shards(utterances(5), 10)
    open_or_create(tmp_path / "cache", spec(), plan, "teacher")
    open_or_create(tmp_path / "cache", spec(), plan, "teacher")
    with pytest.raises(CacheError, match=r"codec: 'fp16' -> 'fp32'") as caught:
        open_or_create(tmp_path / "cache", spec(codec="fp32"), plan, "teacher")
    assert "corpus" not in str(caught.value)
    with pytest.raises(CacheError, match=r"masks\.draws: 1 -> 3"):
        open_or_create(tmp_path / "cache", spec(masks=MaskDraws(draws=3)), plan, "teacher")


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match="no cache.json"):
        open_or_create(tmp_path, spec(), plan_shards(utterances(1), 10), "teacher")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_altered_identity_is_noticed(tmp_path: Path) -> None:
    open_or_create(tmp_path, spec(), plan_shards(utterances(2), 10), "teacher")
    path = tmp_path / "cache.json"
    path.write_text(path.read_text().replace('"fp16"', '"fp32"'))
    with pytest.raises(CacheError, match="altered"):
        read_spec(tmp_path)
    path.write_text("{")
    with pytest.raises(CacheError, match="damaged"):
        read_spec(tmp_path)
    record = {"spec": {"schema_version": 99}}
    path.write_text(json.dumps(record))
    with pytest.raises(CacheError, match="schema version 99"):
        read_spec(tmp_path)


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "clean" / "part-00000.parquet"
    with pytest.raises(OSError, match="disk"), written_whole(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk full")
    assert list(path.parent.iterdir()) == []
    with written_whole(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    (path.parent / ".part-00001.parquet.abc.tmp").write_bytes(b"left by a killed writer")
    remove_leftovers(tmp_path)
    assert list(path.parent.iterdir()) == [path]
