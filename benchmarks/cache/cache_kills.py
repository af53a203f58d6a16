"""Kill builds and repairs of a cache with SIGKILL at random points, and check that nothing is lost, duplicated or changed.

Each seeded trial starts a build, or a repair of a damaged cache, in its own process, kills it, starts it again, and compares every
byte with a cache from an undisturbed build. Kinds of trials: ``time`` (the kill comes at a random moment, mostly while shards are
written), ``write`` (the kill comes just before or just after a random file is put in place), ``repair`` (both of these, during a
repair), and with Ray ``driver`` and ``actor`` (the process that runs the teacher, which Ray restarts). The number of files
committed at the kill shows how far the build or repair had come.
"""

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.build.shard_workers import Workers
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import load_teacher

TEACHER = "random:2x32"
DRAWS = 2
EFFECTS = {
    "different_files": "files that differ from the undisturbed cache",
    "lost": "utterances lost, in all passes",
    "twice": "duplicate utterances",
    "made_again": "files finished before the kill and written again after it",
    "problems": "problems that verify finds",
}


def corpus(folder: Path) -> list[Utterance]:
    """Return sixteen short noise files, created with the same samples each time."""
    rng = np.random.default_rng(0)
    found = []
    for n in range(16):
        path = folder / f"{n}.flac"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, 0.1 * rng.normal(size=16_000 + 2000 * n), 16_000, subtype="PCM_16")
        waveform = load_audio(path)
        digest = hashlib.sha256(waveform.tobytes()).hexdigest()
        found.append(Utterance(f"u{n}", str(path), len(waveform), "validation" if n % 8 == 7 else "train", digest))
    return found


def build(root: str, audio: str, workers: Workers | None = None) -> None:
    """Build the cache, with the same result every time."""
    teacher = load_teacher(TEACHER)
    spec = CacheSpec(
        teacher=teacher.fingerprint,
        num_layers=teacher.num_layers,
        dim=teacher.dim,
        layers=(1, 2),
        masks=MaskDraws(draws=DRAWS),
        codec="pca",
        corpus="tones",
        shard_seconds=4,
        batch_seconds=4,
    )
    plan = plan_shards(corpus(Path(audio)), spec.shard_seconds)
    build_cache(root, spec, plan, TEACHER, teacher_name=TEACHER, workers=workers)


def work(kind: str, root: str, audio: str, kill_at: tuple[int, bool] | None) -> None:
    """Run a trial's build or repair in a child process.

    With ``kill_at`` (n, after) the process kills itself just before or just after it puts its n-th file in place.
    """
    torch.set_num_threads(1)
    if kill_at is not None:
        number, after = kill_at
        create, count = Store.create, 0

        @contextmanager
        def deadly(store: Store, name: str) -> Iterator[Path]:
            nonlocal count
            count += 1
            mine = count
            with create(store, name) as path:
                yield path
                if mine == number and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
            if mine == number:
                os.kill(os.getpid(), signal.SIGKILL)

        Store.create = deadly  # type: ignore[method-assign]
    if kind == "repair":
        repair_cache(root)
    else:
        build(root, audio)


def contents(root: Path) -> dict[str, str]:
    """Return the hashes of all files except locks and the records of each build's cost, which contain times."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.parent != root / "builds"
    }


def commits(root: Path) -> int:
    return len(list((root / "commits").rglob("part-*.json")))


def commits_since(root: Path, started: float) -> int:
    return sum(path.stat().st_mtime >= started for path in (root / "commits").rglob("part-*.json"))


def times(root: Path) -> dict[Path, int]:
    """Return the modification time of each finished shard file."""
    files = [root / path.relative_to(root / "commits").with_suffix(".parquet") for path in root.rglob("part-*.json")]
    return {file: file.stat().st_mtime_ns for file in files if file.exists()}


def damage(rng: random.Random, root: Path) -> None:
    """Damage a third of the files: delete them, truncate them or flip a bit."""
    names = [path for path in sorted(root.rglob("part-*")) if path.is_file()]
    for path in rng.sample(names, len(names) // 3):
        data = bytearray(path.read_bytes())
        how = rng.randrange(3)
        if how == 0:
            path.unlink()
        elif how == 1:
            path.write_bytes(data[: rng.randrange(len(data))])
        else:
            data[rng.randrange(len(data))] ^= 1
            path.write_bytes(data)


def wait_for_shards(kind: str, root: Path, child: Any) -> None:
    """Wait until the child starts on the shards: ``cache.json`` exists, or a repair removed or wrote a commit record."""
    before = commits(root)
    while child.is_alive() and not (commits(root) != before if kind == "repair" else (root / "cache.json").exists()):
        time.sleep(0.0005)


def writing_seconds(root: Path) -> float:
    """Return the seconds from ``cache.json`` to the last commit record."""
    last = max(path.stat().st_mtime for path in root.rglob("part-*.json"))
    return last - (root / "cache.json").stat().st_mtime


def trial(kind: str, seed: int, folder: Path, sound: Path, seconds: float) -> dict[str, Any]:
    """Kill one build or repair without Ray, finish it and compare. ``seconds`` is the duration of an undisturbed build."""
    rng = random.Random(f"{kind}/{seed}")
    root, audio = folder / "cache", str(folder.parent / "audio")
    shutil.rmtree(root, ignore_errors=True)
    if kind == "repair":
        shutil.copytree(sound, root)
        damage(rng, root)
    started = time.time()
    by_write = kind == "write" or (kind == "repair" and rng.random() < 0.5)
    kill_at = (
        (rng.randrange(1, len(contents(sound)) if kind == "write" else 10), rng.random() < 0.5) if by_write else None
    )
    child = multiprocessing.get_context("forkserver").Process(target=work, args=(kind, str(root), audio, kill_at))
    child.start()
    if by_write:
        child.join()
    else:
        if rng.random() < 0.25:
            child.join(rng.uniform(0, seconds))  # Mostly before the first shard.
        else:
            wait_for_shards(kind, root, child)
            child.join(rng.uniform(0, writing_seconds(sound)))
        child.kill()
        child.join()
    there, finished = commits_since(root, started), times(root)
    again = multiprocessing.get_context("forkserver").Process(target=work, args=(kind, str(root), audio, None))
    again.start()
    again.join()
    assert again.exitcode == 0, f"the build after trial {kind} {seed} failed"
    killed = child.exitcode == -signal.SIGKILL
    if kind == "repair":
        finished = {}  # Some of the finished files are damaged.
    return {"kind": kind, "seed": seed, "killed": killed, "commits_at_kill": there} | judge(root, sound, finished)


def judge(root: Path, sound: Path, finished: dict[Path, int]) -> dict[str, int]:
    """Count the effects of a kill, with the keys of `EFFECTS`."""
    ours, theirs = contents(root), contents(sound)
    lost = twice = 0
    cache = Cache.open(root)
    for split, folders in (
        ("train", ["clean", *(f"masked/draw={n}" for n in range(DRAWS))]),
        ("validation", ["clean"]),
    ):
        wanted = {u.id for shard in cache.shards if shard.split == split for u in shard.utterances}
        for name in folders:
            files = sorted((root / name).glob("*.parquet"))
            ids = Counter(i for file in files for i in pq.read_table(file, columns=["id"])["id"].to_pylist())
            lost += sum(ids[i] == 0 for i in wanted)
            twice += sum(ids[i] > 1 for i in wanted)
    different = sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())
    again = len(finished.items() - times(root).items())
    problems = len(verify_cache(root))
    return dict(zip(EFFECTS, (different, lost, twice, again, problems), strict=True))


DRIVER = """
import sys
sys.path.insert(0, {repository!r})
import ray
from benchmarks.cache.cache_kills import build
from ray_distill.teacher_cache.build.shard_workers import Workers
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         runtime_env={{"env_vars": {{"PYTHONPATH": {repository!r}, "OMP_NUM_THREADS": "1"}}}})
print("building", flush=True)
build({root!r}, {audio!r}, Workers())
print("finished", flush=True)
"""


def start_driver(root: Path, audio: str) -> "subprocess.Popen[str]":
    code = DRIVER.format(repository=str(REPOSITORY), root=str(root), audio=audio)
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def teacher_actors(driver: int) -> list[int]:
    """Return the process ids of the driver's descendants that run a ShardWriter. Ray puts the class into the process title."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            pid = int(folder.name)
            if title.startswith("ray::") and "ShardWriter" in title:
                while pid not in (driver, 0):
                    pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                if pid == driver:
                    found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # The process ended in the meantime.
    return found


def ray_trial(kind: str, seed: int, folder: Path, sound: Path) -> dict[str, Any]:
    """Kill the driver or the actor once a random number of files are committed."""
    rng = random.Random(f"{kind}/{seed}")
    root, audio = folder / "cache", str(folder.parent / "audio")
    shutil.rmtree(root, ignore_errors=True)
    driver = start_driver(root, audio)
    wanted = rng.randrange(1, commits(sound) - 4)
    deadline = time.monotonic() + 300
    while commits(root) < wanted:
        assert time.monotonic() < deadline and driver.poll() is None, "the build did not get as far as the kill"
        time.sleep(0.005)
    victims = [driver.pid] if kind == "driver" else teacher_actors(driver.pid)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    there, finished = commits(root), times(root)
    if kind == "driver":
        driver.wait()
        driver = start_driver(root, audio)
    assert driver.stdout is not None
    printed = driver.stdout.read()
    assert driver.wait() == 0 and "finished" in printed, f"the build after trial {kind} {seed} failed"
    return {"kind": kind, "seed": seed, "killed": bool(victims), "commits_at_kill": there} | judge(
        root, sound, finished
    )


def main(
    trials: Annotated[int, typer.Option(help="Trials of each kind without Ray.")] = 12,
    with_ray: Annotated[int, typer.Option(help="Trials of each kind with Ray.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Run two trials of each kind, without Ray.")] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/cache_kills.json",
) -> None:
    """Kill builds and repairs, finish them, and compare the result with an undisturbed build."""
    if quick:
        trials, with_ray = 2, 0
    context = multiprocessing.get_context("forkserver")
    # pyarrow imports pandas at the first use of a table, which takes longer than a build here.
    context.set_forkserver_preload(
        ["ray_distill.teacher_cache.build.build_cache", "ray_distill.teacher_cache.maintenance.repair", "pandas"]
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audio, sound = str(folder / "audio"), folder / "sound"
        corpus(folder / "audio")
        seconds = 0.0
        for _ in range(2):  # The second build is free of one-time costs.
            shutil.rmtree(sound, ignore_errors=True)
            began = time.perf_counter()
            child = context.Process(target=work, args=("time", str(sound), audio, None))
            child.start()
            child.join()
            seconds = time.perf_counter() - began
        print(f"an undisturbed build takes {seconds:.1f} s and commits {commits(sound)} files", flush=True)
        (folder / "trials").mkdir()
        jobs = [(kind, seed) for kind in ("time", "write", "repair") for seed in range(trials)]
        jobs += [(kind, seed) for kind in ("driver", "actor") for seed in range(with_ray)]
        for kind, seed in jobs:
            if kind in ("driver", "actor"):
                rows.append(ray_trial(kind, seed, folder / "trials", sound))
            else:
                rows.append(trial(kind, seed, folder / "trials", sound, seconds))
            print(rows[-1], flush=True)
        total = commits(sound)
    sums = {key: sum(row[key] for row in rows) for key in ("killed", *EFFECTS)}
    table = Table("kind", "trials", "killed", "files committed at the kill", *EFFECTS.values())
    for kind in dict.fromkeys(kind for kind, _ in jobs):
        chosen = [row for row in rows if row["kind"] == kind]
        at_kill = " ".join(str(count) for count in sorted(row["commits_at_kill"] for row in chosen if row["killed"]))
        counts = [sum(row[key] for row in chosen) for key in ("killed", *EFFECTS)]
        table.add_row(kind, str(len(chosen)), str(counts[0]), f"{at_kill} of {total}", *map(str, counts[1:]))
    Console(width=150).print(table)
    write_result(output, trials=len(rows), files_committed_by_a_build=total, **sums, rows=rows)
    if any(sums[key] for key in EFFECTS):
        raise SystemExit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
