"""The command lines in docs/serving.md and the Python client, against a running service."""

import asyncio
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import uvicorn

from ray_distill.serve import create_app
from ray_distill.serve.client import AsyncClient, Client, RefusedError
from ray_distill.student import Student

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
LINES = re.findall(r"^    (curl .*?)(?:  +#.*)?$", DOCUMENT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def address(student: Student) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(student, name="tiny"), log_level="warning"))
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


def test_the_client_reads_any_retry_after() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    for header, seconds in (("7", 7), (soon, 90), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("later", None)):
        refused = RefusedError(httpx.Response(503, headers={"retry-after": header}))
        assert refused.retry_after == (None if seconds is None else pytest.approx(seconds, abs=5))
    assert RefusedError(httpx.Response(503)).retry_after is None
