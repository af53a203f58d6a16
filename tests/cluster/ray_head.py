"""A Ray head with authentication on free ports. It stops with its test and does not affect other Ray instances on this machine."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running Ray head.

    Attributes:
        address: Address of the dashboard, which accepts jobs.
        gcs: Address that workers connect to.
        metrics: Address of the metrics exporter.
        environment: Environment variables of commands for this head, with the token.
        folder: Folder with Ray's files.
    """

    address: str
    gcs: str
    metrics: str
    environment: dict[str, str]
    folder: Path

    def command(
        self, *arguments: str, cwd: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run one of this environment's programs against the head."""
        program = [str(BIN / arguments[0]), *arguments[1:]]
        return subprocess.run(program, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def get(self, path: str, token: bool = True) -> str:
        """Return an answer of the dashboard; raise HTTPError if it refuses the request."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"} if token else {}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=30) as answer:
            return answer.read().decode()

    def metric_values(self) -> dict[str, float]:
        """Return the exporter's current values by name, summed over labels."""
        with urllib.request.urlopen(self.metrics, timeout=30) as answer:
            samples = re.findall(r"^(ray_[a-z0-9_]+)(?:{.*})? (\S+)$", answer.read().decode(), re.MULTILINE)
        values: dict[str, float] = {}
        for name, value in samples:
            values[name] = values.get(name, 0.0) + float(value)
        return values

    def status(self, job: str) -> str:
        """Return the status of a job: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return str(json.loads(self.get(f"/api/jobs/{job}"))["status"])

    def logs(self, job: str) -> str:
        """Return the output of a job."""
        return str(json.loads(self.get(f"/api/jobs/{job}/logs"))["logs"])

    def wait(
        self, job: str, *, until: tuple[str, ...] = ("SUCCEEDED", "FAILED", "STOPPED"), seconds: float = 300
    ) -> str:
        """Wait until the job has one of these statuses, and return it."""
        give_up = time.monotonic() + seconds
        while (status := self.status(job)) not in until:
            assert time.monotonic() < give_up, f"{job} is still {status}:\n{self.logs(job)}"
            time.sleep(0.5)
        return status


def free_ports(number: int) -> list[int]:
    """Return unused ports below the range from which the system assigns ports."""
    sockets, ports = [], []
    for port in range(21_000 + os.getpid() % 5_000, 32_000):
        probe = socket.socket()
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            probe.close()
            continue
        sockets.append(probe)
        ports.append(port)
        if len(ports) == number:
            break
    for probe in sockets:
        probe.close()
    return ports


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start the process, and return it once Ray runs or the process has ended."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    while process.poll() is None and "Ray runtime started" not in log.read_text():
        time.sleep(0.5)
    return process


@contextmanager
def ray_head(token: str, cpus: int = 4) -> Iterator[Head]:
    """Run ``ray start --head --block`` with a token, as compose.yaml does, until the with-block ends."""
    gcs, dashboard, metrics, agent, client = free_ports(5)
    # A short path, since that of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rh"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "200",
    }
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"),
        *("--node-ip-address=127.0.0.1", "--include-dashboard=true", f"--metrics-export-port={metrics}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *(f"--num-cpus={cpus}", "--object-store-memory=200000000", f"--temp-dir={folder}"),
    ]
    address = f"http://127.0.0.1:{dashboard}"
    head = Head(
        address,
        f"127.0.0.1:{gcs}",
        f"http://127.0.0.1:{metrics}/metrics",
        environment | {"RAY_API_SERVER_ADDRESS": address},
        folder,
    )
    try:
        # Ray stops a node that takes more than 30 s to start, so a busy machine may need a second attempt.
        for _ in range(3):
            process = _start(command, environment, folder / "start.log")
            if process.poll() is None:
                break
        else:
            raise RuntimeError(f"Ray did not start: {(folder / 'start.log').read_text()}")
        yield head
    finally:
        # `ray stop` would stop every Ray on this machine. `ray start --block` stops its own processes; the rest are recognised by
        # their folder.
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for left in psutil.process_iter(["cmdline"]):
            if any(str(folder) in part for part in left.info["cmdline"] or []):
                with suppress(psutil.NoSuchProcess):
                    left.kill()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
