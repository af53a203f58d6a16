"""Building with and without Ray Data: the same bytes, correct progress, and errors of one sentence."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.build.build_cache import BuildReport, Progress, build_cache
from ray_distill.teacher_cache.build.shard_audio import load_shard_audio
from ray_distill.teacher_cache.build.shard_workers import ShardWriterActor, Workers
from ray_distill.teacher_cache.build.shard_writer import shard_to_json
from ray_distill.teacher_cache.embedded_audio import to_pcm
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import Teacher

from ...tiny import TEACHER

REPOSITORY = Path(__file__).resolve().parents[3]
Make = Callable[..., CacheSpec]
Build = Callable[..., BuildReport]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs, initialised in this process."""
    import ray

    variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


@pytest.fixture
def build(cache_spec: Make, source_utterances: list[Utterance]) -> Build:
    """Build a cache of the test speech. ``changes`` are fields of its specification."""

    def run(
        location: Path | str,
        workers: Workers | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        place: str | None = None,
        **changes: object,
    ) -> BuildReport:
        spec = cache_spec(TEACHER, **changes)
        plan = plan_shards(source_utterances, spec.shard_seconds)
        return build_cache(
            location, spec, plan, TEACHER, teacher_name=TEACHER, workers=workers, on_progress=on_progress, audio=place
        )

    return run


def exported(name: str) -> float:
    """Wait for a metric of the only Ray node on this machine, and return the sum of its values."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    give_up = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(address, timeout=30) as answer:
            values = re.findall(rf"^{name}{{.*}} (\S+)$", answer.read().decode(), re.MULTILINE)
        if values:
            return sum(map(float, values))
        assert time.monotonic() < give_up, f"{name} is not exported"
        time.sleep(0.5)


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and not path.match(f"{BUILDS}/*.json")  # Measurements differ.
    }


@pytest.mark.ray
@pytest.mark.parametrize("changes", [{"codec": "pca", "targets": "clean_and_masked"}, {"targets": "composite_only"}])
def test_ray_and_no_ray_give_the_same_bytes(
    tmp_path: Path, local_ray: None, build: Build, changes: dict[str, object]
) -> None:
    seen: list[Progress] = []
    report = build(tmp_path / "ray", Workers(), seen.append, **changes)
    build(tmp_path / "alone", **changes)
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")
    shards = len(Cache.open(tmp_path / "ray").shards)
    assert (report.written, report.reused) == (shards, 0)
    assert verify_cache(tmp_path / "ray") == []
    assert [p.shards_done for p in seen] == list(range(1, shards + 1))
    last = seen[-1]
    assert last.utterances_done == last.utterances == 12
    assert last.seconds_done == pytest.approx(last.seconds)
    assert last.audio_per_second == pytest.approx(last.seconds / last.elapsed, rel=0.01)
    assert all(0 < p.busy <= 1 for p in seen)
    again = build(tmp_path / "ray", Workers(), **changes)
    assert (again.written, again.reused) == (0, shards)


@pytest.mark.ray
def test_two_actors_give_the_same_bytes(tmp_path: Path, local_ray: None, build: Build) -> None:
    seen: list[Progress] = []
    report = build(tmp_path / "ray", Workers(actors=2), seen.append, shard_seconds=2)
    build(tmp_path / "alone", shard_seconds=2)
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")
    assert report.written == len(seen) > 6
    assert all(0 < p.busy <= 1 for p in seen)
    assert [p.utterances_done for p in seen] == sorted({p.utterances_done for p in seen})


@pytest.mark.ray
def test_a_missing_file_is_left_out_and_counted(
    tmp_path: Path, local_ray: None, build: Build, source_utterances: list[Utterance]
) -> None:
    victim = Path(next(utterance.path for utterance in source_utterances if utterance.split == "train"))
    victim.unlink()
    report = build(tmp_path / "cache", Workers(), codec="pca")
    cache = Cache.open(tmp_path / "cache")
    assert report.written == len(cache.shards) and not cache.missing() and verify_cache(tmp_path / "cache") == []
    ((name, reason),) = failed_utterances(cache).items()
    assert name == victim.stem and str(victim) in reason
    assert exported("ray_distill_cache_failures_total") == 1
    build(tmp_path / "alone", codec="pca")
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")
    # So it is in an audio store and in a cache that refers to it.
    spec = CacheSpec.of_audio(cache.spec.corpus, cache.spec.shard_seconds)
    seen: list[Progress] = []
    for name, workers in (("ray", Workers()), ("here", None)):
        plan = plan_audio(source_utterances, spec.shard_seconds)
        build_audio_store(tmp_path / name / "audio", spec, plan, workers=workers, on_progress=seen.append)
        refers = {"audio": "store", "audio_store": spec.audio_fingerprint, "codec": "pca"}
        build(tmp_path / name / "cache", workers, place=str(tmp_path / name / "audio"), **refers)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    assert [p.shards_done for p in seen] == 2 * [n + 1 for n in range(len(cache.shards))]
    for built in (Cache.open(tmp_path / "ray" / folder) for folder in ("audio", "cache")):
        assert list(failed_utterances(built)) == [victim.stem] and verify_cache(built.store) == []


@pytest.mark.ray
def test_another_teacher_is_an_error_of_one_sentence(
    tmp_path: Path, local_ray: None, cache_spec: Make, source_utterances: list[Utterance]
) -> None:
    spec = cache_spec(TEACHER)
    plan = plan_shards(source_utterances, spec.shard_seconds)
    for workers in (None, Workers()):
        with pytest.raises(CacheError) as caught:
            build_cache(tmp_path / "cache", spec, plan, "random:3x32", teacher_name="other", workers=workers)
        expected = f"random:3x32 is not the teacher that the cache at {tmp_path / 'cache'} was made with"
        assert str(caught.value) == expected


@pytest.mark.ray
def test_an_interrupted_build_stops_writing(tmp_path: Path, local_ray: None, build: Build) -> None:
    many = {"shard_seconds": 1, "masks": MaskDraws(draws=30)}

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        build(tmp_path / "cache", Workers(actors=2), stop, **many)
    assert caught.tb  # The traceback keeps the build's objects alive.
    left, give_up = None, time.monotonic() + 60
    while left != (now := contents(tmp_path / "cache")):  # Actors are being stopped.
        assert time.monotonic() < give_up, "the actors go on"
        left = now
        time.sleep(1.5)
    assert len(Cache.open(tmp_path / "cache").missing()) > 0
    build(tmp_path / "cache", **many)
    build(tmp_path / "sound", **many)
    assert contents(tmp_path / "cache") == contents(tmp_path / "sound")


def test_repair_uses_the_number_of_threads_of_the_build(tmp_path: Path, build: Build) -> None:
    import torch

    build(tmp_path / "cache", codec="fp32")
    sound = contents(tmp_path / "cache")
    for name in sound:
        if name.startswith("masked"):
            (tmp_path / "cache" / name).unlink()
    torch.set_num_threads(2)
    try:
        repair_cache(tmp_path / "cache")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert contents(tmp_path / "cache") == sound


def test_values_that_the_codec_cannot_represent_are_an_error(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Teacher.hidden_states
    monkeypatch.setattr(Teacher, "hidden_states", lambda *args, **options: compute(*args, **options) * 1e6)
    with pytest.raises(CacheError, match="layer 1 is beyond the range of fp16; use codec fp32"):
        build(tmp_path / "cache", codec="fp16")


def out_of_memory(*_arguments: object, **_options: object) -> object:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def no_memory_of_the_cpu(*_arguments: object, **_options: object) -> object:
    return torch.empty(2**58)


@pytest.mark.parametrize("fails", [out_of_memory, no_memory_of_the_cpu])
def test_too_little_memory_is_an_error_of_one_sentence(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., object]
) -> None:
    root = tmp_path / "cache"
    monkeypatch.setattr(Teacher, "hidden_states", fails)
    with pytest.raises(CacheError, match="could not be fitted: .* with one utterance; .* corpus.max_seconds"):
        build(root, codec="int8")
    message = "random:2x32 ran out of memory on cpu with batches of 6 s of audio; .* lower cache.batch_seconds"
    with pytest.raises(CacheError, match=message):
        build(root)
    assert not list((root / "clean").iterdir())
    # An actor returns the sentence, because Ray would restart it after an exception.
    cache = Cache.open(root)
    audio = load_shard_audio(cache, cache.shards[0])
    row = {
        "shard": shard_to_json(cache.shards[0]),
        "pcm": b"".join(to_pcm(waveform) for waveform in audio.waveforms),
        "audio": audio.embedded,
        "failed": "{}",
        "problem": "",
    }
    (record,) = ShardWriterActor(str(root), TEACHER, "cpu", 3)(pa.Table.from_pylist([row])).to_pylist()
    assert re.match(message, record["refused"])


def test_a_failed_worker_is_an_error_of_one_sentence(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data
    import ray.exceptions

    errors = (
        (
            ray.exceptions.WorkerCrashedError(),
            "The worker died unexpectedly while executing this task. ",
            "if memory ran out",
        ),
        (ray.exceptions.OutOfMemoryError("low on memory\nand much\nadvice"), "low on memory", "since memory ran out"),
        (
            ray.exceptions.RayTaskError("f", "Traceback\n  File\nMemoryError\n", MemoryError()),
            "MemoryError",
            "since memory",
        ),
        (
            ray.exceptions.RayTaskError("f", "Traceback\n  File\nIndexError: 3\n", IndexError(3)),
            "IndexError: 3",
            "remove",
        ),
    )
    for error, text, advice in errors:

        def fail(*_arguments: object, error: Exception = error, **_options: object) -> None:
            raise error

        monkeypatch.setattr(ray.data, "from_items", fail)
        with pytest.raises(CacheError, match=rf"^the cache stage stopped because a worker failed \({text}") as caught:
            build(tmp_path / "cache", workers=Workers())
        assert "\n" not in str(caught.value) and f"are kept: {advice}" in str(caught.value)
        assert ("lower cache.actors" in str(caught.value)) == ("memory" in advice)


def test_a_second_build_names_the_first_and_does_not_disturb_it(tmp_path: Path, build: Build) -> None:
    with cache_lock(Store(tmp_path / "cache")):
        code = f"""
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.storage.lock import cache_lock
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import Teacher
with cache_lock(Store({str(tmp_path / "cache")!r})):
    print("two at once")
"""
        second = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
        )
        assert second.returncode != 0
        expected = f"the cache at {tmp_path / 'cache'} is being built by process {os.getpid()} on "
        assert expected in second.stderr and "wait until it has finished, or stop it" in second.stderr
        with pytest.raises(CacheError, match="is being built by process"):
            build(tmp_path / "cache")
    build(tmp_path / "cache")
    assert verify_cache(tmp_path / "cache") == []


def test_a_folder_with_other_files_is_not_changed(tmp_path: Path, build: Build) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CacheError, match=r"holds files \(such as chapter.tex\) but no cache.json"):
        build(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


FULL_DISK = """
import hashlib, json, shutil, sys
from pathlib import Path
import torch
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.embedded_audio import to_pcm
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.storage.shard_plan import plan_shards, Utterance
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import Teacher
torch.set_num_threads(1)
disk, job = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
root, ballast = disk / "cache", disk / "ballast"
spec = CacheSpec.model_validate(job["spec"])
plan = plan_shards([Utterance(**u) for u in job["utterances"]], spec.shard_seconds)

def build():
    return build_cache(root, spec, plan, job["teacher"], teacher_name=job["teacher"], workers=None).written

def hashes():
    found = (
        path
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.parent.name != "builds"
    )
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

def fill(room):
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - room))

def attempt(do):
    try:
        do()
        return "no error"
    except CacheError as error:
        return str(error)

rows = []
for room in job["rooms"]:
    shutil.rmtree(root, ignore_errors=True)
    fill(room)
    message = attempt(build)
    created = Cache.exists(Store(root))
    missing = len(Cache.open(root).missing()) if created else None
    left = [name for name in hashes() if name.endswith(".tmp")]
    ballast.unlink()
    rows.append({"message": message, "missing": missing, "left": left, "written": build(), "files": hashes()})
for path in root.glob("masked/*/*.parquet"):
    path.unlink()
fill(job["repair_room"])
message = attempt(lambda: repair_cache(root))
ballast.unlink()
repair_cache(root)
rows.append({"message": message, "files": hashes()})
print(json.dumps(rows))
"""


def test_a_full_disk(tmp_path: Path, build: Build, cache_spec: Make, source_utterances: list[Utterance]) -> None:
    build(tmp_path / "sound")
    sound = {name: hashlib.sha256(data).hexdigest() for name, data in contents(tmp_path / "sound").items()}
    size = sum(len(data) for data in contents(tmp_path / "sound").values())
    shares = (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
    job = {
        "spec": cache_spec(TEACHER).model_dump(mode="json"),
        "utterances": [vars(u) for u in source_utterances],
        "teacher": TEACHER,
        "rooms": [int(share * size) for share in shares],
        "repair_room": int(0.2 * size),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "disk").mkdir()
    # A file system in memory, in a separate namespace.
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && exec "$3" -c "$4" "$2" "$5"'
    arguments = [str(3 * size), tmp_path / "disk", sys.executable, FULL_DISK, tmp_path / "job.json"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"needs to mount a file system, which is not permitted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    *rows, repaired = json.loads(done.stdout)
    shards = len(Cache.open(tmp_path / "sound").shards)
    for row in [*rows, repaired]:
        assert row["message"].startswith(f"the disk of {tmp_path / 'disk' / 'cache'} is full ("), row["message"]
        assert row["message"].endswith("free some space and run again, finished files are kept")
        assert row["files"] == sound
    for row in rows:
        assert row["left"] == []
        assert row["written"] == (shards if row["missing"] is None else row["missing"])
    assert rows[0]["missing"] is None, "the cache was created on a full disk"
    assert len({row["missing"] for row in rows}) > 2, "all builds stopped at the same point"


def test_draws_and_layers_that_do_not_exist(tmp_path: Path, build: Build) -> None:
    build(tmp_path / "cache", masks=MaskDraws(draws=0))
    with pytest.raises(CacheError, match="mask draw 0 is not in the cache at .*; it has no draws"):
        CacheReader(tmp_path / "cache", "train").read([0], 0)
    with pytest.raises(CacheError, match="there is no layer 7; the teacher has layers 1 to 2"):
        build(tmp_path / "cache", layers=(1, 7))


def test_a_random_teacher_is_known_by_name(tmp_path: Path, build: Build) -> None:
    """Its weights, and so its fingerprint, are rounded differently without AVX2."""
    build(tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    cache.check_teacher(TEACHER, "0" * 64)
    cache.check_teacher("a copy", cache.spec.teacher)
    for name in ("random:3x32", f"layer-norm:{TEACHER}", "hubert.pt"):
        with pytest.raises(CacheError, match=f"{name} is not the teacher that the cache"):
            cache.check_teacher(name, "0" * 64)
