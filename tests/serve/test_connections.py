"""What reaches the service before any request is complete: slow heads, many connections and bytes that are not HTTP."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import uvicorn

from ray_distill.serve.connections import protocol_class

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await asyncio.sleep(0.3)
        await send({"type": "websocket.send", "text": "ok"})
        await send({"type": "websocket.close", "code": 4429})
        return
    answer = b"ok"
    if scope["path"] == "/echo":
        answer, more = b"", True
        while more:
            message = await receive()
            answer, more = answer + message["body"], message["more_body"]
        answer += b"<end>"
    size = str(len(answer)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", size)]})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture(params=["httptools", "h11"])
def base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uvicorn's two parsers; the service uses the one that is installed."""
    from uvicorn.protocols.http import h11_impl

    if request.param == "h11":
        connection = h11_impl.H11Protocol
    else:
        connection = pytest.importorskip("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol
    monkeypatch.setattr("ray_distill.serve.connections._Base", connection)


def run(talk: Callable[[Callable[[], Awaitable[Streams]]], Awaitable[None]], head_seconds: float = 20.0) -> None:
    async def main() -> None:
        connection = protocol_class(head_seconds, 2)
        server = uvicorn.Server(uvicorn.Config(app, port=0, http=connection, log_level="critical", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            async with asyncio.timeout(20):
                await talk(lambda: asyncio.open_connection("127.0.0.1", port))
        finally:
            server.should_exit = server.force_exit = True
            await serving

    asyncio.run(main())


def refusal(data: bytes) -> tuple[bytes, str]:
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return head.split(b" ")[1], json.loads(body)["error_type"]


def test_half_sent_heads_are_closed_and_complete_requests_are_not(base: None) -> None:
    async def talk(connect: Callable[[], Awaitable[Streams]]) -> None:
        began = time.monotonic()
        slow, writer = await connect()
        writer.write(b"POST /v1/features HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        reader, other = await connect()
        for _ in range(3):
            other.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.1)
        other.write(b"GET / HTTP/1.1\r\n")  # The second request on a connection has a deadline too.
        for one in (slow, reader):
            with suppress(ConnectionResetError):
                assert await one.read() == b""
        assert time.monotonic() - began < 10

    run(talk, head_seconds=0.5)


def test_a_body_that_arrives_after_its_answer_is_read_to_its_end(base: None) -> None:
    async def talk(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            writer.write(b"x" * 100_000)
            await asyncio.sleep(0.4)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")

    run(talk, head_seconds=0.8)


def test_open_connections_are_limited(base: None) -> None:
    async def talk(connect: Callable[[], Awaitable[Streams]]) -> None:
        held = [await connect() for _ in range(2)]
        await asyncio.sleep(0.05)
        reader, _ = await connect()
        assert refusal(await reader.read()) == (b"429", "overloaded")
        held[0][1].close()
        await asyncio.sleep(0.05)
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")

    run(talk)


def test_a_request_that_offers_another_protocol_keeps_its_body(base: None) -> None:
    """Java's HttpClient offers h2c with its first request, whatever its method."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    sized, chunked = b"Content-Length: 10\r\n", b"Transfer-Encoding: chunked\r\n"

    async def talk(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        for framing, body in ((sized, b"0123456789"), (chunked, b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n")):
            head = b"POST /echo HTTP/1.1\r\nHost: a\r\n" + offer + framing + b"\r\n"
            for parts in ([head + body], [head, body], [head[:50], head[50:] + body[:7], body[7:]]):
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(0.02)
                answer = await reader.readuntil(b"<end>")
                assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"0123456789<end>")
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n" + offer + b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert (await reader.readuntil(b"ok")).strip().startswith(b"HTTP/1.1 200")

    run(talk)


def handshake(key: str = "dGhlIHNhbXBsZSBub25jZQ==", version: int = 13, method: str = "GET") -> bytes:
    lines = [f"{method} /v1/features/stream HTTP/1.1", "Host: a", "Upgrade: websocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Key: {key}", f"Sec-WebSocket-Version: {version}"]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_websocket_outlives_the_deadline_of_its_head_and_counts_as_a_connection(base: None) -> None:
    async def talk(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write(handshake())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        _, other = await connect()
        third, _ = await connect()
        assert refusal(await third.read()) == (b"429", "overloaded")
        other.close()
        assert await reader.readexactly(2 + 2 + 2 + 2) == b"\x81\x02ok\x88\x02" + (4429).to_bytes(2, "big")

    run(talk, head_seconds=0.1)


@pytest.mark.parametrize("wrong", [{"key": "short"}, {"key": "?"}, {"version": 8}, {"method": "POST"}])
def test_an_impossible_handshake_is_refused_in_json(base: None, wrong: dict[str, Any]) -> None:
    async def talk(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write(handshake(**wrong))
        assert refusal(await reader.read()) == (b"400", "bad_request")

    run(talk)


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000],
    ids=["tls", "endless"],
)
def test_what_is_not_http_is_refused_in_json(base: None, sent: bytes) -> None:
    async def talk(connect: Callable[[], Awaitable[Streams]]) -> None:
        reader, writer = await connect()
        writer.write(sent)
        assert refusal(await reader.read()) == (b"400", "bad_request")

    run(talk)
