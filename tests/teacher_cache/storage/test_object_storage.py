"""A cache in a real S3-compatible object store: building, reading, verification, repair, extension and locking."""

import contextlib
import hashlib
import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO
from unittest.mock import Mock

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST
from ray_distill.teacher_cache.reading.local_copies import CommittedFile, LocalCopies
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.storage.store import Store

from .s3_server import S3Server

pytestmark = pytest.mark.server

REPOSITORY = Path(__file__).resolve().parents[3]
Make = Callable[..., CacheSpec]


def masks(draws: int) -> MaskDraws:
    return MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=draws, seed=3)


@pytest.fixture
def location(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A location in a new bucket, with the environment variables that a user would set."""
    for key, value in s3.environment().items():
        monkeypatch.setenv(key, value)
    bucket = f"test-{abs(hash(tmp_path)):x}"
    s3.filesystem().create_dir(bucket)
    return f"s3://{bucket}/caches/demo"


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.names() if not name.startswith(BUILDS)}


def test_a_large_file_is_read_in_ranges(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_distill.teacher_cache.storage.store._RANGE_BYTES", 1000)
    for place in (location, "memory://ranges"):
        store = Store(place)
        for size in (0, 1000, 1001, 12_345):
            data = os.urandom(size)
            store.write(f"{size}.bin", data)
            assert store.read(f"{size}.bin") == data
            if size > 1000:
                with pytest.raises(ValueError, match="limit"):
                    store.read(f"{size}.bin", max_bytes=1000)


def test_a_cache_in_an_object_store(tmp_path: Path, make_cache: Make, location: str) -> None:
    make_cache(location, codec="pca:0.2", masks=masks(1))
    make_cache(tmp_path / "local", codec="pca:0.2", masks=masks(1))
    store = Store(location)
    assert store.local is None
    assert contents(store) == contents(Store(tmp_path / "local"))
    assert verify_cache(location) == []

    for split, draw in (("train", 0), ("train", None), ("validation", None)):
        ours, theirs = (CacheReader(place, split) for place in (location, tmp_path / "local"))
        assert torch.equal(ours.read([1, 0], draw).targets, theirs.read([1, 0], draw).targets)
        assert ours.bytes_read > 0
    # A cache in the bucket refers to the audio of that one, by a place relative to its own.
    refers = {"audio": "store", "audio_store": Cache.open(location).spec.audio_fingerprint, "codec": "fp16"}
    make_cache(f"{location}-beside", place=location, masks=masks(1), **refers)
    ours = CacheReader(f"{location}-beside", "train")
    assert ours.cache.record["audio_path"] == "../demo" and ours.prefers_window
    assert torch.equal(
        ours.read([1, 0], 0).waveforms, CacheReader(tmp_path / "local", "train").read([1, 0], 0).waveforms
    )

    sound = contents(store)
    shard, commit = "masked/draw=0/part-00000.parquet", "commits/clean/part-00001.json"
    store.write(shard, sound[shard][:-1] + bytes([sound[shard][-1] ^ 1]))
    store.remove(commit)
    store.write("clean/part-00099.parquet", b"not a shard of this cache")
    problems = {problem.name for problem in verify_cache(location)}
    assert problems == {shard, commit, "clean/part-00099.parquet"}
    with pytest.raises(CacheError, match="is not finished"):
        CacheReader(location, "train")
        CacheReader(location, "validation")
    done = repair_cache(location)
    assert f"{location}/{shard} rebuilt" in done
    store.remove("set-aside/clean/part-00099.parquet")
    assert contents(store) == sound
    assert repair_cache(location) == []

    make_cache(location, codec="pca:0.2", masks=masks(2))
    grown = contents(store)
    kept = {name: data for name, data in sound.items() if "cache.json" not in name and name != MANIFEST}
    assert {name: grown.get(name) for name in kept} == kept
    assert CacheReader(location, "train").read([0], 1).targets.isfinite().all()


@pytest.fixture
def fast_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are renewed and expire about twenty times as fast."""
    monkeypatch.setattr("ray_distill.teacher_cache.storage.lock._HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr("ray_distill.teacher_cache.storage.lock._EXPIRY_SECONDS", 3.0)


def test_a_second_build_names_the_holder_of_the_lock(make_cache: Make, location: str, fast_leases: None) -> None:
    with cache_lock(Store(location)) as check:
        with pytest.raises(CacheError, match=rf"the cache at {location} is being built by process \d+ on .*, since"):
            make_cache(location)
        assert not Cache.exists(Store(location))
        check()
    make_cache(location)
    assert verify_cache(location) == []
    assert "building.json" not in Store(location).names()


BUILDER = """
import json, sys, time
from pathlib import Path
import ray_distill.teacher_cache.storage.lock
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
ray_distill.teacher_cache.storage.lock._HEARTBEAT_SECONDS = 0.5
location, output, other = sys.argv[1:4]
job = json.loads(Path(sys.argv[4]).read_text())
spec = CacheSpec.model_validate(job["spec"])
plan = plan_shards([Utterance(**u) for u in job["utterances"]], spec.shard_seconds)
Path(output + ".ready").touch()
while not Path(other + ".ready").exists():
    pass

def wait(progress):
    # Keep the lock until the other process has tried to take it.
    while not Path(other).exists():
        time.sleep(0.02)

try:
    build_cache(location, spec, plan, "random:2x32", teacher_name="random:2x32", workers=None, on_progress=wait)
    outcome = "built"
except CacheError as error:
    outcome = str(error)
Path(output + ".part").write_text(outcome)
Path(output + ".part").rename(output)
"""


def test_only_one_of_two_concurrent_builds_continues(
    tmp_path: Path, make_cache: Make, cache_spec: Make, location: str, source_utterances: list[Utterance]
) -> None:
    job = {"spec": cache_spec().model_dump(mode="json"), "utterances": [asdict(u) for u in source_utterances]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    outputs = [tmp_path / name for name in ("one", "two")]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, location, mine, other, tmp_path / "job.json"],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for mine, other in (outputs, outputs[::-1])
    ]
    try:
        assert [process.wait(120) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    outcomes = [path.read_text() for path in outputs]
    winner = outcomes.index("built")
    expected = f"the cache at {location} is being built by process {pair[winner].pid} on "
    assert outcomes[1 - winner].startswith(expected), outcomes
    make_cache(tmp_path / "sound")
    assert contents(Store(location)) == contents(Store(tmp_path / "sound"))


KILLED = """
import os, signal, sys
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.store import Store
store = Store(sys.argv[1])
with cache_lock(store), store.create("clean/part-00000.parquet") as path:
    path.write_bytes(b"half a shard")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lease_of_a_killed_build_expires(
    tmp_path: Path, make_cache: Make, location: str, fast_leases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(location)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    subprocess.run([sys.executable, "-c", KILLED, location], cwd=REPOSITORY, check=False, timeout=60)
    assert store.names() == ["building.json"]
    assert list((tmp_path / "tmp").iterdir()) == [], "a killed build leaves no temporary file"
    make_cache(location)  # It watches the lease until it expires.
    make_cache(tmp_path / "sound")
    assert contents(store) == contents(Store(tmp_path / "sound"))


def test_a_build_stops_when_its_lease_was_taken_over(make_cache: Make, location: str, fast_leases: None) -> None:
    store = Store(location)
    other = json.dumps({"host": "elsewhere", "pid": 7, "since": "noon", "claim": "its own", "beat": 1}).encode()
    expected = r"was taken over by process 7 on elsewhere, since noon.* let the other process finish"
    with pytest.raises(CacheError, match=expected), cache_lock(store) as check:
        store.write("building.json", other)
        for _ in range(200):
            time.sleep(0.1)
            check()
    assert store.read("building.json") == other, "the lease of the other process is not changed"


def test_a_failed_upload_keeps_the_earlier_object(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no connection")

    def half(source: BinaryIO, sink: BinaryIO, length: int) -> None:
        sink.write(source.read(3))
        fail()

    store = Store(location)
    store.write("cache.json", b"before")
    monkeypatch.setattr(store, "_fs", Mock(wraps=store._fs, open_output_stream=fail))
    with pytest.raises(OSError, match="no connection"):
        store.write("cache.json", b"and after")
    assert store.read("cache.json") == b"before"
    # Arrow stores what was written before an error as an object, which must not stay.
    store = Store(location)
    monkeypatch.setattr("ray_distill.teacher_cache.storage.store.shutil.copyfileobj", half)
    monkeypatch.setattr("ray_distill.teacher_cache.storage.store.WHOLE_BYTES", 3)
    with pytest.raises(OSError, match="no connection"):
        store.write("clean/part-00000.parquet", b"a shard")
    assert store.names() == ["cache.json"]


class CountingProxy(socketserver.ThreadingTCPServer):
    """Forwards connections to the object store, and records the method of each request."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.split(":")
        self.target, self.methods = (host, int(port)), list[str]()
        super().__init__(("127.0.0.1", 0), _Forward)


class _Forward(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, CountingProxy)
        with socket.create_connection(self.server.target) as upstream:
            threading.Thread(target=self.copy, args=(upstream, self.request), daemon=True).start()
            self.copy(self.request, upstream, self.server.methods)

    @staticmethod
    def copy(source: socket.socket, target: socket.socket, methods: list[str] | None = None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if methods is not None and (found := re.match(rb"(GET|HEAD|PUT|POST|DELETE) /", data)):
                    methods.append(found[1].decode())
                target.sendall(data)


def test_small_files_are_one_request_and_copies_few(
    s3: S3Server, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CountingProxy(s3.endpoint) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        store = Store(location)
        proxy.methods.clear()
        small = os.urandom(5 << 20)
        store.write("commits/clean/part-00000.json", small)
        assert proxy.methods == ["PUT"]
        proxy.methods.clear()
        assert store.read("commits/clean/part-00000.json", 16 << 20) == small
        assert proxy.methods == ["HEAD", "GET"]
        large = os.urandom(33 << 20)
        store.write("clean/part-00000.parquet", large)
        assert store.read("clean/part-00000.parquet") == large
        proxy.methods.clear()
        copies = LocalCopies(tmp_path / "local", store, 1.0)
        copy = copies.open(CommittedFile("clean/part-00000.parquet", len(large), hashlib.sha256(large).hexdigest()))
        assert copy is not None and copy.read() == large
        assert sorted(proxy.methods) == ["GET", "GET", "HEAD"], "two ranges of up to 32 MiB in 33 MiB"
        proxy.shutdown()


def test_the_command_line_reads_it_too(make_cache: Make, location: str) -> None:
    make_cache(location)
    done = subprocess.run(
        [sys.executable, "-m", "teacher_cache", "verify", location],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{location} is sound" in done.stdout


def test_fsspec_opens_what_arrow_does_not_support(tmp_path: Path, make_cache: Make) -> None:
    location = f"memory://{tmp_path.name}/cache"
    make_cache(location, codec="int8")
    make_cache(tmp_path / "local", codec="int8")
    assert contents(Store(location)) == contents(Store(tmp_path / "local"))
    Store(location).remove("clean/part-00000.parquet")
    assert [problem.name for problem in verify_cache(location)] == ["clean/part-00000.parquet"]
    repair_cache(location)
    assert contents(Store(location)) == contents(Store(tmp_path / "local"))
    ours, theirs = CacheReader(location, "train"), CacheReader(tmp_path / "local", "train")
    assert torch.equal(ours.read([2], 1).targets, theirs.read([2], 1).targets)


def test_invalid_locations_are_errors() -> None:
    with pytest.raises(ValueError, match="holds credentials, which logs would repeat") as caught:
        Store("s3://AKIAEXAMPLE:secret@bucket/cache")
    assert "secret@" not in str(caught.value) and "AKIA" not in str(caught.value)
    with pytest.raises(ValueError, match="s4://bucket/cache can't be opened: neither Arrow nor fsspec knows s4://"):
        Store("s4://bucket/cache")
    with pytest.raises(ValueError, match="holds credentials"):
        Store("abfs://container:password@account.dfs.core.windows.net/cache")
    with pytest.raises(ValueError, match="file://host/cache can't be opened: "):
        Store("file://host/cache")
    for half in ("s3:/bucket/cache", "s3://", "s3:/"):  # They would be folders of the working directory.
        with pytest.raises(ValueError, match=f"{half} is no place for a cache: write s3://BUCKET/PREFIX, or ./s3: for"):
            Store(half)


def test_a_missing_bucket_is_named_before_anything_is_computed(make_cache: Make, location: str) -> None:
    missing = "s3://test-no-such-bucket/cache"
    sentence = f"there is no bucket 'test-no-such-bucket' for {missing}; create it, or correct its name"
    for use in (lambda: Cache.exists(Store(missing)), lambda: Cache.open(missing), lambda: make_cache(missing)):
        with pytest.raises(ValueError, match=sentence):
            use()
    assert not Cache.exists(Store(location))


def test_wrong_keys_give_a_sentence_with_what_to_check(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = CliRunner().invoke(application, ["cache", "info", location])
    assert result.exit_code == 2 and "ACCESS_DENIED" in result.stderr
    assert result.stderr.endswith(
        "check the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and what they may do in this bucket\n"
    )


def test_an_azure_container_is_not_a_credential() -> None:
    store = Store("abfs://container@account.dfs.core.windows.net/a/cache")  # Opening makes no request.
    assert store.local is None and store.location.startswith("abfs://container@account")


def test_a_file_uri_is_a_local_folder(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/a%20cache/")
    assert (store.local, store.location) == (tmp_path / "a cache", f"{tmp_path}/a cache")
    store.write("clean/part-00000.json", b"{}")
    assert (tmp_path / "a cache" / "clean" / "part-00000.json").read_bytes() == b"{}"


class _NeedsFolders(LocalFileSystem):  # type: ignore[misc]
    """A store that, like sftp, can't write into a missing folder."""

    protocol = "needsfolders"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("needsfolders://")))


def test_folders_are_created_if_a_store_needs_them(tmp_path: Path) -> None:
    fsspec.register_implementation("needsfolders", _NeedsFolders, clobber=True)
    store = Store(f"needsfolders://{tmp_path}/cache")
    assert store.local is None
    store.write("masked/draw=0/part-00000.json", b"{}")
    store.move("masked/draw=0/part-00000.json", "set-aside/masked/part-00000.json")
    assert store.names() == ["set-aside/masked/part-00000.json"]
    assert store.read("set-aside/masked/part-00000.json") == b"{}"


def test_an_unreachable_store_gives_one_sentence(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    done = subprocess.run(
        [sys.executable, "-m", "teacher_cache", "info", location],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("; check AWS_ENDPOINT_URL, and that this machine reaches it\n")
