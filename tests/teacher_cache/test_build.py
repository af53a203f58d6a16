"""The Ray Data build, and what is left when it is killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from teacher_cache.layout import SourceUtterance
from teacher_cache.verify import verify_cache

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]

DRIVER = """
import json, sys
from pathlib import Path
import ray
from teacher_cache.build import build_cache
from teacher_cache.layout import CacheSpec, MaskDraws, SourceUtterance, plan_shards
from teacher_cache.teachers import load_teacher

root, corpus = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
teacher = load_teacher("random:2x32")
spec = CacheSpec(teacher=teacher.fingerprint, num_layers=2, dim=32, layers=(1, 2), masks=MaskDraws(), codec="fp16",
                 corpus="test", shard_seconds=2.5, batch_seconds=6)
plan = plan_shards([SourceUtterance(**u) for u in corpus], spec.shard_seconds)
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print("building", flush=True)
report = build_cache(root, spec, plan, "random:2x32", teacher_name=teacher.name, actors=1,
                     on_progress=lambda p: print("done", p.shards_done, p.shards, flush=True))
print("finished", report.written, report.reused, flush=True)
"""


@pytest.fixture
def corpus(tmp_path: Path, source_utterances: list[SourceUtterance]) -> Path:
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps([asdict(u) for u in source_utterances]))
    return path


def start(root: Path, corpus: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root), str(corpus)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], prefix: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(prefix):
            return line
    pytest.fail(f"the driver ended ({process.wait()}) without printing {prefix!r}")


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def actor_pids(driver: int) -> list[int]:
    """Processes of the session that run a ShardWriter: Ray names them after the actor class."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                session = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[3])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if (
                session == driver
                and command.startswith("ray::")
                and "ShardWriter" in command.replace("_MapWorker", "ShardWriter")
            ):
                found.append(int(folder.name))
    return found


def assert_whole(root: Path, utterances: list[SourceUtterance]) -> None:
    assert verify_cache(root) == []
    for part in ("clean", "masked/draw=0"):
        ids = [
            i for path in (root / part).glob("*.parquet") for i in pq.read_table(path, columns=["id"])["id"].to_pylist()
        ]
        assert Counter(ids) == Counter(u.id for u in utterances)


def test_kills_leave_a_cache_that_finishes_with_the_same_bytes(
    tmp_path: Path, corpus: Path, source_utterances: list[SourceUtterance]
) -> None:
    undisturbed = tmp_path / "undisturbed"
    driver = start(undisturbed, corpus)
    shards = int(wait_for(driver, "finished").split()[1])
    assert driver.wait() == 0
    assert shards >= 5
    assert_whole(undisturbed, source_utterances)

    killed = tmp_path / "killed"
    # The driver dies before the first shard, after one, and after some more.
    for point in ("building", "done 1", "done 3"):
        driver = start(killed, corpus)
        wait_for(driver, point)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    # A writer that was killed mid-file leaves this behind.
    (killed / "clean" / ".part-00000.parquet.dead.tmp").write_bytes(b"half a shard")
    # A teacher actor dies; Ray starts another.
    driver = start(killed, corpus)
    wait_for(driver, "building")
    deadline = time.monotonic() + 60
    while not (victims := actor_pids(driver.pid)):
        assert time.monotonic() < deadline, "no teacher actor appeared"
        time.sleep(0.02)
    os.kill(victims[0], signal.SIGKILL)
    wait_for(driver, "finished")
    assert driver.wait() == 0
    assert_whole(killed, source_utterances)
    assert contents(killed) == contents(undisturbed)

    driver = start(killed, corpus)
    assert wait_for(driver, "finished").split() == ["finished", "0", str(shards)]
    driver.wait()
