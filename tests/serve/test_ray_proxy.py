"""The middleware of Ray Serve's proxies, around an application that behaves as they do."""

import asyncio
import io
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import websockets.sync.client as websockets

from ray_distill.serve import ray_proxy
from ray_distill.serve.ray_proxy import middlewares

from .conftest import RAY_FOLDER

App = Callable[[Any, Any, Any], Awaitable[None]]


def exchange(app: App, incoming: list[Any], kind: str = "http", path: str = "/v1/features") -> list[Any]:
    """Return what a client receives that sends these messages."""
    sent: list[Any] = []
    waiting = iter(incoming)
    ((middleware, arguments, _),) = [tuple(item) for item in middlewares()]

    async def receive() -> Any:
        return next(waiting)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware(app, *arguments)({"type": kind, "path": path, "headers": []}, receive, send))
    return sent


def body_of(sent: list[Any]) -> tuple[int, str]:
    start, *rest = sent
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    return start["status"], json.loads(b"".join(message["body"] for message in rest))["error_type"]


REQUEST = [{"type": "http.request", "body": b"ab", "more_body": True}, {"type": "http.request", "body": b"cd"}]


class Dying:
    """A proxy whose replicas die ``deaths`` times, after one message; then it answers with the body."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        first = await receive()
        if self.deaths:
            self.deaths -= 1
            return
        body = first["body"] + (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body})


def test_a_request_whose_replica_dies_is_repeated_with_its_whole_body() -> None:
    sent = exchange(Dying(1), REQUEST)
    assert (sent[0]["status"], sent[1]["body"]) == (200, b"abcd")


def test_a_request_that_cannot_be_repeated_gets_a_documented_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = exchange(Dying(2), REQUEST)
    assert body_of(sent) == (503, "not_ready") and dict(sent[0]["headers"])[b"retry-after"] == b"1"
    monkeypatch.setattr(ray_proxy, "_MAX_REPEATED_BYTES", 1)
    assert body_of(exchange(Dying(1), REQUEST)) == (503, "not_ready")


def test_a_client_that_has_disconnected_gets_nothing() -> None:
    assert exchange(Dying(1), [{"type": "http.disconnect", "body": b""}]) == []


@pytest.mark.parametrize(
    ("status", "found"),
    [(404, (404, "not_found")), (408, (504, "deadline")), (429, (429, "overloaded")), (500, (500, "internal"))],
)
def test_plain_errors_of_the_proxy_become_json(status: int, found: tuple[int, str]) -> None:
    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain"), (b"retry-after", b"7")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"Internal", "more_body": True})
        await send({"type": "http.response.body", "body": b" details"})

    sent = exchange(proxy, REQUEST)
    assert body_of(sent) == found
    assert dict(sent[0]["headers"]).get(b"retry-after") == (b"7" if status == 429 else None)
    assert exchange(proxy, REQUEST, path="/-/healthz")[0]["status"] == status


@pytest.mark.parametrize("accepted", [True, False])
def test_a_stream_whose_replica_dies_ends_with_an_error(accepted: bool) -> None:
    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if accepted:
            await send({"type": "websocket.accept"})

    accept, error, close = exchange(proxy, [], "websocket")
    assert accept["type"] == "websocket.accept" and json.loads(error["text"])["error_type"] == "not_ready"
    assert (close["code"], close["reason"]) == (4503, "not_ready")


def test_a_stream_that_has_ended_is_left_alone() -> None:
    async def closed(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", "code": 4422})

    async def left(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    assert exchange(closed, [], "websocket") == [{"type": "websocket.close", "code": 4422}]
    assert exchange(left, [{"type": "websocket.disconnect"}], "websocket") == []


def replicas(folder: Path) -> list[int]:
    """Return the processes of the replicas of the service that runs in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            name = (process / "cmdline").read_bytes()
        except OSError:
            continue  # It has ended, or belongs to someone else.
        if f"{RAY_FOLDER}={folder}".encode() in environment and b"ServeReplica:features" in name:
            found.append(int(process.name))
    return found


@pytest.mark.ray
def test_a_killed_replica_costs_a_request_only_time_and_ends_a_stream(
    ray_client: httpx.Client, ray_folder: Path
) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(16_000) / 20), 16_000, format="WAV")
    audio = buffer.getvalue()
    before = replicas(ray_folder)
    assert len(before) == 1

    def body() -> Iterator[bytes]:
        yield audio[:9_000]
        while "serve_open_requests 3.0" not in ray_client.get("/metrics").text:
            pass
        os.kill(before[0], signal.SIGKILL)
        yield audio[9_000:]

    address = str(ray_client.base_url).replace("http", "ws")
    with websockets.connect(f"{address}/v1/features/stream", proxy=None) as stream:
        assert json.loads(stream.recv())["model"] == "tiny"
        answer = ray_client.post("/v1/features", content=body(), timeout=120)
        assert answer.status_code == 200 and answer.json()["shape"] == [49, 16]
        assert json.loads(stream.recv(timeout=60))["error_type"] == "not_ready"
    assert replicas(ray_folder) != before
