"""A cache from a stranger with links, folders and forged records: nothing outside is touched, and one sentence names the cause."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_distill.teacher_cache.maintenance.repair import SET_ASIDE, repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError, CacheSpec
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.store import Store

from .test_damage import contents

Make = Callable[..., CacheSpec]


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder outside the cache, and check that nothing in it changes."""
    folder = tmp_path / "victim"
    folder.mkdir()
    for name in ("cache.json", "part-00000.parquet", "part-00000.json", "file", ".a.tmp"):
        (folder / name).write_text("the user's own work")
    before = contents(folder)
    yield folder
    assert contents(folder) == before and len(before) == 5


FOLDERS = (
    "clean/set=9",
    "copies",
    "commits",
    "commits/clean",
    "codec",
    "builds",
    "masked",
    "masked/draw=0",
    "set-aside",
    "clean/.a.tmp",
)
FILES = (
    "cache.json",
    "plan.parquet",
    "copies/cache.json",
    "clean/part-00000.parquet",
    "commits/clean/part-00000.json",
    ".b.tmp",
)


@pytest.mark.parametrize("name", [*FOLDERS, *FILES, ".building.lock"])
def test_no_link_in_a_cache_is_followed(tmp_path: Path, victim: Path, make_cache: Make, name: str) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    link = root / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(victim if name in FOLDERS else victim / "file")
    before = {path: str(path.readlink()) if path.is_symlink() else path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(CacheAccessError, match=f"^{re.escape(str(link))} is a symbolic link.*or remove it$"):
        repair_cache(root)
    if name != ".building.lock":
        with pytest.raises(CacheAccessError, match=re.escape(str(link))):
            verify_cache(root)
        with pytest.raises(CacheAccessError, match=re.escape(str(link))):
            CacheReader(root, "train")
    before.pop(root / ".building.lock", None)
    assert all(
        str(p.readlink()) == v if isinstance(v, str) else p.stat().st_mtime_ns == v
        for p, v in before.items()
        if p.name != ".building.lock"
    )


def test_loops_end_and_the_root_may_be_a_link(tmp_path: Path, make_cache: Make) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    (tmp_path / "link").symlink_to(root)
    (root / "clean" / "part-00000.parquet").unlink()
    assert len(repair_cache(tmp_path / "link")) == 1
    assert verify_cache(tmp_path / "link") == []
    (root / "README").symlink_to("/etc/passwd")  # A user's own link beside the files of the cache.
    assert verify_cache(root) == []
    (root / "clean" / "loop").symlink_to(root)
    with pytest.raises(CacheAccessError, match="clean/loop is a symbolic link"):
        verify_cache(root)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CacheAccessError, match=f"{tmp_path}/a.* can't be read .Too many levels of symbolic links"):
        verify_cache(tmp_path / "a")


def test_the_lock_does_not_empty_a_file_with_a_second_name(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.link(victim / "file", tmp_path / "cache" / ".building.lock")
    with (
        pytest.raises(CacheAccessError, match="building.lock has a second name elsewhere"),
        cache_lock(Store(tmp_path / "cache")),
    ):
        pass
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "fifo").rename(tmp_path / "cache" / "cache.json")
    with pytest.raises(CacheError, match="there is no teacher cache"):  # It does not wait for a writer.
        verify_cache(tmp_path / "cache")


@pytest.mark.parametrize(
    "name",
    ["clean/part-00000.parquet", "commits/clean/part-00000.json", "commits/clean", "cache.json", "copies/cache.json", "plan.parquet",
     "copies", "masked/draw=0", "codec/set=0.safetensors"],
)  # fmt: skip
def test_a_folder_in_the_place_of_a_file_is_set_aside(tmp_path: Path, make_cache: Make, name: str) -> None:
    root = tmp_path / "cache"
    make_cache(root, codec="int8")
    sound = contents(root)
    place = root / name
    if place.is_dir():
        shutil.rmtree(place)
        place.write_text("mine")
    else:
        place.unlink()
        place.mkdir()
        (place / "mine").write_text("mine")
    assert name in {problem.name for problem in verify_cache(root)}
    assert f"{place} moved to {SET_ASIDE}/" in repair_cache(root)
    assert contents(root) == sound
    aside = root / SET_ASIDE / name
    assert (aside / "mine" if aside.is_dir() else aside).read_text() == "mine"
    assert verify_cache(root) == [] == repair_cache(root)


@pytest.fixture
def as_nobody(make_cache: Make) -> Iterator[Callable[[], None]]:
    """Return a function that takes the permissions of root away until the test ends."""
    yield lambda: os.seteuid(65534) if os.geteuid() == 0 else None
    os.seteuid(os.getuid())


def test_a_read_only_cache_is_verified_and_read(
    tmp_path: Path, make_cache: Make, as_nobody: Callable[[], None], source_utterances: object
) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    as_nobody()
    assert verify_cache(root) == []
    assert CacheReader(root, "train").read([0], 0).targets.isfinite().all()
    with pytest.raises(CacheAccessError, match=f"^the folder {root} can't be written to .Permission denied"):
        repair_cache(root)
    os.seteuid(os.getuid())
    (root / "clean").chmod(0o777)
    shard = root / "clean" / "part-00000.parquet"
    shard.chmod(0)
    as_nobody()
    for attempt in (lambda: verify_cache(root), lambda: CacheReader(root, "train").read([0, 1], 0)):
        with pytest.raises(CacheAccessError, match=f"^{shard} can't be read .Permission denied.; make it readable"):
            attempt()
