"""Starting, stopping and reloading the service as a process."""

import io
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import torch

from ray_distill.student import Student, save_student

pytestmark = pytest.mark.server

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "serve"]


@pytest.fixture(scope="module")
def export(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export folder of a run, with a tiny student."""
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "export"
    save_student(student, folder, None)
    return folder


@contextmanager
def service(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Start the service; yield the process and its address when it listens."""
    command = [*COMMAND, *arguments, "--port", "0"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            address = next(filter(None, (re.search(r"running on (http://\S+)", line) for line in process.stderr)))[1]
            yield process, address
        finally:
            process.kill()


def tone() -> bytes:
    audio = io.BytesIO()
    soundfile.write(audio, np.sin(np.arange(16_000) / 20), 16_000, format="WAV")
    return audio.getvalue()


def damaged_mp3(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    audio = io.BytesIO()
    soundfile.write(audio, rng.normal(0, 0.1, 16_000), 16_000, format="MP3")
    data = bytearray(audio.getvalue())
    for place in rng.integers(4, len(data), 20):
        data[place] = rng.integers(256)
    return bytes(data)


def test_it_serves_until_sigterm_and_exits_cleanly(export: Path) -> None:
    audio = tone()
    with service("--model", str(export), "--max-seconds", "5") as (process, address):
        with httpx.Client(base_url=address, trust_env=False) as client:
            info = client.get("/info").json()
            assert (info["models"][0]["id"], info["limits"]["max_seconds"]) == ("tiny", 5.0)
            features = client.post("/v1/features", content=audio).json()
            assert features["shape"] == [49, info["models"][0]["dim"]]
            chunked = client.post("/v1/features", content=iter([audio[:999], audio[999:]]))
            assert chunked.json() == features
            for number in range(20):
                answer = client.post("/v1/features", content=damaged_mp3(number))
                assert answer.status_code in (200, 400)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read()
        assert process.wait(timeout=30) == 0
    # Decoders in C print nothing there.
    assert all(line.startswith("INFO:") for line in log.splitlines()), log


def test_no_request_is_lost_while_it_reloads_and_stops_under_load(student: Student, tmp_path: Path) -> None:
    """As behind a load balancer, clients send requests until /readyz answers 503. The model is replaced meanwhile."""
    model = tmp_path / "tiny"
    save_student(student, model, None)
    body = tone()
    statuses: list[int] = []
    revisions: set[str] = set()
    draining = threading.Event()

    def client_loop(address: str) -> None:
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            while not draining.is_set():
                answer = client.post("/v1/features?format=npy", content=body)
                statuses.append(answer.status_code)
                revisions.add(client.get("/info").json()["models"][0]["revision"])

    def load_balancer(address: str) -> None:
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            while client.get("/readyz").status_code == 200:
                time.sleep(0.05)
        draining.set()

    with service("--model", str(model), "--leave-seconds", "3") as (process, address), ThreadPoolExecutor(7) as pool:
        running = [pool.submit(client_loop, address) for _ in range(6)] + [pool.submit(load_balancer, address)]
        while len(statuses) < 30:
            time.sleep(0.02)
        torch.manual_seed(9)
        save_student(Student(student.config).eval(), model, None)
        process.send_signal(signal.SIGHUP)
        while len(revisions) < 2:
            time.sleep(0.02)
        count = len(statuses)
        while len(statuses) < count + 30:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        for client in running:
            client.result(timeout=60)  # Raises errors of the client, such as a reset connection.
        assert process.wait(timeout=60) == 0
    assert set(statuses) == {200}


def test_open_requests_are_answered_after_no_more_are_accepted(export: Path) -> None:
    """A request whose body is still arriving at SIGTERM is answered."""
    body = tone()
    with service("--model", str(export)) as (process, address):
        listening_ended = threading.Event()

        def slowly() -> Iterator[bytes]:
            yield body[:1000]
            # This request and the one for metrics.
            while "serve_open_requests 2.0" not in httpx.get(f"{address}/metrics", trust_env=False).text:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert listening_ended.wait(30)
            yield body[1000:]

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{address}/v1/features", content=slowly(), timeout=60, trust_env=False)
            while True:
                try:
                    httpx.get(f"{address}/healthz", trust_env=False)
                    time.sleep(0.05)
                except httpx.TransportError:
                    break
            listening_ended.set()
            assert answer.result().status_code == 200
        assert process.wait(timeout=60) == 0


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_start_reports_each_step_and_takes_little_more_than_its_imports(export: Path) -> None:
    imports = "import time, torch, torchaudio, fastapi, uvicorn; print(time.process_time())"
    imports_seconds = float(subprocess.run([sys.executable, "-c", imports], capture_output=True, check=True).stdout)
    command = [*COMMAND, "--model", str(export), "--port", "0"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        steps = (
            "Importing PyTorch",
            f"Loading the model tiny from {export}",
            "Warming up the model tiny",
            "running on http://",
        )
        lines = (line for line in process.stderr if "Starting for" not in line)
        try:
            for step in steps[:3]:
                assert step in next(lines)
            assert any(steps[3] in line for line in lines)
            assert any("Ready after" in line for line in lines)
            assert cpu_seconds(process.pid) < 2 * imports_seconds  # About equal, so on any machine.
        finally:
            process.kill()


def test_help_names_the_options() -> None:
    done = subprocess.run([*COMMAND, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--max-seconds" in done.stdout


def test_a_missing_model_folder_is_one_sentence(tmp_path: Path) -> None:
    command = [*COMMAND, "--model", str(tmp_path / "nothing")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: There is no model folder at '.*nothing': .*\.\n", done.stderr)


def test_a_folder_without_a_student_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--model", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_named_before_the_models_are_loaded(export: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--model", str(export), "--port", port],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2 and "Importing" not in done.stderr
    assert f"can't listen on port {port} of 127.0.0.1 (Address already in use)" in done.stderr


def test_an_address_of_another_machine_is_named(export: Path) -> None:
    command = [*COMMAND, "--model", str(export), "--host", "203.0.113.1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "of 203.0.113.1" in done.stderr and "--host" in done.stderr


def test_a_closed_terminal_stops_the_service(export: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [*COMMAND, "--model", str(export), "--port", "0"])
    said = b""
    while b"Ready after" not in said:
        said += os.read(terminal, 10_000)
    os.kill(pid, signal.SIGHUP)  # It comes from elsewhere, since the terminal is still open.
    time.sleep(1)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
