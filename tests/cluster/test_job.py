"""The README's ``ray job submit --working-dir .`` on tiny speech, with a Ray head that requires authentication."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.storage.cache import Cache

from ..tiny import tiny_student
from .ray_head import BIN, Head, free_ports, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-this-test-0123456789abcdef"
METRICS = Path(__file__).resolve().parents[1] / "docker" / "ray_metrics.txt"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(TOKEN) as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository as git has it, with large data that must not be uploaded with the code."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    for name in ("runs/other", "caches/demo", "corpora/demo"):
        (folder / name).mkdir(parents=True)
        (folder / name / "big.bin").write_bytes(os.urandom(3 * 2**20))
    return folder


def submit(head: Head, checkout: Path, speech: Path, output: Path, job: str, *more: str) -> None:
    """Return the README's command, with absolute paths that every node can reach."""
    done = head.command(
        *("ray", "job", "submit", "--no-wait", "--submission-id", job, "--working-dir", ".", "--"),
        *("python", "pipeline/run.py", "--config", "configs/demo.yaml"),
        *(f"corpus.path={speech}", f"cache.path={output / 'cache'}", f"runs={output / 'runs'}"),
        *("teacher.checkpoint=random:2x32", "cache.shard_minutes=0.05", "train.batch_seconds=8"),
        *("train.workers=2", "train.validate_every=5", "train.log_every=1", *more),
        cwd=checkout,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_the_token_nobody_gets_in(head: Head, checkout: Path) -> None:
    for path in ("/api/jobs/", "/nodes?view=summary"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            head.get(path, token=False)
        assert refused.value.code in (401, 403)
    wrong = replace(head, environment=head.environment | {"RAY_AUTH_TOKEN": "wrong" * 8})
    done = wrong.command("ray", "job", "list")
    assert done.returncode != 0


def test_health_checks_of_the_images_work_with_authentication_on(head: Head) -> None:
    for url, code in ((f"{head.address}/api/gcs_healthz", 0), (f"{head.address}/api/jobs/", 1)):
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "docker" / "healthcheck.py")], env=os.environ | {"HEALTH_URL": url}
        )
        assert done.returncode == code, url


def test_a_worker_joins_with_the_token_only(head: Head) -> None:
    """Run a worker with the command and the health check of compose.yaml."""
    agent = free_ports(1)[0]
    command = [
        *(str(BIN / "ray"), "start", "--block", f"--address={head.gcs}", "--num-cpus=1"),
        f"--dashboard-agent-listen-port={agent}",
    ]
    wrong = head.environment | {"RAY_AUTH_TOKEN": "wrong" * 8}
    refused = subprocess.run(command, env=wrong, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    worker = subprocess.Popen(command, env=head.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{agent}/api/local_raylet_healthz"
        check = [sys.executable, str(REPOSITORY / "docker" / "healthcheck.py")]
        give_up = time.monotonic() + 240
        while subprocess.run(check, env=os.environ | {"HEALTH_URL": url}, capture_output=True).returncode != 0:
            assert worker.poll() is None and time.monotonic() < give_up
            time.sleep(0.5)
        nodes = json.loads(head.get("/nodes?view=summary"))["data"]["summary"]
        assert [node["raylet"]["state"] for node in nodes] == ["ALIVE", "ALIVE"]
    finally:
        worker.terminate()
        worker.wait(60)


def watched(head: Head, job: str) -> tuple[str, dict[str, float]]:
    """Return a job's final status, and the exporter's last value of each name, since a trainer's values disappear with it."""
    give_up = time.monotonic() + 800
    values: dict[str, float] = {}
    while (status := head.status(job)) in ("PENDING", "RUNNING"):
        assert time.monotonic() < give_up, head.logs(job)
        values |= head.metric_values()
        time.sleep(0.5)
    return status, values | head.metric_values()


def test_job_is_cancelled_and_goes_on(head: Head, checkout: Path, speech_folder: Path, tmp_path: Path) -> None:
    count = 100  # Enough steps to stop the job in time on a busy machine: `ray job stop` alone takes seconds to start.
    steps = f"train.max_steps={count}"
    submit(head, checkout, speech_folder, tmp_path, "first", steps)
    run = tmp_path / "runs" / "demo"
    # The first job is cancelled during training, after a checkpoint.
    give_up = time.monotonic() + 800
    names: set[str] = set()
    while not (run / "checkpoints" / "last").exists():
        status = head.status("first")
        assert status in ("PENDING", "RUNNING") and time.monotonic() < give_up, f"{status}:\n{head.logs('first')}"
        names |= set(head.metric_values())
        time.sleep(0.3)
    stopped = head.command("ray", "job", "stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert head.wait("first") == "STOPPED"
    names |= set(head.metric_values())
    before = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines() if row.endswith("}")]
    reached = max(row["step"] for row in before)
    assert 0 < reached < count, "the job was not cancelled in time"
    cache = Cache.open(tmp_path / "cache")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.parquet")}
    assert written and not cache.missing()
    assert not (run / "train.json").exists()

    submit(head, checkout, speech_folder, tmp_path, "second", steps)
    status, exported = watched(head, "second")
    assert status == "SUCCEEDED", head.logs("second")
    names |= set(exported)
    log = head.logs("second")
    # The job's log has a line for each stage, tells what was reused, and ends with the summary.
    for text in ("12 utterances", "all shards exist, reused", f"{count} steps in", "export", "report at"):
        assert text in log, log
    assert "Traceback" not in log
    assert {path: path.stat().st_mtime_ns for path in written} == written, "shards were built again"
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    steps_trained = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps_trained == list(range(1, count + 1)), "steps are missing or repeated"
    # The outputs survive the job. Its working directory was a copy of only the code.
    assert (run / "export" / "model.safetensors").is_file() and (run / "report.html").is_file()
    assert verify_cache(tmp_path / "cache") == []
    packages = list(head.folder.rglob("runtime_resources/working_dir_files/*"))
    folders = [path for path in packages if path.is_dir()]
    assert folders
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert size < 10 * 2**20, f"{size / 2**20:.1f} MiB were uploaded"
        assert not list(folder.rglob("big.bin")), "data was uploaded"
    listed = head.command("ray", "job", "list").stdout
    assert "first" in listed and "second" in listed
    # The dashboard lists the jobs with their commands and final statuses.
    jobs = {job["submission_id"]: job for job in json.loads(head.get("/api/jobs/")) if job["submission_id"]}
    assert jobs["first"]["status"] == "STOPPED" and jobs["second"]["status"] == "SUCCEEDED"
    assert "pipeline/run.py" in jobs["second"]["entrypoint"]
    if os.environ.get("WRITE_RAY_METRICS"):
        METRICS.write_text("\n".join(sorted(names)) + "\n")
    # Grafana's dashboard in docker/ reads these metrics; a name that Ray no longer exports would leave a panel empty.
    recorded = set(METRICS.read_text().split())
    assert {"ray_node_cpu_utilization", "ray_actors", "ray_tasks"} <= names & recorded
    assert {name for name in names if "distill" in name} == {name for name in recorded if "distill" in name}
    # Our own metrics count the work of actors that have ended, and count it once, since the second job reused the cache.
    shards = Cache.open(tmp_path / "cache").shards
    assert exported["ray_distill_cache_utterances_total"] == 12
    assert exported["ray_distill_cache_audio_seconds_total"] == pytest.approx(sum(s.seconds for s in shards))
    shard_files = [path for path in written if path.name.startswith("part-")]  # The driver writes the plan.
    assert exported["ray_distill_cache_bytes_total"] == sum(path.stat().st_size for path in shard_files)
    assert exported["ray_distill_cache_shard_seconds_count"] == len(shards)
    assert exported["ray_distill_cache_teacher_seconds_total"] > 0
    assert exported["ray_distill_train_steps"] == count
    assert reached < exported["ray_distill_train_step"] <= count
    for kind, field, name, factor in (
        ("train", "loss", "loss", 1),
        ("train", "learning_rate", "learning_rate", 1),
        ("train", "data_wait", "data_wait_share", 1),
        ("train", "audio_hours_per_minute", "audio_seconds_per_second", 60),
        ("validation", "loss", "validation_loss", 1),
    ):
        recorded_values = [row[field] * factor for row in rows if row["kind"] == kind]
        assert any(exported[f"ray_distill_train_{name}"] == pytest.approx(value) for value in recorded_values), name


def test_relative_paths_are_refused(head: Head, checkout: Path, tmp_path: Path, speech_folder: Path) -> None:
    submit(head, checkout, speech_folder, tmp_path, "relative", "runs=runs")
    assert head.wait("relative") == "FAILED"
    assert re.search(r"runs: runs is relative, but a Ray job runs in a copy", " ".join(head.logs("relative").split()))


def test_service_runs_under_serve(head: Head, checkout: Path, tmp_path: Path) -> None:
    """The RayService's import path, once deployed, gives the same answers as the plain application."""
    from fastapi.testclient import TestClient

    from ray_distill.serve import create_app
    from ray_distill.student import Student, save_student

    export = tmp_path / "runs" / "tiny" / "export"
    save_student(Student(tiny_student()).eval(), export)
    port = head.address.rsplit(":", 1)[1]
    script = tmp_path / "ask.py"
    script.write_text(
        "import sys, httpx, ray, pathlib\n"
        "from ray import serve\n"
        "from ray_distill.serve.deployment import build\n"
        "model, audio, port = sys.argv[1:]\n"
        "serve.start(http_options={'host': '127.0.0.1', 'port': int(port)})\n"
        "serve.run(build({'model': model}), route_prefix='/')\n"
        "answer = httpx.post(f'http://127.0.0.1:{port}/v1/features', content=pathlib.Path(audio).read_bytes(), timeout=60)\n"
        "assert answer.status_code == 200, answer.text\n"
        "print('ANSWER', answer.text)\n"
        "serve.shutdown()\n"
    )
    import numpy as np
    import soundfile

    audio = tmp_path / "tone.flac"
    soundfile.write(audio, 0.1 * np.sin(np.arange(16_000) / 20), 16_000)
    done = head.command(
        *("ray", "job", "submit", "--submission-id", "service", "--working-dir", ".", "--"),
        *("python", str(script), str(export), str(audio), str(int(port) + 500)),
        cwd=checkout,
    )
    assert head.status("service") == "SUCCEEDED", done.stdout + done.stderr + head.logs("service")
    served = json.loads(re.search(r"^ANSWER (.*)$", head.logs("service"), re.MULTILINE)[1])  # type: ignore[index]
    plain = TestClient(create_app(export)).post("/v1/features", content=audio.read_bytes()).json()
    assert served == plain
