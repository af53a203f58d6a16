"""The connections of the server: a deadline for a request's head, a cap on open connections, and refusals in JSON."""

import asyncio
import base64
import binascii
import json
import sys
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ray_distill.serve.api.errors import STATUS, ErrorType

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = AutoHTTPProtocol

_MAX_HEAD_BYTES = 2**16
_PHRASES = {400: "Bad Request", 429: "Too Many Requests"}


def protocol_class(head_seconds: float, max_connections: int) -> type[Any]:
    """Return the class of connections for `uvicorn.Config`.

    Args:
        head_seconds: Seconds that a client has for the request line and the headers, from the opening of the connection and from the
            first byte of each further request. Then the connection is closed.
        max_connections: Open connections; further ones get 429 and are closed.
    """

    class Connection(_Base):  # type: ignore[misc]
        """A connection of Uvicorn."""

        _head_timer: asyncio.TimerHandle | None = None
        _head_bytes = 0
        _in_body = False  # Set by the callbacks of httptools.
        _upgraded = False
        _data = b""  # What the client sent last.
        parser: Any  # That of httptools; made by Uvicorn.

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._refuse("overloaded", f"The service has {max_connections} open connections; try again later.")
            else:
                self._start_timer()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if not self._past_head():
                self._head_bytes += len(data)
            self._data = data
            super().data_received(data)
            self._data = b""
            if self.transport.is_closing() or self._upgraded:
                self._stop_timer()
            elif self._past_head():
                self._stop_timer()
                self._head_bytes = 0
            elif self._head_bytes > _MAX_HEAD_BYTES:
                message = f"The request line and the headers must have at most {_MAX_HEAD_BYTES} bytes."
                self._refuse("bad_request", message)
            elif self._head_timer is None:
                self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """Answer bytes that are not HTTP; called by Uvicorn."""
            self._refuse("bad_request", "The request is not valid HTTP/1.1.")

        def handle_websocket_upgrade(self, *event: Any) -> None:
            """Hand the connection over to the WebSocket protocol; called by Uvicorn."""
            headers: dict[bytes, bytes] = dict(self.scope["headers"])
            if self.scope["method"] != "GET" or not _is_handshake(headers):
                self._refuse("bad_request", "The request is not a handshake of a WebSocket of version 13 (RFC 6455).")
                return
            self._upgraded = True
            super().handle_websocket_upgrade(*event)

        def on_headers_complete(self) -> None:
            """Note that the body begins; called by httptools."""
            if self._offers_another_protocol():
                return
            self._in_body = True
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            """Note that the body is complete; called by httptools."""
            if self._offers_another_protocol():
                return
            self._in_body = False
            super().on_message_complete()

        def _unsupported_upgrade_warning(self) -> None:
            """Read a request as if it offered no other protocol, such as h2c; called by Uvicorn while it handles HttpParserUpgrade.

            RFC 9110, section 7.8, allows that. Java's HttpClient sends the offer with its first request, and httptools reads no body
            after an offer.
            """
            upgrade = sys.exc_info()[1]
            if upgrade is None or not self._offers_another_protocol():
                super()._unsupported_upgrade_warning()
                return
            first = b"%s %s HTTP/%s" % (
                self.parser.get_method(),
                self.url,
                self.parser.get_http_version().encode(),
            )
            head = [first, *(name + b": " + value for name, value in self.headers if name != b"upgrade"), b"", b""]
            self.parser = type(self.parser)(self)
            super().data_received(b"\r\n".join(head) + self._data[upgrade.args[0] :])

        def _offers_another_protocol(self) -> bool:
            """Return whether httptools reads a request with the header Upgrade that is no handshake of a WebSocket."""
            is_offer = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
            return bool(is_offer and not self._should_upgrade())

        def _past_head(self) -> bool:
            """Return whether a request is being answered, or its body is still arriving, maybe after the answer."""
            is_open = self.cycle is not None and not self.cycle.response_complete
            connection = getattr(self, "conn", None)  # The state of h11.
            return is_open or self._in_body or (connection is not None and connection.their_state is h11.SEND_BODY)

        def _start_timer(self) -> None:
            self._head_timer = self.loop.call_later(head_seconds, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _refuse(self, kind: ErrorType, message: str) -> None:
            self._stop_timer()
            status = STATUS[kind]
            body = json.dumps({"error": message, "error_type": kind})
            head = [
                f"HTTP/1.1 {status} {_PHRASES[status]}",
                "content-type: application/json",
                f"content-length: {len(body)}",
                "connection: close",
                *(["retry-after: 1"] if status == 429 else []),
            ]
            self.transport.write("\r\n".join([*head, "", body]).encode())
            self.transport.close()

    return Connection


def _is_handshake(headers: dict[bytes, bytes]) -> bool:
    """Return whether the headers of a request with ``Upgrade: websocket`` are those of RFC 6455, section 4.2.1."""
    try:
        key = base64.b64decode(headers.get(b"sec-websocket-key", b"").strip(), validate=True)
    except binascii.Error:
        return False
    return len(key) == 16 and headers.get(b"sec-websocket-version", b"").strip() == b"13"
