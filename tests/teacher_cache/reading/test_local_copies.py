"""Local copies of shard files: whole files, checked, shared, limited, and never taken from or written to another place."""

import gc
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.cache.slow_store import SlowStore
from ray_distill.student.training.prefetch import TrainingPlan, micro_batches
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading import local_copies
from ray_distill.teacher_cache.reading.local_copies import CommittedFile, LocalCopies
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError
from ray_distill.teacher_cache.storage.store import Store

SIZE = 100_000


@pytest.fixture
def bucket(tmp_path: Path) -> SlowStore:
    (tmp_path / "bucket").mkdir()
    return SlowStore(tmp_path / "bucket")


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str], CommittedFile]:
    """Return a function that stores a file of SIZE bytes in the bucket and returns its record."""

    def store(name: str) -> CommittedFile:
        data = os.urandom(SIZE)
        (tmp_path / "bucket" / name).write_bytes(data)
        return CommittedFile(name, SIZE, hashlib.sha256(data).hexdigest())

    return store


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait up to 20 s, and then a moment more, in which too much might happen."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    return condition()


def test_a_file_is_fetched_once_in_ranges_and_shared(
    tmp_path: Path, bucket: SlowStore, put: Callable[[str], CommittedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copies, "RANGE_BYTES", 30_000)
    file = put("a")
    held = [
        LocalCopies(tmp_path / "local", bucket, 1.0) for _ in range(2)
    ]  # As in two processes: each opens its own files.
    opened: list[bytes] = []

    def read(copy: LocalCopies) -> None:
        found = copy.open(file)
        assert found is not None
        with found:
            opened.append(found.read())

    threads = [threading.Thread(target=read, args=(copy,)) for copy in held * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [(tmp_path / "bucket" / "a").read_bytes()] * 4
    assert bucket.handler.requests == 5 and sum(copy.fetched for copy in held) == 1
    assert copies(tmp_path / "local") == {f"{file.sha256}.parquet"}


def test_the_least_recently_used_copy_goes_but_never_one_in_use(
    tmp_path: Path, bucket: SlowStore, put: Callable[[str], CommittedFile]
) -> None:
    local = LocalCopies(tmp_path / "local", bucket, 2.5 * SIZE / 1e9)
    (tmp_path / "local" / "thesis.tex").write_text("not a copy")
    one, two, three, four = (put(name) for name in "abcd")
    first = local.open(one)
    assert first is not None
    for file in (two, three):
        opened = local.open(file)
        assert opened is not None
        opened.close()
    assert copies(tmp_path / "local") == {f"{one.sha256}.parquet", f"{three.sha256}.parquet", "thesis.tex"}
    second = local.open(three)
    assert second is not None and local.open(four) is None, "two files are in use, and there is no room for a third"
    first.close()
    third = local.open(four)
    assert third is not None
    assert copies(tmp_path / "local") == {f"{three.sha256}.parquet", f"{four.sha256}.parquet", "thesis.tex"}


def test_a_killed_writer_blocks_neither_its_file_nor_its_room(
    tmp_path: Path, bucket: SlowStore, put: Callable[[str], CommittedFile]
) -> None:
    local = LocalCopies(tmp_path / "local", bucket, 1.5 * SIZE / 1e9)
    one, two = put("a"), put("b")
    for file in (one, two):
        (tmp_path / "local" / f"{file.sha256}.part").write_bytes(bytes(SIZE // 2))
    for file in (one, two):
        opened = local.open(file)
        assert opened is not None and opened.read() == (tmp_path / "bucket" / file.name).read_bytes()
        opened.close()
    assert copies(tmp_path / "local") == {f"{two.sha256}.parquet"}


def test_caches_in_one_folder_share_what_they_fetch_ahead(
    tmp_path: Path, bucket: SlowStore, put: Callable[[str], CommittedFile]
) -> None:
    """As with targets, an audio store and a second teacher: each alone may fill half of the limit, and all three no more."""
    caches = [LocalCopies(tmp_path / "local", bucket, 4.5 * SIZE / 1e9) for _ in range(3)]
    files = [[put(f"{cache}-{number}") for number in range(3)] for cache in range(3)]
    for number in range(3):  # Batch by batch, as a training names them.
        for cache, copy in enumerate(caches):
            copy.want(files[cache][number])

    def fetched(expected: set[tuple[int, int]]) -> bool:
        names = {f"{files[cache][number].sha256}.parquet" for cache, number in expected}
        return wait_for(lambda: copies(tmp_path / "local") == names)

    assert fetched({(0, 0), (1, 0)})
    opened = caches[2].open(files[2][0])
    assert opened is not None, "files that are needed later leave no room for one that is needed now"
    opened.close()
    caches[0].unwant(files[0][0])  # The next file in the order of all caches is not the first cache's own.
    assert fetched({(0, 0), (1, 0), (2, 0)})
    caches[1].unwant(files[1][0])
    assert fetched({(0, 0), (1, 0), (2, 0), (0, 1)})
    del copy, caches[2]  # A reader that is gone keeps nothing from the others.
    gc.collect()
    caches[0].unwant(files[0][1])
    assert wait_for(lambda: (tmp_path / "local" / f"{files[1][1].sha256}.parquet").exists())


def test_the_ranks_of_a_node_divide_what_they_fetch_ahead(
    tmp_path: Path, bucket: SlowStore, put: Callable[[str], CommittedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    local = LocalCopies(tmp_path / "local", bucket, 4.5 * SIZE / 1e9)
    files = [put(f"{number}") for number in range(3)]
    for file in files:
        local.want(file)
    assert wait_for(lambda: copies(tmp_path / "local") == {f"{files[0].sha256}.parquet"})
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    local.unwant(files[2])
    assert wait_for(lambda: copies(tmp_path / "local") == {f"{file.sha256}.parquet" for file in files[:2]})


def test_what_does_not_match_its_record_is_refused_and_leaves_nothing(
    tmp_path: Path, bucket: SlowStore, put: Callable[[str], CommittedFile]
) -> None:
    local = LocalCopies(tmp_path / "local", bucket, 1.0)
    file = put("a")
    (tmp_path / "bucket" / "a").write_bytes(bytes(SIZE))
    with pytest.raises(CacheError, match="bucket/a does not match its commit record; `ray-distill cache repair"):
        local.open(file)
    (tmp_path / "bucket" / "a").write_bytes(bytes(SIZE // 2))
    with pytest.raises(CacheError, match="does not match its commit record"):
        local.open(file)
    with pytest.raises(CacheError, match="no SHA-256"):
        local.open(CommittedFile("a", SIZE, "../../x"))
    assert copies(tmp_path / "local") == set()


def test_a_copy_of_another_size_is_fetched_again_and_links_are_refused(
    tmp_path: Path, bucket: SlowStore, put: Callable[[str], CommittedFile]
) -> None:
    local = LocalCopies(tmp_path / "local", bucket, 1.0)
    file = put("a")
    place = tmp_path / "local" / f"{file.sha256}.parquet"
    place.write_bytes(b"half")
    opened = local.open(file)
    assert opened is not None and len(opened.read()) == SIZE
    opened.close()
    for ending in ("parquet", "part"):
        place.unlink(missing_ok=True)
        link = place.with_suffix(f".{ending}")
        link.symlink_to(tmp_path / "bucket" / "a")
        with pytest.raises(CacheAccessError, match=f"{ending} is a link, no file, or another user's"):
            local.open(file)
        link.unlink()
    assert (tmp_path / "bucket" / "a").stat().st_size == SIZE


def test_useless_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="copies is not an absolute path"):
        LocalCopies("copies", Store(tmp_path))
    with pytest.raises(CacheError, match="lies in the cache"):
        LocalCopies(tmp_path / "cache" / "copies", Store(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="the folder .*/file/copies for local copies can't be used"):
        LocalCopies(tmp_path / "file" / "copies", Store(tmp_path / "cache"))


@pytest.fixture
def cache(tmp_path: Path, make_cache: Callable[..., object]) -> Path:
    make_cache(
        tmp_path / "cache", masks=MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=1), shard_seconds=3
    )
    return tmp_path / "cache"


def batches(reader: CacheReader, first: int = 0) -> Iterator[list[torch.Tensor]]:
    settings = TrainSettings(batch_size=2, epochs=2)
    plan = TrainingPlan(reader.num_samples, settings, 1, reader.shards)
    for micro in micro_batches(plan, reader, Rank(), first, 1):
        yield [micro.batch.targets, micro.batch.waveforms]


def test_training_from_a_bucket_is_that_from_a_disk_and_resumes_with_what_is_needed(
    tmp_path: Path, cache: Path
) -> None:
    expected = list(batches(CacheReader(cache, "train")))
    store = SlowStore(cache)
    reader = CacheReader(store, "train", local=tmp_path / "local", local_gb=1.0)
    assert reader.prefers_window and not reader.needs_window
    opened = store.handler.requests
    found = list(batches(reader))
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    files = 2 * len(set(reader.shards.tolist()))
    assert store.handler.requests - opened == 2 * files == 2 * len(copies(tmp_path / "local")), "its size and one range"

    rest = SlowStore(cache)
    resumed = CacheReader(rest, "train", local=tmp_path / "elsewhere", local_gb=1.0)
    opened = rest.handler.requests
    last = len(expected) - 1
    (found_last,) = batches(resumed, last)
    assert all(torch.equal(a, b) for a, b in zip(found_last, expected[last], strict=True))
    assert 0 < rest.handler.requests - opened <= 8, (
        "the last batch has two utterances in at most two shards of two files"
    )


def test_damaged_copies_are_fetched_again_and_copies_without_room_are_done_without(tmp_path: Path, cache: Path) -> None:
    expected = list(batches(CacheReader(cache, "train")))
    list(batches(CacheReader(SlowStore(cache), "train", local=tmp_path / "local", local_gb=1.0)))
    for path in (tmp_path / "local").glob("*.parquet"):
        data = bytearray(path.read_bytes())
        data[100 : len(data) - 100] = bytes(len(data) - 200)
        path.write_bytes(data)
    again = CacheReader(SlowStore(cache), "train", local=tmp_path / "local", local_gb=1.0)
    small = CacheReader(SlowStore(cache), "train", local=tmp_path / "small", local_gb=1e-6)
    assert small.needs_window
    for reader in (again, small):
        for ours, theirs in zip(batches(reader), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert copies(tmp_path / "small") == set()
