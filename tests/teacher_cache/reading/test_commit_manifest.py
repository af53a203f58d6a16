"""The manifest of commit records: readers open with few requests, and never take an old or damaged one for the records."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.cache.slow_store import SlowStore
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading import commit_manifest, commit_table
from ray_distill.teacher_cache.reading.commit_manifest import (
    MANIFEST,
    current_manifest,
    read_manifest,
    rewrite_manifest,
    write_rows,
)
from ray_distill.teacher_cache.reading.local_copies import CommittedFile
from ray_distill.teacher_cache.reading.shard_file_pool import ShardFilePool
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.storage.json_record import decode_record, encode_record
from ray_distill.teacher_cache.storage.local_files import FileEntry
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.storage.store import Store

MASKED = "masked/draw=0/part-00000.parquet"
COMMIT = "commits/masked/draw=0/part-00000.json"


@pytest.fixture
def root(tmp_path: Path, make_cache: Callable[..., object]) -> Path:
    make_cache(tmp_path / "cache", codec="int8")
    return tmp_path / "cache"


def requests(root: Path) -> int:
    store = SlowStore(root)
    CacheReader(store, "train")
    return store.handler.requests


def test_opening_takes_few_requests_and_the_same_utterances(root: Path) -> None:
    files = len(list((root / "commits").rglob("*.json")))
    known = CacheReader(root, "train")
    few = requests(root)
    (root / MANIFEST).unlink()
    assert few <= 12 < requests(root) - files, "without a manifest, each record of the split is read"
    read = CacheReader(root, "train")
    shards = Cache.open(root).shards
    expected = [u for shard in shards if shard.split == "train" for u in shard.utterances]
    for reader in (known, read):
        assert reader.ids == [u.id for u in expected] and reader.ids[1:3] == [u.id for u in expected[1:3]]
        assert reader.num_samples.tolist() == [u.num_samples for u in expected]
        assert torch.equal(reader.read([0, 2], 1).targets, known.read([0, 2], 1).targets)
    assert np.unique(read.shards).tolist() == [shard.number for shard in shards if shard.split == "train"]


def test_an_old_manifest_is_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shard is built again with other bytes, by a version that knows no manifest: its record is newer.
    record = decode_record((root / COMMIT).read_bytes())
    (root / COMMIT).write_bytes(encode_record(record | {"bytes": record["bytes"] + 1}))
    data = (root / MASKED).read_bytes()
    (root / MASKED).write_bytes(data + b"x")
    CacheReader(root, "train")
    # The record is as long and seems old, but the file has another size.
    os.utime(root / COMMIT, ns=(0, 0))
    with pytest.raises(CacheError, match="part-00000.parquet is missing or does not have its committed size"):
        CacheReader(root, "train")
    # A large cache is not listed, so the difference shows when the file is opened; the record is then read.
    monkeypatch.setattr(commit_table, "MAX_LISTED", 0)
    (root / MASKED).write_bytes(data)
    (root / COMMIT).write_bytes(encode_record(record))
    good = (root / MANIFEST).read_bytes()
    (root / COMMIT).write_bytes(encode_record(record | {"bytes": 5}))
    assert rewrite_manifest(root)
    (root / COMMIT).write_bytes(encode_record(record))
    reader = CacheReader(root, "train")
    row = int(np.flatnonzero(reader.shards == 0)[0])
    assert reader.read([row], 0).targets.isfinite().all()
    assert rewrite_manifest(root) and (root / MANIFEST).read_bytes() == good and not rewrite_manifest(root)
    assert CacheReader(root, "train").read([row], 0).targets.isfinite().all()


def test_a_record_that_went_is_missed(root: Path) -> None:
    (root / COMMIT).unlink()
    with pytest.raises(CacheError, match=f"{MASKED} is not finished"):
        CacheReader(root, "train")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "link"])
def test_a_damaged_manifest_is_not_used_and_is_repaired(root: Path, damage: str) -> None:
    expected = CacheReader(root, "train").read([0], 0).targets
    good = (root / MANIFEST).read_bytes()
    if damage == "link":
        (root / MANIFEST).unlink()
        (root / MANIFEST).symlink_to(root / "plan.parquet")
        with pytest.raises(CacheError, match="is a symbolic link"):
            CacheReader(root, "train")
        return
    for place in range(5, len(good), 97) if damage == "flip" else (len(good) // 2,):
        bad = bytearray(good)
        bad[place] ^= 4
        (root / MANIFEST).write_bytes({"flip": bytes(bad), "cut": good[:place], "empty": b""}[damage])
        found = read_manifest(Store(root))
        assert found is None or damage == "flip"
        if found is not None:  # The changed byte means nothing, such as one of the footer's statistics.
            assert {n: p.bytes.tolist() for n, p in found.parts.items()} == sizes(root)
    assert torch.equal(CacheReader(root, "train").read([0], 0).targets, expected)
    assert repair_cache(root) == [f"{root}/{MANIFEST} written again from the commit records"]
    assert (root / MANIFEST).read_bytes() == good
    (root / MANIFEST).unlink()
    assert repair_cache(root) == [] and (root / MANIFEST).read_bytes() == good


def sizes(root: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in sorted((root / "commits").rglob("*.json")):
        folder = str(path.parent.relative_to(root / "commits"))
        found.setdefault(folder, []).append(decode_record(path.read_bytes())["bytes"])
    return found


def test_growth_reads_only_the_records_that_are_new(root: Path, make_cache: Callable[..., object]) -> None:
    before = read_manifest(Store(root), Store(root).entries()[MANIFEST].changed)
    files = len(list((root / "commits").rglob("*.json")))
    cache = Cache.open(root)
    known, unknown = SlowStore(root), SlowStore(root)
    assert current_manifest(Cache.open(known), before) == current_manifest(cache) == (root / MANIFEST).read_bytes()
    assert current_manifest(Cache.open(unknown)) == current_manifest(cache)
    assert unknown.handler.requests - known.handler.requests == 2 * files


def test_a_copied_cache_is_read_from_its_records(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copy)
    os.utime(copy / MANIFEST, ns=(0, 0))
    assert requests(copy) > requests(root)
    assert CacheReader(copy, "train").ids == CacheReader(root, "train").ids


def test_failed_utterances_are_in_the_manifest(
    root: Path, tmp_path: Path, source_utterances: list[Utterance], make_cache: Callable[..., object]
) -> None:
    lost = next(u for u in source_utterances if u.split == "train")
    Path(lost.path).write_bytes(b"not audio")
    make_cache(tmp_path / "lossy", codec="int8")
    known = CacheReader(tmp_path / "lossy", "train")
    assert lost.id in known.failed and lost.id not in known.ids and requests(tmp_path / "lossy") <= 12
    (tmp_path / "lossy" / MANIFEST).unlink()
    read = CacheReader(tmp_path / "lossy", "train")
    assert read.failed == known.failed and read.ids == known.ids
    for index in range(len(read)):
        assert torch.equal(read.read([index], 0).targets, known.read([index], 0).targets)


def test_checks_of_records_take_few_requests(root: Path) -> None:
    files = len(list((root / "commits").rglob("*.json")))

    def checked() -> int:
        store = SlowStore(root)
        assert verify_cache(store, checksums=False) == [] and failed_utterances(Cache.open(store)) == {}
        return store.handler.requests

    few = checked()
    assert not rewrite_manifest(root, thorough=False)
    (root / COMMIT).touch()
    assert checked() == few + 4, "the record is newer than the manifest, so both read it"
    (root / MANIFEST).unlink()
    assert checked() == few - 4 + 4 * files, "a request for a size and one for the content"
    (root / COMMIT).write_bytes(b"damaged")
    assert [problem.name for problem in verify_cache(root, checksums=False)] == [COMMIT]


@pytest.mark.parametrize(("rows", "text", "compression"), [(100_000, 1000, "none"), (20, 2_000_000, "zstd")])
def test_a_small_manifest_can_not_claim_much_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch, rows: int, text: int, compression: str
) -> None:
    columns = [
        pa.array(["p" * text] * rows, field.type)
        if field.name == "part"
        else pa.array([bytes(32)] * rows, field.type)
        if field.name in ("sha256", "content")
        else pa.nulls(rows, field.type)
        if field.name == "failed"
        else pa.array(range(rows), field.type)
        for field in commit_manifest._SCHEMA
    ]
    encodings = dict.fromkeys(("shard", "record_bytes", "rows", "bytes"), "DELTA_BINARY_PACKED")
    encodings |= dict.fromkeys(("part", "sha256", "content", "failed"), "DELTA_BYTE_ARRAY")
    pq.write_table(
        pa.table(columns, commit_manifest._SCHEMA),
        root / MANIFEST,
        compression=compression,
        use_dictionary=False,
        column_encoding=encodings if compression == "none" else None,
        write_statistics=False,
    )
    assert (root / MANIFEST).stat().st_size < rows * text / 1000
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("it is expanded"))
    assert read_manifest(Store(root)) is None


def test_threads_that_meet_an_old_manifest_together_all_go_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = decode_record((root / COMMIT).read_bytes())
    (root / COMMIT).write_bytes(encode_record(record | {"bytes": 5}))
    assert rewrite_manifest(root)
    (root / COMMIT).write_bytes(encode_record(record))
    monkeypatch.setattr(commit_table, "MAX_LISTED", 0)
    reader = CacheReader(root, "train", threads=2)
    barrier, mine, opened = threading.Barrier(2), threading.local(), ShardFilePool._opened

    def together(pool: ShardFilePool, file: CommittedFile, shard_file: ShardFile) -> object:
        if file.name == MASKED and not hasattr(mine, "waited"):
            mine.waited = True
            barrier.wait(20)
        return opened(pool, file, shard_file)

    monkeypatch.setattr(ShardFilePool, "_opened", together)
    rows = np.flatnonzero(reader.shards == 0)[:2].tolist()
    assert len(rows) == 2 and reader.read(rows, 0).targets.isfinite().all()


def test_a_manifest_that_another_process_takes_meanwhile_is_written_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, entries = (root / MANIFEST).read_bytes(), Store.entries

    def taken(store: Store, prefix: str = "") -> object:
        found = entries(store, prefix)
        (root / MANIFEST).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Store, "entries", taken)
    for thorough in (True, False):
        assert rewrite_manifest(root, thorough=thorough) and (root / MANIFEST).read_bytes() == sound


def test_a_record_of_another_size_counts_even_if_it_seems_old(root: Path) -> None:
    record = decode_record((root / COMMIT).read_bytes())
    (root / COMMIT).write_bytes(encode_record(record | {"bytes": 5}))
    os.utime(root / COMMIT, ns=(0, 0))
    with pytest.raises(CacheError, match=f"{MASKED} is missing or does not have its committed size"):
        CacheReader(root, "train")


def test_a_row_of_another_shard_is_not_taken(tmp_path: Path) -> None:
    record = {"rows": 1, "bytes": 2, "sha256": "a" * 64, "content": "b" * 64}
    store = Store(tmp_path)
    write_rows(store, [("clean", 0, record), ("clean", 2, record)])
    entry = store.entries()[MANIFEST]
    manifest = read_manifest(store, entry.changed)
    assert manifest is not None
    size = int(manifest.parts["clean"].record_bytes[0])
    old = FileEntry(size, entry.changed)
    found = [manifest.row("clean", shard, old) for shard in range(4)]
    assert [row and row["shard"] for row in found] == [0, None, 2, None]
    assert manifest.row("masked/draw=0", 0, old) is None and manifest.row("clean", 0, FileEntry(size + 1, 0)) is None
