"""Opening the caches of several teachers: the memory for each utterance, and what they share."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.cache.opening import make, synthetic_plan
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.shard_plan import Utterances, different_audio
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.several_caches import SeveralCaches


def opened(folder: Path, count: int) -> tuple[int, int]:
    """Return the memory of Python and NumPy, and that of Arrow, of the caches of two teachers with this many utterances."""
    make(folder, count, files=True)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        caches = SeveralCaches({name: CacheReader(folder, "train") for name in "ab"})
        assert (
            len(caches) == count and caches.ids[count // 2] == Cache.open(Store(folder)).plan["id"][count // 2].as_py()
        )
        return tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()


def test_memory_grows_by_few_bytes_per_utterance(tmp_path: Path) -> None:
    few, many = 10_000, 30_000
    (python, arrow), (more_python, more_arrow) = (opened(tmp_path / str(count), count) for count in (few, many))
    # Numbers of samples and of frames, shards and rows: 24 bytes of the plan, and 40 of the readers.
    assert (more_python - python) / (many - few) < 80
    assert (more_arrow - arrow) / (many - few) < 60  # The ids, once.


def test_readers_of_one_plan_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 2_000, files=True)
    reader = CacheReader(tmp_path, "train")
    monkeypatch.setattr(Cache, "plan_columns", None)
    assert CacheReader(tmp_path, "train").planned_ids is reader.planned_ids
    del reader
    with pytest.raises(TypeError):
        CacheReader(tmp_path, "train")


def test_different_audio() -> None:
    plan = synthetic_plan(200_000)
    assert plan.num_rows > 1 << 16
    assert different_audio(plan, plan) is None
    assert different_audio(plan, plan.slice(500, 1000)) is None
    number = 150_000
    for mine, theirs, differs in (
        ("", "a", True),
        ("44100:", "44100:a", True),
        ("44100:", "a", False),  # The hash of an earlier version.
    ):
        hashes = plan["sha256"].to_pylist()
        hashes[number] = mine + hashes[number]
        other = list(hashes)
        other[number] = theirs + plan["sha256"][number].as_py()
        column = plan.schema.get_field_index("sha256")
        pair = [plan.set_column(column, "sha256", pa.array(values)) for values in (hashes, other)]
        found = different_audio(pair[0], pair[1].slice(100_000))
        assert found == (Utterances(plan)[number].id if differs else None)
