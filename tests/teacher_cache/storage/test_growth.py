"""Adding draws and layers to a cache: existing files keep their bytes and their times."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache, verify_deep
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.teachers import load_teacher

TEACHER = "random:3x32"
POLICY = MaskPolicy(mask_prob=0.5, mask_length=4)
Make = Callable[..., CacheSpec]


def masks(draws: int, **changes: object) -> MaskDraws:
    return MaskDraws.model_validate({"policy": POLICY, "draws": draws, "seed": 3} | changes)


def files(root: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and modification times of all files but ``cache.json``, the manifest, the lock and build statistics."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and path.name not in ("cache.json", MANIFEST, ".building.lock") and path.parent.name != BUILDS
    }


def assert_kept(before: dict[str, tuple[bytes, int]], after: dict[str, tuple[bytes, int]]) -> set[str]:
    """Check that all earlier files are unchanged, and return the names of new files."""
    assert {name: after.get(name) for name in before} == before
    return set(after) - set(before)


def everything(root: Path, layers: list[int] | None = None) -> list[torch.Tensor]:
    reader = CacheReader(root, "train", layers)
    return [
        reader.read([i], draw).targets for i in range(len(reader.ids)) for draw in (None, *range(reader.draws or 0))
    ]


def test_draws(tmp_path: Path, make_cache: Make, cache_spec: Make) -> None:
    root = tmp_path / "cache"
    first = make_cache(root, TEACHER, masks=masks(1), codec="pca:0.2")
    spec = cache_spec(TEACHER, masks=masks(3), codec="pca:0.2")
    one = files(root)
    assert Cache.open(root).covers(first)
    assert not Cache.open(root).covers(spec)
    with pytest.raises(CacheError, match="mask draw 1 is not in the cache at .*; it has draws 0 to 0"):
        CacheReader(root, "train").read([0], 1)
    make_cache(root, TEACHER, masks=masks(3), codec="pca:0.2")
    assert Cache.open(root).covers(first)
    assert Cache.open(root).covers(spec)
    new = assert_kept(one, files(root))
    assert all("/draw=1/" in name or "/draw=2/" in name for name in new)
    assert verify_cache(root) == []
    make_cache(tmp_path / "at once", TEACHER, masks=masks(3), codec="pca:0.2")
    assert {name: data for name, (data, _) in files(root).items()} == {
        name: data for name, (data, _) in files(tmp_path / "at once").items()
    }
    assert Cache.open(root).fingerprint == Cache.open(tmp_path / "at once").fingerprint
    three = files(root)
    make_cache(root, TEACHER, masks=masks(2), codec="pca:0.2")  # A cache with more draws serves fewer.
    assert files(root) == three
    reader, fewer = CacheReader(root, "train"), CacheReader(root, "train", draws=1)
    assert (reader.draws, fewer.draws) == (3, 1)
    assert torch.equal(reader.read([0], 0).targets, fewer.read([0], 0).targets)


def test_draws_with_policies_of_their_own(tmp_path: Path, make_cache: Make) -> None:
    root = tmp_path / "cache"
    make_cache(root, TEACHER, masks=masks(1))
    before = files(root)
    schedule = (POLICY, MaskPolicy(mask_prob=0.9, mask_length=4), MaskPolicy(mask_prob=0.1, mask_length=4))
    make_cache(root, TEACHER, masks=masks(3, policies=schedule))
    assert_kept(before, files(root))
    reader = CacheReader(root, "train")
    batches = [reader.read(list(range(len(reader.ids))), draw) for draw in range(3)]
    shares = [float(batch.frame_mask.sum() / batch.num_frames.sum()) for batch in batches]
    assert shares[2] < shares[0] < shares[1]
    with pytest.raises(CacheError, match=r"masks.policy_of_draw_1.mask_prob: 0.9 -> 0.5"):
        make_cache(root, TEACHER, masks=masks(2))


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "tolerance"), [("fp32", 1e-5), ("int8", 0.1), ("pca:0.1", 0.3), ("units:20", 1.0)])
def test_layers(tmp_path: Path, make_cache: Make, codec: str, tolerance: float) -> None:
    root = tmp_path / "cache"
    make_cache(root, TEACHER, layers=(2,), codec=codec)
    before = files(root)
    alone = everything(root)
    with pytest.raises(CacheError, match=r"has no layer 3; it has layers \[2\]"):
        CacheReader(root, "train", [2, 3])
    make_cache(root, TEACHER, layers=(1, 3), codec=codec)
    new = assert_kept(before, files(root))
    assert all("/set=1" in name for name in new)
    assert verify_cache(root) == []
    assert Cache.open(root).spec.layers == (1, 2, 3)
    assert [layer_set.layers for layer_set in Cache.open(root).layer_sets] == [(2,), (1, 3)]
    for ours, theirs in zip(everything(root, [2]), alone, strict=True):
        assert torch.equal(ours, theirs)
    make_cache(tmp_path / "at once", TEACHER, codec="fp32")
    for ours, theirs in zip(everything(root), everything(tmp_path / "at once"), strict=True):
        assert float((ours - theirs).square().mean().sqrt()) < tolerance * float(theirs.std())
    assert all(check.good for check in verify_deep(root, load_teacher(TEACHER)))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "pca"])
def test_the_codec_state_is_deterministic_and_part_of_the_identity(
    tmp_path: Path, make_cache: Make, codec: str
) -> None:
    for name in ("one", "two"):
        make_cache(tmp_path / name, TEACHER, layers=(2,), codec=codec)
        make_cache(tmp_path / name, TEACHER, layers=(1, 3), codec=codec)
    assert {name: data for name, (data, _) in files(tmp_path / "one").items()} == {
        name: data for name, (data, _) in files(tmp_path / "two").items()
    }
    record = json.loads((tmp_path / "one" / "cache.json").read_text())
    states = [(tmp_path / "one" / "codec" / f"set={number}.safetensors").read_bytes() for number in (0, 1)]
    assert [layer_set["state"] for layer_set in record["sets"]] == [hashlib.sha256(s).hexdigest() for s in states]
    assert record["fingerprint"] == Cache.open(tmp_path / "two").fingerprint


@pytest.mark.parametrize("targets", ["composite_only", "masked_everywhere", "clean_only"])
def test_layers_and_draws_at_once_in_the_other_layouts(tmp_path: Path, make_cache: Make, targets: str) -> None:
    root = tmp_path / "cache"
    make_cache(root, TEACHER, layers=(3,), masks=masks(1), targets=targets)
    before = files(root)
    make_cache(root, TEACHER, masks=masks(2), targets=targets)
    new = assert_kept(before, files(root))
    train = next(shard.number for shard in Cache.open(root).shards if shard.split == "train")
    assert {str(Path(name).parent) for name in new if name.endswith(f"part-{train:05d}.parquet")} == {
        "composite_only": {"composite/draw=1", "composite/draw=0/set=1", "composite/draw=1/set=1"},
        "masked_everywhere": {"clean/set=1", "masked/draw=1", "masked/draw=0/set=1", "masked/draw=1/set=1"},
        "clean_only": {"clean/set=1"},
    }[targets]
    assert verify_cache(root) == []
    make_cache(tmp_path / "at once", TEACHER, masks=masks(2), targets=targets)
    for draw in (0, 1):
        ours, theirs = (CacheReader(place, "train").read([0, 2], draw) for place in (root, tmp_path / "at once"))
        torch.testing.assert_close(ours.targets, theirs.targets)
        assert torch.equal(ours.frame_mask, theirs.frame_mask)


def test_growth_needs_no_corpus(
    tmp_path: Path, make_cache: Make, cache_spec: Make, source_utterances: list[Utterance]
) -> None:
    root = tmp_path / "cache"
    make_cache(root, TEACHER, masks=masks(1))
    for utterance in source_utterances:
        Path(utterance.path).unlink()
    spec = cache_spec(TEACHER, masks=masks(2))
    plan = plan_shards(source_utterances, spec.shard_seconds)
    report = build_cache(root, spec, plan, TEACHER, teacher_name=TEACHER, workers=None)
    assert report.written == len({s.number for s in Cache.open(root).shards if s.split == "train"})
    assert verify_cache(root) == []


def test_repair_or_the_next_build_finishes_an_interrupted_extension(tmp_path: Path, make_cache: Make) -> None:
    root = tmp_path / "cache"
    make_cache(root, TEACHER, masks=masks(2))
    sound = {name: data for name, (data, _) in files(root).items()}
    for name in sound:
        if "draw=1/" in name:
            (root / name).unlink()
    with pytest.raises(CacheError, match="is not finished; run the cache stage again"):
        CacheReader(root, "train")
    assert CacheReader(root, "train", draws=1).read([0], 0).targets.isfinite().all()
    repair_cache(root)
    assert {name: data for name, (data, _) in files(root).items()} == sound


def test_existing_files_can_be_read_while_a_cache_is_extended(
    tmp_path: Path, make_cache: Make, cache_spec: Make
) -> None:
    root = tmp_path / "cache"
    needed = make_cache(root, TEACHER, layers=(2,), masks=masks(1), codec="int8")
    before, names = (root / "cache.json").read_bytes(), set(files(root))
    make_cache(root, TEACHER, masks=masks(2), codec="int8")
    added = set(files(root)) - names
    after = (root / "cache.json").read_bytes()
    (root / "cache.json").write_bytes(before)  # The state that a reader sees before the extended cache.json is written.
    assert verify_cache(root) != []
    assert verify_cache(root, needed=needed) == []
    (root / "cache.json").write_bytes(after)
    for name in added:
        if not name.startswith(("codec", "copies")):
            (root / name).unlink()
    cache = Cache.open(root)
    assert cache.missing() and not cache.missing(needed)
    assert verify_cache(root) != []
    assert verify_cache(root, needed=needed) == []
    everything_needed = {problem.name for problem in verify_cache(root, needed=cache_spec(TEACHER, masks=masks(2)))}
    assert everything_needed == {problem.name for problem in verify_cache(root)}
    reader = CacheReader(root, "train", [2], 1)
    shard = next(shard for shard in cache.shards if shard.split == "train")
    read = {file.name for file in reader._rows.files([int(np.flatnonzero(reader.shards == shard.number)[0])], 0)}
    assert {file.name for file in cache.files(shard, needed)} == read
    (root / sorted(read)[-1]).unlink()
    assert [problem.name for problem in verify_cache(root, needed=needed)] == [sorted(read)[-1]]


def test_layers_the_teacher_does_not_have(tmp_path: Path, make_cache: Make) -> None:
    with pytest.raises(CacheError, match="there is no layer 4; the teacher has layers 1 to 3"):
        make_cache(tmp_path / "cache", TEACHER, layers=(1, 4))
