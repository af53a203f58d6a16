"""What the proxies of Ray Serve answer instead of their plain-text errors, and the repetition of a request whose replica died.

Ray Serve calls `middlewares` in each proxy if the environment variable ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` is
``ray_distill.serve.ray_proxy.middlewares`` where Ray is started.
"""

from collections.abc import Iterator

import orjson
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_distill.serve.api.errors import STATUS, ErrorResponse, ErrorType, ServiceError
from ray_distill.serve.streams import CLOSE_CODE

_MAX_REPEATED_BYTES = 32 * 2**20  # Largest body that is kept until the answer begins.
_ATTEMPTS = 2
_OWN_PATHS = "/-/"  # Health and routes of Ray Serve.
_KINDS: dict[int, ErrorType] = {404: "not_found", 408: "deadline", 429: "overloaded", 503: "not_ready"}
_MESSAGES: dict[ErrorType, str] = {
    "not_found": "There is nothing at this path. The routes are listed at /docs.",
    "deadline": "The request did not finish within the time limit of the proxy.",
    "overloaded": "The service is overloaded: too many requests wait for a replica; try again later.",
    "not_ready": "No replica of the service is available; try again later.",
    "internal": "The service failed on this request; the cause is in the logs of its replicas.",
}


def middlewares() -> list[Middleware]:
    """Return the middleware for the proxies of Ray Serve."""
    return [Middleware(ProxyErrorsMiddleware)]


class ProxyErrorsMiddleware:
    """ASGI middleware around a proxy of Ray Serve, which gives its errors the form of all errors.

    If the replica of a request dies before its answer begins, the request is sent once more, to another replica: a request changes
    nothing. Its body is kept for that, up to 32 MiB. If that fails too, or the body is larger, the answer is 503 ``not_ready``. A
    stream can't be repeated; it ends with ``not_ready``.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"].startswith(_OWN_PATHS):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._stream(scope, receive, send)
        else:
            await self._request(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = _Repeatable(receive)
        for _ in range(_ATTEMPTS):
            answer = _Answer(scope, receive, send)
            await self._app(scope, incoming.receiver(), answer.send)
            if answer.started or incoming.disconnected:
                return
            if incoming.num_bytes > _MAX_REPEATED_BYTES:
                break
        message = "The replica of the service that worked on this request has died; send the request again."
        await ServiceError("not_ready", message, {"retry-after": "1"}).response()(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted = ended = False

        async def watched_receive() -> Message:
            nonlocal ended
            message = await receive()
            ended |= message["type"] == "websocket.disconnect"
            return message

        async def watched_send(message: Message) -> None:
            nonlocal accepted, ended
            accepted |= message["type"] == "websocket.accept"
            ended |= message["type"] == "websocket.close"
            await send(message)

        await self._app(scope, watched_receive, watched_send)
        if ended:
            return
        if not accepted:
            await send({"type": "websocket.accept"})
        body = ErrorResponse(error="The replica of this stream has died; open a new stream.", error_type="not_ready")
        await send({"type": "websocket.send", "text": orjson.dumps(body.model_dump()).decode()})
        await send({"type": "websocket.close", "code": CLOSE_CODE + STATUS["not_ready"], "reason": "not_ready"})


class _Repeatable:
    """The messages of a client, kept so that they can be received again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self.num_bytes = 0
        self.disconnected = False

    def receiver(self) -> Receive:
        """Return a function that receives the messages from the first one."""
        kept: Iterator[Message] = iter(list(self._kept))

        async def receive() -> Message:
            for message in kept:
                return message
            message = await self._receive()
            self.disconnected |= message["type"] == "http.disconnect"
            self.num_bytes += len(message.get("body", b""))
            if self.num_bytes > _MAX_REPEATED_BYTES:
                self._kept.clear()
            else:
                self._kept.append(message)
            return message

        return receive


class _Answer:
    """Sends the messages of an answer; an error in plain text, which the application never sends, is replaced."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.started = False
        self._error: ServiceError | None = None

    async def send(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = Headers(raw=message["headers"])
            if message["status"] >= 400 and headers.get("content-type", "").startswith("text/plain"):
                kind = _KINDS.get(message["status"], "internal")
                retry = {"retry-after": headers.get("retry-after", "1")} if kind in ("overloaded", "not_ready") else {}
                self._error = ServiceError(kind, _MESSAGES[kind], retry)
        if self._error is None:
            await self._send(message)
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            await self._error.response()(self._scope, self._receive, self._send)
