"""Answers leave in pieces, and a client that doesn't take them is given up: what it is sent is held until it does."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator

import anyio
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PIECE_BYTES = 2**18
_LOG = logging.getLogger("serve.sending")


def answer_in_pieces(pieces: Iterator[bytes], media_type: str, headers: dict[str, str]) -> Response:
    """An answer whose body is made while it is sent, in a thread, and never held as a whole; a short one is made here.

    Args:
        pieces: of the body, of any size; joined to at least 256 KiB.
        media_type, headers: as `Response`.
    """
    first, more = _next(pieces)
    if not more:
        return Response(first, media_type=media_type, headers=headers)

    async def rest() -> AsyncIterator[bytes]:
        yield first
        more = True
        while more:
            piece, more = await anyio.to_thread.run_sync(_next, pieces)
            yield piece

    return StreamingResponse(rest(), media_type=media_type, headers=headers)


def _next(pieces: Iterator[bytes]) -> tuple[bytes, bool]:
    """At least PIECE_BYTES, and whether there may be more."""
    joined = bytearray()
    for piece in pieces:
        joined += piece
        if len(joined) >= PIECE_BYTES:
            return bytes(joined), True
    return bytes(joined), False


class PatientSending:
    """ASGI middleware: a client that takes nothing of its answer for ``seconds`` is disconnected."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stalled = False

        async def sent(message: Message) -> None:
            nonlocal stalled
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                stalled = True
                raise

        try:
            await self._app(scope, receive, sent)
        except Exception:
            if not stalled:
                raise
            # The server closes the connection of an answer that has no end.
            _LOG.info('{"message": "gave up a client that does not take its answer"}')
