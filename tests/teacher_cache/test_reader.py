"""A cache written without Ray, read back, held against the teacher itself."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from teacher_cache.build import ShardWriter
from teacher_cache.layout import CacheError, CacheSpec, Layout, MaskDraws, SourceUtterance, open_or_create, plan_shards
from teacher_cache.masks import MaskPolicy, draw_mask
from teacher_cache.reader import CacheReader, OnlineReader
from teacher_cache.teachers import load_teacher
from teacher_cache.verify import verify_cache

TEACHER = "random:2x32"
MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=2, seed=3)


def build(root: Path, utterances: list[SourceUtterance], codec: str = "fp32", layers: tuple[int, ...] = (1, 2)) -> None:
    teacher = load_teacher(TEACHER)
    spec = CacheSpec(
        teacher=teacher.fingerprint,
        num_layers=teacher.num_layers,
        dim=teacher.dim,
        layers=layers,
        masks=MASKS,
        codec=codec,
        corpus="test",
        shard_seconds=5,
        batch_seconds=6,
    )
    plan = plan_shards(utterances, spec.shard_seconds)
    open_or_create(root, spec, plan, teacher.name)
    writer = ShardWriter(str(root), TEACHER, "cpu")
    records = [writer.write(shard) for shard in sorted(set(plan["shard"].to_pylist()))]
    assert all(record["failures"] == "" for record in records)


@pytest.fixture
def cache(tmp_path: Path, source_utterances: list[SourceUtterance]) -> Path:
    build(tmp_path / "cache", source_utterances)
    return tmp_path / "cache"


def test_cached_equals_online(cache: Path, source_utterances: list[SourceUtterance]) -> None:
    cached = CacheReader(cache, "train")
    by_id = {u.id: u for u in source_utterances}
    online = OnlineReader([by_id[i] for i in cached.ids], load_teacher(TEACHER), MASKS)
    assert np.array_equal(cached.num_samples, online.num_samples)
    for draw in (None, 0, 1):
        ours, theirs = cached.read([3, 0, 5], draw), online.read([3, 0, 5], draw)
        assert ours.ids == theirs.ids
        assert torch.equal(ours.waveforms, theirs.waveforms)
        assert torch.equal(ours.num_frames, theirs.num_frames)
        assert (ours.frame_mask is None) == (draw is None)
        if draw is not None:
            assert torch.equal(ours.frame_mask, theirs.frame_mask)
        torch.testing.assert_close(ours.targets, theirs.targets, rtol=1e-4, atol=1e-5)


def test_targets_are_the_composite(cache: Path) -> None:
    reader = CacheReader(cache, "train")
    clean, composite = reader.read([1], None), reader.read([1], 0)
    mask = composite.frame_mask[0]
    assert mask.any()
    assert not mask.all()
    assert torch.equal(composite.targets[0, :, mask], clean.targets[0, :, mask])
    assert not torch.allclose(composite.targets[0, :, ~mask], clean.targets[0, :, ~mask])
    expected = draw_mask(MASKS.policy, MASKS.seed, 0, composite.ids[0], len(mask))
    assert mask.tolist() == expected.tolist()


def test_layers_can_be_chosen(cache: Path) -> None:
    both, second = CacheReader(cache, "train").read([0], 1), CacheReader(cache, "train", [2]).read([0], 1)
    assert torch.equal(second.targets[:, 0], both.targets[:, 1])
    with pytest.raises(CacheError, match=r"no layer 5; it has layers \[1, 2\]"):
        CacheReader(cache, "train", [5])


def test_masked_shards_hold_unmasked_frames_only(cache: Path) -> None:
    row = pq.read_table(Layout(cache).masked(0, 0)).to_pylist()[0]
    assert len(row["layer_01"]) == 4 * 32 * (len(row["mask"]) - sum(row["mask"]))
    assert pq.ParquetFile(Layout(cache).clean(0)).metadata.row_group(0).num_rows == 1


def test_fp16_is_close(tmp_path: Path, source_utterances: list[SourceUtterance], cache: Path) -> None:
    build(tmp_path / "half", source_utterances, codec="fp16")
    half, full = CacheReader(tmp_path / "half", "train").read([2], 0), CacheReader(cache, "train").read([2], 0)
    torch.testing.assert_close(half.targets, full.targets, rtol=2**-11, atol=1e-6)


def test_what_is_not_there_is_said(cache: Path) -> None:
    with pytest.raises(CacheError, match="no split 'test'; it has"):
        CacheReader(cache, "test")
    with pytest.raises(CacheError, match="mask draw 2 is not in the cache; it has draws 0 to 1"):
        CacheReader(cache, "train").read([0], 2)
    with pytest.raises(CacheError, match="no teacher cache"):
        CacheReader(cache / "elsewhere", "train")


def test_verification_names_the_damage(cache: Path) -> None:
    assert verify_cache(cache) == []
    path = Layout(cache).clean(0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert verify_cache(cache) == [f"{path} is not as committed (size or SHA-256 differ)"]
    path.write_bytes(data[:-1])
    with pytest.raises(CacheError, match="missing or not as committed"):
        CacheReader(cache, "train")
    path.unlink()
    assert verify_cache(cache) == [f"{path} is missing"]
    Layout(cache).commit(0).unlink()
    assert "shard 0 is not finished" in verify_cache(cache)
    with pytest.raises(CacheError, match="not finished"):
        CacheReader(cache, "train")


def test_a_file_that_changed_since_the_index_is_reported_and_not_cached(
    tmp_path: Path, source_utterances: list[SourceUtterance]
) -> None:
    build(tmp_path / "cache", source_utterances)
    layout = Layout(tmp_path / "cache")
    commit, path = layout.commit(0), Path(pq.read_table(layout.plan)["path"][0].as_py())
    commit.unlink()
    path.write_bytes(b"no longer audio")
    record = ShardWriter(str(tmp_path / "cache"), TEACHER, "cpu").write(0)
    assert path.name in record["failures"]
    assert not commit.exists()
