"""A small student, served in this process and under Ray Serve."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from ray_distill.serve import create_app
from ray_distill.serve.settings import Limits
from ray_distill.student import Student, save_student

from ..tiny import tiny_student

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_BYTES = 2**20
MAX_SECONDS = 20.0
LIBRARY_LOADED = 2
RAY_FOLDER = "RAY_DISTILL_TEST_FOLDER"
"""Environment variable of all processes of a service under Ray Serve."""
TINY = tiny_student(encoder_layers=3)


@pytest.fixture(scope="session")
def student() -> Student:
    """A student with three layers of dimension 16 and seeded random weights."""
    torch.manual_seed(0)
    return Student(TINY).eval()


@pytest.fixture(scope="session")
def other() -> Student:
    """Another revision of the student."""
    torch.manual_seed(1)
    return Student(TINY).eval()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs, of which two can be loaded at once."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(3):
        torch.manual_seed(10 + number)
        save_student(Student(TINY).eval(), folder / f"run-{number}" / "export", None)
    return folder


@pytest.fixture(scope="session")
def app_client(student: Student, other: Student, library: Path) -> Iterator[TestClient]:
    """The application in this process."""
    limits = Limits(max_seconds=MAX_SECONDS, max_bytes=MAX_BYTES)
    app = create_app(
        student, name="tiny", more={"other": other}, library=library, library_loaded=LIBRARY_LOADED, limits=limits
    )
    # Errors of the service must become responses, as they do for users.
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def ray_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the service under Ray Serve; it is in the environment of its processes."""
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="session")
def ray_client(student: Student, other: Student, library: Path, ray_folder: Path) -> Iterator[httpx.Client]:
    """The same application under Ray Serve, deployed with the file in docs/in-depth/serving.md, with paths and sizes for the tests."""
    folder = ray_folder
    for name, model in (("tiny", student), ("other", other)):
        save_student(model, folder / "runs" / name / "export", None)
    arguments: dict[str, Any] = {"library": str(library), "library_loaded": LIBRARY_LOADED}
    arguments["more"] = {"other": str(folder / "runs/other/export")}
    with (
        ray_serve(folder, str(folder / "runs" / "tiny" / "export"), **arguments) as address,
        httpx.Client(base_url=address, trust_env=False, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="session", params=["app", pytest.param("ray", marks=pytest.mark.ray)])
def client(request: pytest.FixtureRequest) -> Any:
    """Both clients in turn, so that a test runs against both."""
    return request.getfixturevalue(f"{request.param}_client")


@contextmanager
def ray_serve(folder: Path, model: str, **arguments: Any) -> Iterator[str]:
    """Run the file in docs/in-depth/serving.md with ``serve run``; yield the address when the service is ready."""
    import yaml

    text = (REPOSITORY / "docs" / "in-depth" / "serving.md").read_text()
    (block,) = re.findall(r"^    # features.yaml\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    tree = yaml.safe_load(re.sub(r"^    ", "", block, flags=re.MULTILINE))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tree["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = tree["applications"]
    limits = {"max_seconds": MAX_SECONDS, "max_bytes": MAX_BYTES}
    application["args"] |= {"model": model, "limits": limits} | arguments
    application["deployments"][0] |= {"ray_actor_options": {"num_cpus": 0.1}}
    application["deployments"][0]["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
    file = folder / "features.yaml"
    file.write_text(yaml.safe_dump(tree))
    # The path must be short, because Ray puts sockets below it.
    with tempfile.TemporaryDirectory(prefix="rs", ignore_cleanup_errors=True) as scratch:
        environment = os.environ | {
            "RAY_TMPDIR": scratch,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ray_distill.serve.ray_proxy.middlewares",
            RAY_FOLDER: str(folder),
        }
        command = [str(Path(sys.executable).parent / "serve"), "run", "--address", "local", str(file)]
        log = folder / "serve.log"
        address = f"http://127.0.0.1:{port}"
        # Ray has fixed timeouts for starting its processes, which a busy machine may exceed.
        for last in (False, False, True):
            with log.open("w") as output:
                process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
            if _is_ready(process, address):
                break
            process.kill()
            process.wait()
            assert not last, log.read_text()
        try:
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def _is_ready(process: subprocess.Popen[bytes], address: str) -> bool:
    """Wait until the service is ready; return False if it exits first or needs more than five minutes."""
    give_up = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/readyz", trust_env=False, timeout=30).status_code == 200:
                return True
        time.sleep(0.5)
    return False
