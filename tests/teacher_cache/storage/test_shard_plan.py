"""Plans made with arrays: the same as those of the earlier, simple algorithm, and without objects for each utterance."""

import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_distill.pipeline.corpus.index_files import fingerprint_of, read_utterances, write_utterances
from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.storage import shard_assignment
from ray_distill.teacher_cache.storage.create import create_cache
from ray_distill.teacher_cache.storage.shard_plan import (
    PLAN_SCHEMA,
    Shards,
    Utterance,
    Utterances,
    default_shard_seconds,
    plan_shards,
    with_sources,
)
from ray_distill.teacher_cache.storage.store import Store

from .test_cache import spec


def made_up(seed: int) -> list[Utterance]:
    rng = np.random.default_rng(seed)
    beginnings = ["é", "", "\U0001f600"]
    lengths = (0, 1, 16_000 * 10, *rng.integers(1, 16_000 * 30, 3).tolist())
    count = int(rng.choice([0, 1, 2, 60, 200]))
    return [
        Utterance(
            f"{rng.choice(beginnings)}{rng.integers(10**6)}-{n}",
            f"/audio/{n}.flac",
            int(rng.choice(lengths)),
            str(rng.choice(["train", "validation"])),
            str(n),
        )
        for n in range(count)
    ]


def simple_plan(utterances: list[Utterance], shard_seconds: float) -> pa.Table:
    """Plan with an object for each utterance, as earlier versions did."""
    rows: list[tuple[Utterance, int, int]] = []
    shard = 0
    for split in sorted({utterance.split for utterance in utterances}):
        members = [utterance for utterance in utterances if utterance.split == split]
        members.sort(key=lambda utterance: hashlib.sha256(utterance.id.encode()).digest())
        groups: list[list[Utterance]] = [[]]
        for utterance in members:
            samples = sum(u.num_samples for u in groups[-1]) + utterance.num_samples
            if groups[-1] and samples > shard_seconds * 16_000:
                groups.append([])
            groups[-1].append(utterance)
        for group in groups:
            group.sort(key=lambda utterance: (-utterance.num_samples, utterance.id))
            rows += [(utterance, shard, row) for row, utterance in enumerate(group)]
            shard += 1
    return pa.Table.from_pylist(
        [vars(u) | {"num_frames": num_frames(u.num_samples), "shard": shard, "row": row} for u, shard, row in rows],
        PLAN_SCHEMA,
    )


@pytest.mark.parametrize("shard_seconds", [0.001, 10, 45.5, float("inf")])
def test_the_plan_is_that_of_the_simple_algorithm(shard_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        monkeypatch.setattr(shard_assignment, "_SORTED", 7 if seed % 2 else 1 << 17)
        utterances = made_up(seed)
        expected = simple_plan(utterances, shard_seconds)
        plan = plan_shards(utterances, shard_seconds)
        assert plan.cast(PLAN_SCHEMA).equals(expected), seed
        shards = Shards(plan)
        assert [u for shard in shards for u in shard.utterances] == [
            Utterance(row["id"], row["path"], row["num_samples"], row["split"], row["sha256"])
            for row in expected.to_pylist()
        ]
        assert [frames for shard in shards for frames in shard.num_frames] == expected["num_frames"].to_pylist()
        assert [shard.number for shard in shards] == np.unique(expected["shard"]).tolist()


def test_the_plan_on_disk_has_the_bytes_of_earlier_versions(tmp_path: Path) -> None:
    utterances = made_up(3)
    create_cache(Store(tmp_path / "c"), spec(), plan_shards(utterances, 10), teacher_name="", teacher_spec="", state={})
    pq.write_table(simple_plan(utterances, 10), tmp_path / "plan.parquet", compression="zstd")
    for name in ("plan.parquet", "copies/plan.parquet"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "plan.parquet").read_bytes()


def test_hashes_with_equal_beginnings_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = pa.array([f"u{n}" for n in range(50)] + ["u7"], pa.large_string())
    expected = sorted(range(51), key=lambda n: hashlib.sha256(texts[n].as_py().encode()).digest())
    assert shard_assignment.hash_order(texts).tolist() == expected
    monkeypatch.setattr(np, "frombuffer", lambda data, _: np.zeros(len(data) // 8, np.uint64))
    assert shard_assignment.hash_order(texts).tolist() == expected


def test_paths_of_another_index_by_id() -> None:
    utterances = [u for u in made_up(3) if u.num_samples]
    plan = plan_shards(utterances, 10)
    moved = [replace(u, path=f"/moved{u.path}", sha256="x") for u in utterances]
    everything = with_sources(plan, plan_shards(moved, 10))
    assert everything.cast(PLAN_SCHEMA).equals(plan_shards(moved, 10).cast(PLAN_SCHEMA))
    some = with_sources(plan.cast(PLAN_SCHEMA), plan_shards([*moved[::3], replace(moved[0], id="other")], 10))
    expected = {u.id: u for u in [*utterances, *moved[::3]]}
    assert [u for shard in Shards(some) for u in shard.utterances] == [
        expected[name] for name in plan["id"].to_pylist()
    ]
    assert with_sources(plan, plan_shards([], 10)).cast(PLAN_SCHEMA).equals(plan.cast(PLAN_SCHEMA))


def test_large_corpora_have_larger_shards() -> None:
    minutes = [default_shard_seconds(3600 * hours) / 60 for hours in (0, 1, 960, 1000, 2000, 6000, 60_000, 1_000_000)]
    assert minutes == [10, 10, 10, 10, 20, 60, 60, 60]


def test_utterances_are_a_sequence() -> None:
    members = made_up(3)
    table = Utterances.of(members)
    assert list(table) == members and table == members and table != members[:-1] and len(table) == len(members)
    assert (table[0], table[-1], list(table[2:5]), list(table[::7])) == (
        members[0],
        members[-1],
        members[2:5],
        members[::7],
    )
    assert list(table.of_split("train")) == [u for u in members if u.split == "train"]
    with pytest.raises(IndexError):
        _ = table[len(members)]
    assert list(Utterances.of([])) == [] and Utterances.of([]).splits[0] == []


def measured(folder: Path, count: int) -> tuple[int, int]:
    """Return the peaks of Python's and NumPy's memory and of Arrow's, from reading an index to finding what is missing."""
    numbers = np.arange(count)
    ids = [f"{n:09d}" for n in numbers]
    columns = {"id": ids, "path": [f"/corpus/{id}.flac" for id in ids], "num_samples": numbers % 320_000 + 400}
    columns |= {"split": ["train"] * count, "sha256": [hashlib.sha256(id.encode()).hexdigest() for id in ids]}
    write_utterances(folder / f"{count}.parquet", Utterances(pa.table(columns)), {})
    del ids, columns
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        utterances, _ = read_utterances(folder / f"{count}.parquet")
        fingerprint_of(utterances)
        plan = plan_shards(utterances, 600)
        arrow = pa.total_allocated_bytes() - before
        cache = create_cache(Store(folder / str(count)), spec(), plan, teacher_name="", teacher_spec="", state={})
        assert len(cache.missing()) == len(cache.shards)
        return tracemalloc.get_traced_memory()[1], arrow
    finally:
        tracemalloc.stop()


def test_memory_grows_by_few_bytes_per_utterance(tmp_path: Path) -> None:
    few, many = 10_000, 30_000
    (python, arrow), (more_python, more_arrow) = measured(tmp_path, few), measured(tmp_path, many)
    # An Utterance has about 550 bytes. What is left of them is the order, the hashes and the lengths.
    assert (more_python - python) / (many - few) < 40
    # Texts of 100 bytes and five columns of 4 or 8 bytes for the index. The columns of the plan are NumPy's.
    assert (more_arrow - arrow) / (many - few) < 150
