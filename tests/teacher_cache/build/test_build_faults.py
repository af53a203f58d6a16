"""Killed and concurrent builds, full disks and lost corpora: finished files stay, and resuming gives the same bytes."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.repair import SET_ASIDE, repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store

from ...tiny import TEACHER

REPOSITORY = Path(__file__).resolve().parents[3]
Make = Callable[..., CacheSpec]

WORK = """
import contextlib, os, signal, time
from pathlib import Path
import torch
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.store import Store

torch.set_num_threads(1)
count, create = 0, Store.create

@contextlib.contextmanager
def create_and_kill(store, name):
    # Kill the process when half of the n-th file is written, or right after it was moved into place.
    global count
    count += 1
    fatal = count == job["file"]
    with create(store, name) as path:
        yield path
        if fatal and job["torn"]:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    if fatal:
        os.kill(os.getpid(), signal.SIGKILL)

Store.create = create_and_kill
if job["spec"] is None:
    repair_cache(job["root"])
else:
    spec = CacheSpec.model_validate(job["spec"])
    plan = plan_shards([Utterance(**u) for u in job["utterances"]], spec.shard_seconds)

    def wait(progress):
        # Keep the lock until the other build of a pair has tried to take it.
        while job["until"] and not Path(job["until"]).exists():
            time.sleep(0.005)

    try:
        arguments = {"teacher_name": job["teacher"], "workers": job["workers"], "on_progress": wait}
        build_cache(job["root"], spec, plan, job["teacher"], **arguments)
        outcome = "built"
    except CacheError as error:
        outcome = str(error)
    if job["output"]:
        Path(job["output"]).write_text(outcome)
"""


@pytest.fixture
def start(source_utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Start a build, or a repair if there is no spec, in a new process. Keywords are items of ``job`` in WORK."""
    context = multiprocessing.get_context("forkserver")
    # pyarrow imports pandas when a table is first used, which takes longer than the tests' work.
    modules = ("build.build_cache", "maintenance.repair")
    context.set_forkserver_preload([*(f"ray_distill.teacher_cache.{module}" for module in modules), "pandas"])
    started = []

    def run(root: Path, spec: CacheSpec | None, **job: object) -> Any:
        job = {
            "root": str(root),
            "spec": spec and spec.model_dump(mode="json"),
            "utterances": [asdict(u) for u in source_utterances],
            "teacher": TEACHER,
            "workers": None,
            "file": 0,
            "torn": False,
            "until": "",
            "output": "",
        } | job
        process = context.Process(target=exec, args=(WORK, {"job": job}))
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and not path.match(f"{BUILDS}/*.json")  # Measurements differ.
    }


def committed(root: Path) -> dict[str, int]:
    """Return the modification times of finished shard files."""
    commits = sorted((root / "commits").rglob("*.json"))
    files = [root / path.relative_to(root / "commits").with_suffix(".parquet") for path in commits]
    return {str(path): path.stat().st_mtime_ns for path in files if path.exists()}


def damage(root: Path) -> None:
    """Delete a file, truncate one, flip a bit in one, and delete a commit record and a copy."""
    (root / "masked/draw=0/part-00001.parquet").unlink()
    (root / "copies/plan.parquet").unlink()
    (root / "commits/clean/part-00002.json").unlink()
    os.truncate(root / "clean/part-00000.parquet", 100)
    flip(root / "clean/part-00001.parquet", 40)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["build", "growth", "repair"])
def test_killed_at_every_file(
    tmp_path: Path, make_cache: Make, cache_spec: Make, start: Callable[..., Any], what: str
) -> None:
    full = {"codec": "pca:0.2", "masks": MaskDraws(draws=1), "shard_seconds": 8}
    first = full | {"layers": (2,), "masks": MaskDraws(draws=0)}
    before, sound, root = (tmp_path / name for name in ("before", "sound", "cache"))
    if what == "growth":
        make_cache(sound, **first)
        shutil.copytree(sound, before)
    make_cache(sound, **full)
    if what == "repair":
        shutil.copytree(sound, before)
        damage(before)
    expected = contents(sound)
    counts = set()
    for step in range(1, 1000):
        shutil.rmtree(root, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, root)
        torn = step % 2 == 1
        spec = None if what == "repair" else cache_spec(**full)
        killed = start(root, spec, file=step, torn=torn)
        killed.join()
        if killed.exitcode == 0:
            break
        assert killed.exitcode == -signal.SIGKILL
        assert not torn or any(".tmp" in name for name in contents(root)), (
            "the process was killed in the middle of a file"
        )
        finished = committed(root)
        counts.add(len(finished))
        if what == "repair":
            repair_cache(root)
        else:
            make_cache(root, **full)
            assert committed(root).items() >= finished.items(), "finished files are not written again"
        assert contents(root) == expected, f"killed at step {step}"
        assert verify_cache(root) == []
    assert step > 6, "the files were not counted"
    assert len(counts) > 2, "all kills had the same effect"


def test_killed_at_random_moments(
    tmp_path: Path, make_cache: Make, cache_spec: Make, start: Callable[..., Any]
) -> None:
    make_cache(tmp_path / "sound", codec="int8")
    start(tmp_path / "first", cache_spec(codec="int8")).join()  # This waits for the fork server.
    began = time.monotonic()
    start(tmp_path / "timed", cache_spec(codec="int8")).join()
    seconds = time.monotonic() - began
    rng = random.Random(5)
    for trial in range(4):
        root = tmp_path / str(trial)
        kills = 0
        while kills < 20:
            # Build on the files of killed builds until one build finishes.
            kills += 1
            builder = start(root, cache_spec(codec="int8"))
            # A machine that becomes slower meanwhile gets more time.
            builder.join(rng.uniform(0.3, 1.0) * seconds * 1.1**kills)
            builder.kill()
            builder.join()
            if builder.exitcode == 0:
                break
        assert builder.exitcode == 0
        assert contents(root) == contents(tmp_path / "sound")
        assert verify_cache(root) == []


def test_a_killed_build_with_another_codec_leaves_nothing_behind(
    tmp_path: Path, make_cache: Make, cache_spec: Make, start: Callable[..., Any]
) -> None:
    killed = start(tmp_path / "cache", cache_spec(codec="pca:0.2"), file=4)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "cache/codec/set=0.safetensors").exists()
    make_cache(tmp_path / "cache", codec="fp16")
    make_cache(tmp_path / "sound", codec="fp16")
    assert contents(tmp_path / "cache") == contents(tmp_path / "sound")
    assert verify_cache(tmp_path / "cache") == []


def test_only_one_of_two_concurrent_builds_continues(
    tmp_path: Path, make_cache: Make, cache_spec: Make, start: Callable[..., Any]
) -> None:
    make_cache(tmp_path / "sound")
    for trial in range(4):
        root = tmp_path / str(trial)
        outputs = [tmp_path / f"{trial}.{n}" for n in range(2)]
        pair = [start(root, cache_spec(), output=str(outputs[n]), until=str(outputs[1 - n])) for n in range(2)]
        for process in pair:
            process.join(60)
        outcomes = [path.read_text() for path in outputs]
        winner = outcomes.index("built")
        assert outcomes[1 - winner].startswith(f"the cache at {root} is being built by process {pair[winner].pid} on ")
        assert contents(root) == contents(tmp_path / "sound")
        assert verify_cache(root) == []


DRIVER = """
import json, sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         runtime_env={"env_vars": {"PYTHONPATH": sys.argv[1], "OMP_NUM_THREADS": "1"}})
from ray_distill.teacher_cache.build.shard_workers import Workers
job = json.loads(sys.argv[2]) | {"workers": Workers(actors=2)}
exec(sys.argv[3], {"job": job})
"""


@pytest.fixture
def start_with_ray(source_utterances: list[Utterance]) -> Iterator[Callable[..., Any]]:
    """Start a driver with its own Ray and two actors."""
    started = []

    def run(root: Path, spec: CacheSpec) -> Any:
        job = {
            "root": str(root),
            "spec": spec.model_dump(mode="json"),
            "utterances": [asdict(u) for u in source_utterances],
            "teacher": TEACHER,
            "file": 0,
            "torn": False,
            "until": "",
            "output": str(root) + ".output",
        }
        command = [sys.executable, "-c", DRIVER, str(REPOSITORY), json.dumps(job), WORK]
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for_commits(root: Path, count: int, driver: Any) -> None:
    give_up = time.monotonic() + 120
    while len(committed(root)) < count:
        assert driver.poll() is None and time.monotonic() < give_up, "the build did not write enough files"
        time.sleep(0.002)


def actors_of(driver: int) -> list[int]:
    """Return the processes of a driver's actors. Ray writes the class into the title of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, pid = (folder / "cmdline").read_bytes(), int(folder.name)
            while title.startswith(b"ray::") and b"ShardWriter" in title and pid not in (0, 1):
                pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                if pid == driver:
                    found.append(int(folder.name))
                    break
        except (FileNotFoundError, ProcessLookupError):
            continue  # The process has ended.
    return found


@pytest.mark.ray
def test_a_killed_actor_is_replaced(
    tmp_path: Path, make_cache: Make, cache_spec: Make, start_with_ray: Callable[..., Any]
) -> None:
    changes = {"codec": "pca:0.2", "shard_seconds": 2}
    make_cache(tmp_path / "sound", **changes)
    driver = start_with_ray(tmp_path / "cache", cache_spec(**changes))
    wait_for_commits(tmp_path / "cache", 3, driver)
    victims = actors_of(driver.pid)
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    finished = committed(tmp_path / "cache")
    assert len(finished) < len(committed(tmp_path / "sound"))
    assert driver.wait(300) == 0
    assert Path(str(tmp_path / "cache") + ".output").read_text() == "built"
    assert committed(tmp_path / "cache").items() >= finished.items()
    assert contents(tmp_path / "cache") == contents(tmp_path / "sound")


@pytest.mark.ray
def test_a_killed_driver_can_be_restarted(
    tmp_path: Path, make_cache: Make, cache_spec: Make, start_with_ray: Callable[..., Any]
) -> None:
    changes = {"codec": "pca:0.2", "shard_seconds": 2}
    make_cache(tmp_path / "sound", **changes)
    root = tmp_path / "cache"
    driver = start_with_ray(root, cache_spec(**changes))
    wait_for_commits(root, random.Random(2).randrange(2, 12), driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    # Build at once, while actors of the killed driver may still run.
    make_cache(root, **changes)
    assert verify_cache(root) == []
    give_up = time.monotonic() + 60
    while actors_of(driver.pid) and time.monotonic() < give_up:
        time.sleep(0.1)
    found = {name: data for name, data in contents(root).items() if ".tmp" not in name}
    assert found == contents(tmp_path / "sound")
    repair_cache(root)
    assert contents(root) == contents(tmp_path / "sound"), "the next process removes temporary files of late actors"


def test_repair_without_a_corpus_reads_audio_from_a_damaged_file(
    tmp_path: Path, make_cache: Make, speech_folder: Path
) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    sound = contents(root)
    shutil.rmtree(speech_folder)
    shard = root / "clean/part-00001.parquet"
    with pq.ParquetFile(shard) as file:
        group = file.metadata.row_group(0)
        places = {group.column(n).path_in_schema: group.column(n).data_page_offset + 60 for n in range(6)}
    flip(shard, places["layer_02"])
    assert repair_cache(root) == [f"{shard} rebuilt"]
    assert contents(root) == sound

    # Damaged audio can't be repaired. The file is kept, and all others are rebuilt.
    flip(shard, places["audio"])
    damaged = shard.read_bytes()
    other = root / "masked/draw=0/part-00002.parquet"
    other.unlink()
    with pytest.raises(CacheError, match="3 failures while caching: .*flac can't be decoded as audio"):
        repair_cache(root)
    assert shard.read_bytes() == damaged
    assert other.read_bytes() == sound["masked/draw=0/part-00002.parquet"]
    shard.write_bytes(sound["clean/part-00001.parquet"])
    assert contents(root) | {MANIFEST: sound[MANIFEST]} == sound
    assert repair_cache(root) == []
    assert contents(root) == sound, "a repair that fails leaves no manifest, and the next one writes it"


def test_a_moved_corpus_is_read_at_its_new_path(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance], speech_folder: Path
) -> None:
    root = tmp_path / "cache"
    spec = make_cache(root)
    sound = contents(root)
    now = speech_folder.rename(tmp_path / "elsewhere")
    utterances = [replace(u, path=str(now / Path(u.path).relative_to(speech_folder))) for u in source_utterances]
    plan = plan_shards(utterances, spec.shard_seconds)
    for name in ("clean/part-00001", "clean/part-00002", "masked/draw=0/part-00001"):
        (root / f"{name}.parquet").unlink()
        (root / f"commits/{name}.json").unlink()
    build_cache(root, spec, plan, TEACHER, teacher_name=TEACHER, workers=None)
    assert contents(root) == sound
    (root / "clean/part-00001.parquet").unlink()
    with pytest.raises(CacheError, match=f"{speech_folder}.*No such file"):
        repair_cache(root)
    with pytest.raises(CacheError, match=f"no audio file of the cache was below /old; .* was at {speech_folder}"):
        repair_cache(root, corpus_moved=("/old", str(now)))
    assert repair_cache(root, corpus_moved=(str(speech_folder), str(now))) == [
        f"{root}/clean/part-00001.parquet rebuilt"
    ]
    assert contents(root) == sound


def test_foreign_files_with_the_same_name_are_all_kept(tmp_path: Path, make_cache: Make) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    foreign = root / "clean/part-00099.parquet"
    for text in ("one", "two", "three"):
        foreign.write_text(text)
        repair_cache(root)
    kept = sorted((root / SET_ASIDE / "clean").iterdir())
    assert [path.read_text() for path in kept] == ["one", "two", "three"]


def test_a_full_temporary_folder_is_a_cache_error() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/somewhere")
    expected = r"the disk of the temporary folder \(TMPDIR\) is full .* run again"
    with pytest.raises(CacheError, match=expected), cache_lock(Store("memory://bucket/full")):
        raise full
    with pytest.raises(OSError, match="Input/output error") as other, cache_lock(Store("memory://bucket/full")):
        raise OSError(errno.EIO, "Input/output error")
    assert not isinstance(other.value, ValueError)


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    """A failed write keeps the earlier file and leaves no temporary file."""
    store = Store(tmp_path / "cache")
    store.write("a/b", b"before")
    with pytest.raises(RuntimeError, match="in the middle"), store.create("a/b") as path:
        path.write_bytes(b"half")
        raise RuntimeError("in the middle")
    assert contents(tmp_path / "cache") == {"a/b": b"before"}
    assert Cache.exists(store) is False
