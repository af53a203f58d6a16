"""Training on Ray Train workers and in a Ray task: killing a worker or the driver costs time, but does not change the result."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.reader import CacheReader

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, sys
from pathlib import Path
import ray
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.ray_training import train_on_ray
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.masks import MaskDraws

job = json.loads(Path(sys.argv[1]).read_text())
ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
try:
    train_on_ray(
        StudentConfig.model_validate(job["student"]),
        TrainSettings.model_validate(job["settings"]),
        Path(job["folder"]),
        layers=(1, 2),
        cache=job["cache"],
        teacher="random:2x32",
        masks=MaskDraws(),
        utterances=[],
        as_task=job["as_task"],
    )
except (ValueError, FloatingPointError, OSError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, cache: Path, tiny: StudentConfig) -> Iterator[Start]:
    """Start drivers that train on Ray, and end those that still run after the test."""
    processes: list[subprocess.Popen[str]] = []

    def run(settings: TrainSettings, folder: Path, as_task: bool = False) -> subprocess.Popen[str]:
        job = {"student": tiny.model_dump(mode="json"), "settings": settings.model_dump(mode="json")}
        path = tmp_path / "job.json"
        path.write_text(json.dumps(job | {"folder": str(folder), "cache": str(cache), "as_task": as_task}))
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # Starts one process fewer.
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(path)],
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def undisturbed(tmp_path: Path, cache: Path, tiny: StudentConfig) -> Callable[[TrainSettings], Path]:
    """Run the same training in plain processes that are not killed."""

    def run(settings: TrainSettings) -> Path:
        mp.spawn(_rank, args=(tiny, settings, cache, tmp_path), nprocs=settings.workers)
        return tmp_path / "undisturbed"

    return run


def _rank(index: int, config: StudentConfig, settings: TrainSettings, cache: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), settings.workers)
    torch.distributed.init_process_group("gloo", store=store, rank=index, world_size=settings.workers)
    readers = CacheReader(cache, "train"), CacheReader(cache, "validation")
    rank = Rank(index, settings.workers)
    train(config, settings, *readers, folder / "undisturbed", rank=rank, wrap=DistributedDataParallel)
    torch.distributed.destroy_process_group()


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until the run's metrics have a training row of this step."""
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        if any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n")):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within two minutes")


def descendants(pid: int) -> dict[int, str]:
    """Return the command of each descendant process."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit():
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue  # The process has ended.
    found: set[int] = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: commands.get(child, "") for child in found - {pid}}


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]


def starts(run: Path) -> int:
    """Return how often a run was started or continued."""
    return len(list((run / "tensorboard").iterdir()))


def test_a_killed_worker_changes_nothing(
    tmp_path: Path,
    settings: Callable[..., TrainSettings],
    start: Start,
    undisturbed: Callable[[TrainSettings], Path],
    assert_same_end: Callable[[Path, Path], None],
) -> None:
    options = settings(workers=2, batch_size=2, max_steps=90, checkpoint_every=10, validate_every=40, ema_decay=0.9)
    chance = random.Random(0)
    run = tmp_path / "killed"
    process = start(options, run)
    wait_for_step(process, run, chance.randrange(12, 70))
    workers = [pid for pid, command in descendants(process.pid).items() if "RayTrainWorker" in command]
    assert len(workers) == 2
    os.kill(chance.choice(sorted(workers)), signal.SIGKILL)
    assert not (run / "train.json").exists()
    finish(process)
    assert starts(run) == 2
    assert_same_end(run, undisturbed(options))


def test_a_killed_driver_changes_nothing(
    tmp_path: Path,
    settings: Callable[..., TrainSettings],
    start: Start,
    readers: tuple[CacheReader, CacheReader],
    tiny: StudentConfig,
    assert_same_end: Callable[[Path, Path], None],
) -> None:
    options = settings(batch_size=2, max_steps=200, checkpoint_every=7, validate_every=80)
    run = tmp_path / "killed"
    process = start(options, run, as_task=True)
    wait_for_step(process, run, random.Random(1).randrange(10, 150))
    process.kill()
    process.wait()
    assert not (run / "train.json").exists()
    finish(start(options, run, as_task=True))
    assert starts(run) == 2
    train(tiny, options, *readers, tmp_path / "undisturbed")
    assert_same_end(run, tmp_path / "undisturbed")


def test_what_goes_wrong_in_a_worker_is_one_sentence(
    tmp_path: Path, settings: Callable[..., TrainSettings], start: Start
) -> None:
    run = tmp_path / "run"
    options = settings(learning_rate=1e30, warmup_fraction=0.0, max_steps=50, validate_every=50)
    process = start(options, run)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "FloatingPointError: the loss was not finite in 10 steps in a row, up to step" in errors.splitlines()[-1]
    # A restart would have failed again.
    assert starts(run) == 1
