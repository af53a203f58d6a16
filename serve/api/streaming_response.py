"""Responses that are sent in chunks, and a time limit for clients that stop reading.

The memory of a response is held until the client has read it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator

import anyio
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CHUNK_BYTES = 2**18
_LOG = logging.getLogger(__name__)


def streaming_response(chunks: Iterator[bytes], media_type: str, headers: dict[str, str]) -> Response:
    """Return a response whose body is made in a thread while it is sent, and never held as a whole.

    A body of at most one chunk becomes a plain response.

    Args:
        chunks: Body in chunks of any size; they are joined to at least 256 KiB.
        media_type, headers: As in `fastapi.Response`.
    """
    first, more = _next_chunk(chunks)
    if not more:
        return Response(first, media_type=media_type, headers=headers)

    async def body() -> AsyncIterator[bytes]:
        yield first
        more = True
        while more:
            chunk, more = await anyio.to_thread.run_sync(_next_chunk, chunks)
            yield chunk

    return StreamingResponse(body(), media_type=media_type, headers=headers)


def _next_chunk(chunks: Iterator[bytes]) -> tuple[bytes, bool]:
    """Return at least CHUNK_BYTES, and whether more may follow."""
    joined = bytearray()
    for chunk in chunks:
        joined += chunk
        if len(joined) >= CHUNK_BYTES:
            return bytes(joined), True
    return bytes(joined), False


class SendTimeoutMiddleware:
    """ASGI middleware that disconnects a client which reads nothing of its response for ``seconds``."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timed_out = False

        async def send_in_time(message: Message) -> None:
            nonlocal timed_out
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                timed_out = True
                raise

        try:
            await self._app(scope, receive, send_in_time)
        except Exception:
            if not timed_out:
                raise
            # The server closes the connection of an incomplete response.
            _LOG.info("Disconnected a client that read nothing of its response for %g seconds", self._seconds)
