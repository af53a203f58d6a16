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
teacher = load_teacher("random:3x160")
spec = CacheSpec(teacher=teacher.fingerprint, num_layers=3, dim=160, layers=(1, 2, 3), masks=MaskDraws(draws=3), codec="fp16",
                 corpus="test", shard_seconds=0.5, batch_seconds=6)
plan = plan_shards([SourceUtterance(**u) for u in corpus], spec.shard_seconds)
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print("building", flush=True)
report = build_cache(root, spec, plan, "random:3x160", teacher_name=teacher.name, actors=1,
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


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def teacher_actors(driver: int) -> list[int]:
    """Descendants of the driver that run a ShardWriter: Ray puts the class into the process's title."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            pid = int(folder.name)
            if title.startswith("ray::") and "ShardWriter" in title:
                while pid not in (driver, 0):
                    pid = parent(pid)
                if pid == driver:
                    found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found


def assert_whole(root: Path, utterances: list[SourceUtterance]) -> None:
    assert verify_cache(root) == []
    for part in ("clean", *(f"masked/draw={draw}" for draw in range(3))):
        ids = [
            i for path in (root / part).glob("*.parquet") for i in pq.read_table(path, columns=["id"])["id"].to_pylist()
        ]
        assert Counter(ids) == Counter(u.id for u in utterances)


def commits(root: Path) -> int:
    return len(list((root / "commits").glob("part-*.json")))


def test_kills_leave_a_cache_that_finishes_with_the_same_bytes(
    tmp_path: Path, corpus: Path, source_utterances: list[SourceUtterance]
) -> None:
    undisturbed = tmp_path / "undisturbed"
    driver = start(undisturbed, corpus)
    shards = int(wait_for(driver, "finished").split()[1])
    assert driver.wait() == 0
    assert shards == len(source_utterances)
    assert_whole(undisturbed, source_utterances)
    expected = contents(undisturbed)

    # The driver dies before the first shard, and after some more. Its actors may live on for a moment, beside the next's.
    killed = tmp_path / "killed"
    for wanted in (0, 1, 4):
        driver = start(killed, corpus)
        wait_for(driver, "building")
        deadline = time.monotonic() + 120
        while commits(killed) < wanted:
            assert time.monotonic() < deadline, "no shard was written"
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert commits(killed) < shards, "the kills came too late to test anything"
    # A writer that was killed mid-file leaves this behind.
    (killed / "clean").mkdir(exist_ok=True)
    (killed / "clean" / ".part-00000.parquet.dead.tmp").write_bytes(b"half a shard")
    driver = start(killed, corpus)
    wait_for(driver, "finished")
    assert driver.wait() == 0
    assert_whole(killed, source_utterances)
    assert contents(killed) == expected

    # A teacher actor dies in the middle; Ray starts another.
    robbed = tmp_path / "robbed"
    driver = start(robbed, corpus)
    wait_for(driver, "building")
    while commits(robbed) < 2:
        time.sleep(0.01)
    victims = teacher_actors(driver.pid)
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    assert commits(robbed) < shards
    wait_for(driver, "finished")
    assert driver.wait() == 0
    assert_whole(robbed, source_utterances)
    assert contents(robbed) == expected

    driver = start(robbed, corpus)
    assert wait_for(driver, "finished").split() == ["finished", "0", str(shards)]
    driver.wait()
