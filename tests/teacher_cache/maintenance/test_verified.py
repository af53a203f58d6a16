"""The memory of a verification: what was sound and has not changed is not read again, and everything else is."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_distill.teacher_cache.maintenance.verified import VERIFIED
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.storage.store import Store

SHARD = "clean/part-00000.parquet"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shard files that are read whole."""
    names: list[str] = []
    sha256 = Store.sha256

    def counted(store: Store, name: str) -> str:
        if name.startswith(("clean/", "masked/")):
            names.append(name)
        return sha256(store, name)

    monkeypatch.setattr(Store, "sha256", counted)
    return names


def test_what_was_sound_is_not_read_again(
    tmp_path: Path, make_cache: Callable[..., object], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    make_cache(root, codec="int8")
    files = sorted(str(path.relative_to(root)) for path in root.rglob("part-*.parquet"))
    assert verify_cache(root) == [] and sorted(read) == files and not (root / VERIFIED).exists()

    def again(place: Path = root) -> list[str]:
        read.clear()
        assert verify_cache(place, memory="use") == []
        return sorted(read)

    assert again() == files and again() == []
    (root / SHARD).touch()
    clean = [name for name in files if name.startswith("clean/")]
    assert again() == clean and again() == []
    (root / "commits/clean/part-00000.json").touch()
    assert again() == clean
    # A copy may have failed to copy, even if it has the same times.
    shutil.copytree(root, tmp_path / "copy")
    assert again(tmp_path / "copy") == files
    shutil.move(root, tmp_path / "old")
    shutil.copytree(tmp_path / "old", root)
    assert again() == files
    # A file that is put back from a damaged copy with its old time is read.
    times = (root / SHARD).stat()
    good = (root / SHARD).read_bytes()
    data = bytearray(good)
    data[100] ^= 1
    (root / SHARD).write_bytes(data)
    os.utime(root / SHARD, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [problem.name for problem in verify_cache(root, memory="use")] == [SHARD]
    (root / SHARD).write_bytes(good)
    assert again() == clean
    # Damage without a trace, as of a disk, is found by reading everything, which then is not forgotten.
    whole = Store.sha256
    monkeypatch.setattr(Store, "sha256", lambda store, name: whole(store, name)[: 0 if name == SHARD else None])
    assert verify_cache(root, memory="use") == []
    for memory in ("write", "use"):
        assert [problem.name for problem in verify_cache(root, memory=memory)] == [SHARD]
    for content in (b"", b"{}", (root / VERIFIED).read_bytes()[:-3]):
        (root / VERIFIED).write_bytes(content)
        assert [problem.name for problem in verify_cache(root, memory="use")] == [SHARD]
    # A cache that can't be written to is read each time.
    monkeypatch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    (root / VERIFIED).unlink()
    read.clear()
    assert [problem.name for problem in verify_cache(root, memory="use")] == [SHARD] and sorted(read) == files
