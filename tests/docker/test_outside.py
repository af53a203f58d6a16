"""The CPU image without a container engine: the lines of the Dockerfile in clean folders, then the commands of compose.yaml.

This installs gigabytes, so it runs only on request: ``TEST_IMAGE_INSTALL=1 pytest tests/docker/test_outside.py``.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import yaml

from ..cluster.ray_head import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
SERVICES = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not os.environ.get("TEST_IMAGE_INSTALL"), reason="installs gigabytes: set TEST_IMAGE_INSTALL=1"),
]


@dataclass(frozen=True)
class Image:
    """A substitute for the image: its /opt/venv, its /data, and the environment of its commands."""

    venv: Path
    data: Path
    environment: dict[str, str]

    def here(self, text: str) -> str:
        """Return a command of the image with the paths of this machine."""
        return text.replace("/opt/venv", str(self.venv)).replace("/data", str(self.data))

    @contextmanager
    def running(self, service: str, ports: dict[str, str]) -> Iterator[str]:
        """Run a service of compose.yaml on other ports. Yield its health address once the image's own check passes."""
        # Without workers, the head needs their cores too.
        chosen = {"HEAD_CPUS": "3"}
        words = [
            self.here(re.sub(r"\$\{(\w+):-(\w+)}", lambda found: chosen.get(found[1], found[2]), word))
            for word in SERVICES[service]["command"]
        ]
        # Not every machine has the container's amount of shared memory.
        words = [re.sub("^(--object-store-memory)=.*", r"\1=200000000", word) for word in words]
        url = SERVICES[service].get("environment", {}).get("HEALTH_URL", "http://127.0.0.1:8000/readyz")
        for port in filter(str.isdigit, ports):
            words, url = [word.replace(port, ports[port]) for word in words], url.replace(port, ports[port])
        if service == "head":
            # A container has its own ports.
            words += [
                f"--{name}-port={ports[name]}" for name in ("dashboard", "dashboard-agent-listen", "ray-client-server")
            ]
        with (self.data / f"{service}.log").open("w") as log:
            process = subprocess.Popen(
                words, env=self.environment, cwd=self.data, stdout=log, stderr=log, start_new_session=True
            )
        try:
            give_up = time.monotonic() + 120
            check = [str(self.venv / "bin" / "python"), str(DOCKER / "healthcheck.py")]
            while subprocess.run(check, env=self.environment | {"HEALTH_URL": url}, capture_output=True).returncode:
                assert process.poll() is None and time.monotonic() < give_up, (self.data / f"{service}.log").read_text()
                time.sleep(1)
            yield url
        finally:
            process.terminate()  # `ray start --block` stops its own processes.
            process.wait(60)


def lines_of(stage: str) -> list[str]:
    """Return a stage's instructions with continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    body = re.search(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    assert body, stage
    return [line for line in body[1].splitlines() if re.match("[A-Z]+ ", line)]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Run the RUN and COPY instructions of the stages ``build`` and ``build-cpu`` in order."""
    root = tmp_path_factory.mktemp("image")
    source, tools = root / "source", root / "tools"
    source.mkdir()
    (root / "data").mkdir()
    venv.create(tools, with_pip=True)  # Stands for the base image's Python, which has pip.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON", "VIRTUAL"))}
    built = Image(root / "venv", root / "data", environment | {"PATH": f"{tools / 'bin'}:{os.environ['PATH']}"})
    allowed = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")]
    for line in [*lines_of("build"), *lines_of("build-cpu")]:
        kind, _, rest = line.partition(" ")
        if kind == "COPY":
            *names, target = rest.split()
            for name in allowed if names == ["."] else names:
                place = source / (name if names == ["."] or target.endswith("/") else target)
                place.parent.mkdir(parents=True, exist_ok=True)
                if (REPOSITORY / name).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(REPOSITORY / name, place, ignore=ignored, dirs_exist_ok=True)
                else:
                    shutil.copyfile(REPOSITORY / name, place if target != "./" else source / name)
        elif kind == "RUN":
            # CPU builds of PyTorch are on a separate index that may be unreachable in tests. The cache saves downloads.
            command = (
                built.here(rest)
                .replace("--torch-backend=cpu", "")
                .replace("--no-cache-dir", "")
                .replace("--no-cache", "")
            )
            done = subprocess.run(
                ["sh", "-ec", command], cwd=source, env=built.environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        else:
            assert kind == "WORKDIR" and rest == "/source", line
    token = root / "ray-token"
    token.write_text("a-token-of-this-test-0123456789abcdef")
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    path = f"{built.venv / 'bin'}:{os.environ['PATH']}"
    return Image(built.venv, built.data, environment | ray | {"PATH": path})


def test_nothing_but_what_is_pinned_is_installed(image: Image) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(image.venv / "bin" / "python"), "list", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    installed = {re.sub("[-_.]+", "-", p["name"]).lower(): p["version"] for p in json.loads(listed.stdout)}
    # Some packages have a pin per version of Python.
    pins = set(re.findall(r"^([\w.-]+)(?:\[.*])?==(\S+)", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE))
    assert {item for item in installed.items() if item[0] != "ray-distill"} <= pins
    assert not {"pytest", "mypy", "mkdocs", "playwright"} & installed.keys(), "development tools are in the image"


def test_head_job_and_service_as_compose_runs_them(image: Image) -> None:
    names = ("6379", "8265", "8080", "8000", "dashboard-agent-listen", "ray-client-server")
    ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
    ports["dashboard"] = ports["8265"]
    speech = image.data / "corpora" / "mine" / "train-tones" / "1" / "2"
    speech.mkdir(parents=True)
    for number in range(8):
        wave = 0.3 * np.sin(np.arange(16_000 * 2) / (20 + number))
        name = f"{speech.parent.name}-{number}.flac"
        soundfile.write(speech / name, wave, 16_000)
    with image.running("head", ports):
        command = ["ray-distill", "--config", "demo", "corpus.path=/data/corpora/mine", "runs=/data/runs"]
        command += ["cache.path=/data/caches/mine", "teacher.checkpoint=random:2x32", "train.max_steps=4"]
        done = subprocess.run(
            [str(image.venv / "bin" / command[0]), *map(image.here, command[1:])],
            cwd=image.data,
            env=image.environment | {"RAY_ADDRESS": f"127.0.0.1:{ports['6379']}", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with image.running("serve", ports) as url:
        (model,) = httpx.get(url.replace("readyz", "v1/models")).json()["data"]
        assert model["id"] == "demo" and model["layers"] == 2
        assert httpx.get(url.replace("readyz", "")).text.startswith("<!doctype html>")
