"""Damage to a cache's files: verify names the file, readers never return wrong numbers, and repair restores the bytes."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ray_distill.teacher_cache.maintenance.repair import SET_ASIDE, repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec

CASES = 300


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock") and not {SET_ASIDE, BUILDS} & set(path.parts)
    }


def restore(root: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(root)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def targets(root: Path) -> list[torch.Tensor]:
    found = []
    for split, draws in (("train", (None, 0, 1)), ("validation", (None,))):
        reader = CacheReader(root, split, threads=1)
        for draw in draws:
            for index in range(len(reader.ids)):
                batch = reader.read([index], draw)
                found += [batch.targets, batch.waveforms]
    return found


def flip(rng: random.Random, root: Path, names: list[str]) -> set[str]:
    name = rng.choice(names)
    data = bytearray((root / name).read_bytes())
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    (root / name).write_bytes(data)
    return {name}


def truncate(rng: random.Random, root: Path, names: list[str]) -> set[str]:
    name = rng.choice(names)
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: rng.randrange(len(data))])
    return {name}


def delete(rng: random.Random, root: Path, names: list[str]) -> set[str]:
    name = rng.choice(names)
    (root / name).unlink()
    return {name}


def duplicate(rng: random.Random, root: Path, names: list[str]) -> set[str]:
    """Copy a file to the name of a shard that is not in the plan."""
    name = rng.choice([name for name in names if name.startswith(("clean", "masked", "commits"))])
    copy = str(Path(name).with_stem(f"part-{rng.randrange(1000, 9999):05d}"))
    shutil.copy(root / name, root / copy)
    return {copy}


def replace(rng: random.Random, root: Path, names: list[str]) -> set[str]:
    """Overwrite one shard file with another."""
    one, other = rng.sample([name for name in names if name.endswith(".parquet") and name.startswith(("cl", "ma"))], 2)
    shutil.copy(root / one, root / other)
    return {other}


def swap(rng: random.Random, root: Path, names: list[str]) -> set[str]:
    one, other = rng.sample([name for name in names if name.endswith(".parquet") and name.startswith(("cl", "ma"))], 2)
    pairs = [(one, other)]
    if rng.random() < 0.5:  # Swap their commit records too.
        pairs.append(tuple(f"commits/{name.removesuffix('parquet')}json" for name in (one, other)))
    for first, second in pairs:
        kept = (root / first).read_bytes()
        shutil.copy(root / second, root / first)
        (root / second).write_bytes(kept)
    return {one, other} if len(pairs) == 1 else set(pairs[1])


DAMAGES = (flip, flip, flip, truncate, delete, duplicate, replace, swap)


@pytest.mark.slow
def test_random_damage_is_named_never_read_and_repaired(tmp_path: Path, make_cache: Callable[..., CacheSpec]) -> None:
    root = tmp_path / "cache"
    make_cache(root, codec="pca:0.2")
    sound = contents(root)
    expected = targets(root)
    assert verify_cache(root) == []
    refused = 0
    for case in range(CASES):
        rng = random.Random(case)
        damaged = rng.choice(DAMAGES)(rng, root, sorted(sound.keys() - {MANIFEST}))
        named = {problem.name for problem in verify_cache(root)}
        assert damaged <= named, f"case {case}: {damaged} not in {named}"
        try:
            found = targets(root)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"case {case}: {damaged}"
        except CacheError:
            refused += 1
        done = repair_cache(root)
        assert done, f"case {case}"
        assert contents(root) == sound, f"case {case}: {damaged}"
        if case % 50 == 0:
            restore(root, sound)  # This removes files that repair set aside.
    # Readers do not read copies, foreign files and parts of commit records, so only verify notices their damage.
    assert refused > CASES / 3


def test_repair_needs_neither_corpus_nor_more_than_the_damage(
    tmp_path: Path, make_cache: Callable[..., CacheSpec], speech_folder: Path
) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    sound = contents(root)
    shutil.rmtree(speech_folder)
    masked = root / "masked" / "draw=1" / "part-00000.parquet"
    masked.write_bytes(b"")
    untouched = {
        name: (root / name).stat().st_mtime_ns for name in sound if name != MANIFEST and "draw=1/part-00000" not in name
    }
    assert repair_cache(root) == [f"{masked} rebuilt"]
    assert contents(root) == sound
    assert all((root / name).stat().st_mtime_ns == time for name, time in untouched.items())
    assert repair_cache(root) == []
    # Without the embedded audio, repair needs the corpus.
    (root / "clean" / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(CacheError, match="failures? while caching: .*flac"):
        repair_cache(root)


def test_losing_both_copies_of_a_record_is_an_error(tmp_path: Path, make_cache: Callable[..., CacheSpec]) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    (root / "plan.parquet").unlink()
    (root / "copies" / "plan.parquet").write_bytes(b"no plan")
    with pytest.raises(CacheError, match="plan.parquet and its copy copies/plan.parquet are both missing or damaged"):
        repair_cache(root)
    (root / "cache.json").write_text("{}")
    (root / "copies" / "cache.json").write_text("{}")
    with pytest.raises(CacheError, match="cache.json is damaged .* its copy can't be used either"):
        verify_cache(root)


def test_repair_with_the_wrong_teacher_changes_nothing(tmp_path: Path, make_cache: Callable[..., CacheSpec]) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    (root / "clean" / "part-00000.parquet").unlink()
    with pytest.raises(CacheError, match="random:3x32 is not the teacher that the cache at .* was made with"):
        repair_cache(root, "random:3x32")
