"""The command lines in docs/in-depth/serving.md and the Python client, against a running service."""

import asyncio
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import uvicorn
import websockets.sync.client as websockets

from ray_distill.serve import create_app
from ray_distill.serve.client import AsyncClient, Client, RefusedError
from ray_distill.student import Student

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "in-depth" / "serving.md"
HOW_TO = DOCUMENT.parents[1] / "how-to" / "caller.md"
LINES = re.findall(r"^    (curl .*?)(?:  +#.*)?$", DOCUMENT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def address(student: Student) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(student, name="demo"), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.flac"
    soundfile.write(path, np.sin(np.arange(16_000) / 20), 16_000)
    return path


def test_the_document_has_lines() -> None:
    assert len(LINES) >= 14


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("line", LINES)
def test_each_curl_line_works(line: str, address: str, speech: Path) -> None:
    command = line.replace("http://127.0.0.1:8000", address).replace(
        "curl ", "curl --fail-with-body -sS --noproxy '*' ", 1
    )
    done = subprocess.run(["bash", "-c", command], cwd=speech.parent, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done
    written = [path for path in speech.parent.iterdir() if path != speech]
    assert (written[0].stat().st_size > 0) if "-o" in line else done.stdout


@pytest.mark.skipif(shutil.which("nginx") is None or shutil.which("openssl") is None, reason="needs nginx and openssl")
def test_the_nginx_example_works(address: str, speech: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"^    # nginx.conf.*\n((?:    .*\n)+)", DOCUMENT.read_text(), re.MULTILINE)
    with socket.socket() as probe, socket.socket() as unused:
        probe.bind(("127.0.0.1", 0))
        unused.bind(("127.0.0.1", 0))
        port, closed = probe.getsockname()[1], unused.getsockname()[1]
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run(
        [*certificate, "-keyout", tmp_path / "key", "-out", tmp_path / "pem"], check=True, capture_output=True
    )
    block = block.replace("listen 443", f"listen 127.0.0.1:{port}").replace("32m", "100k")
    block = block.replace("/etc/ssl/features.pem", f"{tmp_path}/pem").replace(
        "/etc/ssl/features.key", f"{tmp_path}/key"
    )
    block = block.replace("http://127.0.0.1:8000", address)
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    block = block.replace("limit_conn addresses 32", "limit_conn addresses 2")
    gone = f"location = /healthz {{ proxy_pass http://127.0.0.1:{closed}; }} location / {{"  # A service that does not answer.
    block = block.replace("location / {", gone, 1)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/log; events {{}} http {{ access_log off; {temporary}\n{block} }}"
    )
    with subprocess.Popen(["nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "log"]) as process:
        try:
            trusting = ssl.create_default_context(cafile=tmp_path / "pem")
            trusting.check_hostname = False
            with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=False, trust_env=False) as client:
                for _ in range(200):
                    with suppress(httpx.TransportError):
                        client.get("/readyz")
                        break
                    time.sleep(0.05)
                answer = client.post("/v1/features", content=speech.read_bytes(), headers={"x-request-id": "mine"})
                assert answer.json()["shape"] == [49, 16] and len(answer.headers["x-request-id"]) == 32
                large = client.post("/v1/features", content=b"x" * 200_000)
                assert (large.status_code, large.json()["error_type"]) == (413, "too_large")
                idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
                half = [trusting.wrap_socket(one) for one in idle]
                for one in half:
                    one.sendall(b"POST /v1/features HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
                time.sleep(0.2)
                busy = client.get("/readyz")
                assert (busy.status_code, busy.json()["error_type"]) == (429, "overloaded")
                assert busy.headers["retry-after"] == "1"
                for one in half:
                    one.close()
                down = client.get("/healthz")
                assert (down.status_code, down.json()["error_type"]) == (503, "not_ready")
            with websockets.connect(f"wss://127.0.0.1:{port}/v1/features/stream", ssl=trusting, proxy=None) as stream:
                assert json.loads(stream.recv())["model"] == "demo"
                stream.send("end")
                assert json.loads(stream.recv())["error_type"] == "too_short"
        finally:
            process.terminate()
            process.wait(20)


def test_the_stream_of_the_how_to_works(address: str, speech: Path) -> None:
    """The example runs as it is, against Uvicorn, but for the address."""
    (block,) = re.findall(r"^```python\n([^`]*websockets[^`]*)^```", HOW_TO.read_text(), re.MULTILINE)
    soundfile.write(speech, np.sin(np.arange(50_000) / 20), 16_000)
    code = block.replace("ws://127.0.0.1:8000", address.replace("http", "ws"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=speech.parent, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.splitlines() == [
        "75 frames from frame 0",
        "50 frames from frame 75",
        "31 frames from frame 125",
    ], done


def test_the_client_sync_and_async(address: str, speech: Path) -> None:
    files = [speech.read_bytes()] * 2
    with Client(address) as client:
        features, vectors = client.features(files, layer="all"), client.embeddings(files, pooling="mean_std")
        with pytest.raises(RefusedError, match="no layer") as refused:
            client.features(files, layer=9)
    assert (refused.value.status, refused.value.error_type) == (422, "bad_layer")

    async def both() -> tuple[list[np.ndarray], np.ndarray]:
        async with AsyncClient(address) as client:
            return await client.features(files, layer="all"), await client.embeddings(files, pooling="mean_std")

    again, vectors_again = asyncio.run(both())
    assert [item.shape for item in features] == [(3, 49, 16)] * 2 and vectors.shape == (2, 32)
    np.testing.assert_allclose(again[0], features[0], atol=1e-5 * np.abs(features[0]).max())
    np.testing.assert_allclose(vectors_again, vectors, atol=1e-4)


def test_the_client_refuses_what_is_no_list_of_bytes() -> None:
    with Client("http://127.0.0.1:9") as client:
        for files in ("speech.flac", b"RIFF", ["speech.flac"], [Path("speech.flac")]):
            with pytest.raises(TypeError, match="files must be a list of the contents of audio files, such as"):
                client.features(files)  # type: ignore[arg-type]


def test_the_client_reads_any_retry_after() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    for header, seconds in (("7", 7), (soon, 90), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("later", None)):
        refused = RefusedError(httpx.Response(503, headers={"retry-after": header}))
        assert refused.retry_after == (None if seconds is None else pytest.approx(seconds, abs=5))
    assert RefusedError(httpx.Response(503)).retry_after is None
