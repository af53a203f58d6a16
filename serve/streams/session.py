"""One stream: a WebSocket that receives samples and sends the features of each window as soon as its audio has arrived."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import anyio
import numpy as np
import orjson
from fastapi import FastAPI, WebSocket
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect

from ray_distill.serve.api.admission import Admission, HeldBytes
from ray_distill.serve.api.errors import STATUS, ErrorResponse, ErrorType, ServiceError
from ray_distill.serve.api.formats import TIMESTAMPS
from ray_distill.serve.api.metrics import Metrics
from ray_distill.serve.api.observability import record_of
from ray_distill.serve.api.parameters import StreamQuery, parse_parameters
from ray_distill.serve.api.request_handler import first_exception, resolve_layer
from ray_distill.serve.inference.engine import EngineClosedError, FeatureEngine, Features
from ray_distill.serve.inference.models import Models, ServedModel
from ray_distill.serve.inference.schedule import Reservation
from ray_distill.serve.settings import Limits
from ray_distill.serve.streams import CLOSE_CODE
from ray_distill.serve.streams.inbox import Inbox
from ray_distill.serve.streams.samples import SampleReader, bytes_per_second
from ray_distill.serve.streams.window_buffer import StreamWindow, WindowBuffer
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE

_LOG = logging.getLogger(__name__)
PATH = "/v1/features/stream"
MAX_MESSAGE_BYTES = 2**20
"""Largest message of a client."""
SUBPROTOCOL = "features"
"""Subprotocol that a client may offer; it must if it offers an API key as another one."""
_SERVICE_RESTART = 1012  # Close code with which Uvicorn ends the open WebSockets when it stops.
_LEAST_WINDOW = 1.0  # Seconds.
_LONGEST_PAUSE = 1.0  # Seconds until an overloaded model is asked again.


def add_streams(
    app: FastAPI, models: Models, admission: Admission, metrics: Metrics, cors_origins: Sequence[str] = ()
) -> None:
    """Add the WebSocket for streams, and refuse all other WebSockets.

    Args:
        app: Application.
        models: Models to choose from.
        admission: Admission of requests; an open stream counts as an open request.
        metrics: Metrics that record each window.
        cors_origins: Origins, besides the service's own, whose pages may open streams; ``*`` for all. Default: none.
    """

    @app.websocket(PATH)
    async def stream(websocket: WebSocket) -> None:
        async def talk() -> None:
            _check_origin(websocket, cors_origins)
            async with asynccontextmanager(admission.admit)(websocket) as held:
                await _Session(websocket, models, admission.limits, metrics, held).run()

        await _answering_errors(websocket, metrics, talk)

    @app.get(PATH, include_in_schema=False)
    async def no_handshake() -> None:
        message = f"{PATH} is a WebSocket: open it with ws:// or wss://; a proxy must pass the headers Upgrade and Connection on."
        raise ServiceError("bad_request", message)

    @app.websocket("/{path:path}")
    async def other(websocket: WebSocket) -> None:
        async def refuse() -> None:
            raise ServiceError(
                "not_found", f"There is no WebSocket at {websocket.url.path[:80]!r}; streams are at {PATH}."
            )

        await _answering_errors(websocket, metrics, refuse)


async def _answering_errors(websocket: WebSocket, metrics: Metrics, talk: Any) -> None:
    """Accept a WebSocket, run ``talk`` and close; an error becomes a last message with `ErrorResponse`."""
    await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in websocket.scope["subprotocols"] else None)
    try:
        try:
            await talk()
            await websocket.close()
            return
        except ServiceError as refusal:
            error = refusal
        except (WebSocketDisconnect, TimeoutError):
            raise
        except Exception:
            _LOG.exception("A stream failed")
            error = ServiceError("internal", "The service failed on this stream; the cause is in its log.")
        _count(websocket, metrics, error.error_type)
        body = ErrorResponse(error=error.message, error_type=error.error_type).model_dump()
        body |= {name.replace("-", "_"): value for name, value in error.headers.items() if name == "retry-after"}
        await websocket.send_text(orjson.dumps(body).decode())
        await websocket.close(CLOSE_CODE + STATUS[error.error_type], error.error_type)
    except WebSocketDisconnect as closed:
        stopping = closed.code == _SERVICE_RESTART
        kind: ErrorType = "not_ready" if stopping else "client_disconnected"
        _count(websocket, metrics, kind)


def _count(websocket: WebSocket, metrics: Metrics, kind: ErrorType) -> None:
    record_of(websocket).error_type = kind
    metrics.errors.labels(kind).inc()


def _check_origin(connection: HTTPConnection, allowed: Sequence[str]) -> None:
    """Refuse pages of other hosts, since browsers do not apply CORS to WebSockets."""
    origin = connection.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if urlsplit(origin).hostname != urlsplit(f"//{connection.headers.get('host', '')}").hostname:
        raise ServiceError("bad_request", "The service does not allow streams from pages of other origins.")


class _Session:
    """An admitted stream."""

    def __init__(self, websocket: WebSocket, models: Models, limits: Limits, metrics: Metrics, held: HeldBytes) -> None:
        self._websocket, self._models, self._limits, self._metrics, self._held = (
            websocket,
            models,
            limits,
            metrics,
            held,
        )
        self._record = record_of(websocket)
        self._query = parse_parameters(StreamQuery, websocket.query_params, {})
        self._seconds = min(self._query.timeout or limits.deadline_seconds, limits.deadline_seconds)

    async def run(self) -> None:
        """Answer the stream until its end.

        Raises:
            ServiceError: the stream is refused, or fails.
            WebSocketDisconnect: the client disconnected; the work for it is cancelled.
        """
        query = self._query
        window, overlap = self._check_audio()
        model = await self._models.find(query.model)
        self._record.model = model.name
        layer, dim = resolve_layer(query, model.engine.backend)
        model.engine.check_room(time.monotonic() + self._seconds)
        windows = WindowBuffer(window, overlap)
        per_second = bytes_per_second(query.encoding, query.rate, query.channels)
        inbox = Inbox(max(int(window * per_second), MAX_MESSAGE_BYTES))
        layers = model.engine.backend.num_layers if layer is None else 1
        frame_bytes = 2 * 4 * dim * layers  # The features, and the message that is made of them.
        message_seconds = MAX_MESSAGE_BYTES / per_second
        self._held.acquire(
            windows.nbytes
            + int(window * SAMPLE_RATE / FRAME_SAMPLES) * frame_bytes
            + int(window * per_second)
            + 2 * MAX_MESSAGE_BYTES
            + int(2 * 4 * SAMPLE_RATE * message_seconds)
        )
        await self._send(
            {
                "model": model.name,
                "revision": model.revision,
                "layer": layer or "all",
                "space": query.space,
                "dtype": query.dtype,
                "dim": dim,
                "frame_seconds": FRAME_SAMPLES / SAMPLE_RATE,
                "frame_rate": SAMPLE_RATE / FRAME_SAMPLES,
                "timestamps": TIMESTAMPS,
                "window_seconds": window,
                "overlap_seconds": overlap,
            }
        )
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._receive, inbox)
                await self._answer(inbox, windows, model, layer)
                group.cancel_scope.cancel()
        except ExceptionGroup as errors:
            raise first_exception(errors) from None

    def _check_audio(self) -> tuple[float, float]:
        """Refuse audio and windows beyond the limits; return length and overlap of the windows in seconds."""
        query, limits = self._query, self._limits
        if query.rate > limits.max_sample_rate or query.channels > limits.max_channels:
            raise ServiceError(
                "unsupported_media_type",
                f"The audio has {query.channels} channels at {query.rate} Hz; the limits are {limits.max_channels} channels and "
                f"{limits.max_sample_rate} Hz.",
            )
        longest = min(limits.window_seconds, limits.max_seconds)
        window = longest if query.window is None else query.window
        if not min(_LEAST_WINDOW, longest) <= window <= longest:
            raise ServiceError(
                "bad_parameter",
                f"Parameter 'window' is wrong: use {min(_LEAST_WINDOW, longest):g} to {longest:g} seconds.",
            )
        overlap = min(limits.overlap_seconds, window / 2) if query.overlap is None else query.overlap
        if overlap > window / 2:
            raise ServiceError(
                "bad_parameter",
                f"Parameter 'overlap' is wrong: use at most half of the window, which is {window / 2:g} seconds.",
            )
        return window, overlap

    async def _receive(self, inbox: Inbox) -> None:
        """Read messages until the client disconnects, also while others are processed."""
        ended = False
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            data = message.get("bytes")
            if ended or (data is None and message.get("text") != "end"):
                raise ServiceError("bad_body", "Send samples as binary messages, and then the text 'end' once.")
            if data is None:
                ended = True
                await inbox.put(None)
                continue
            if len(data) > MAX_MESSAGE_BYTES:
                raise ServiceError("too_large", f"A message is larger than the limit of {MAX_MESSAGE_BYTES} bytes.")
            self._record.num_bytes += len(data)
            await inbox.put(bytes(data))

    async def _answer(self, inbox: Inbox, windows: WindowBuffer, model: ServedModel, layer: int | None) -> None:
        """Send the features of each window, and a summary at the end."""
        reader = SampleReader(self._query.encoding, self._query.rate, self._query.channels)
        count = 0
        data: bytes | None = b""
        while data is not None:
            try:
                async with asyncio.timeout(self._seconds):
                    data = await inbox.get()
            except TimeoutError:
                message = f"No audio arrived for {self._seconds:g} seconds; send the text 'end' at the end of a stream."
                raise ServiceError("deadline", message) from None
            if data is None:
                samples = reader.finish()
            else:
                samples = await anyio.to_thread.run_sync(reader.read, data)
            self._record.audio_seconds += len(samples) / SAMPLE_RATE
            for window in windows.push(samples):
                await self._send_features(window, await self._features(window, model.engine, layer))
                count += 1
        last = windows.finish()
        if last is None:
            message = "The stream is too short: one frame needs at least 400 samples at 16 kHz (25 ms)."
            raise ServiceError("too_short", message)
        await self._send_features(last, await self._features(last, model.engine, layer))
        await self._send(
            {
                "end": True,
                "num_frames": last.first + last.kept.stop - last.kept.start,
                "audio_seconds": windows.num_samples / SAMPLE_RATE,
                "windows": count + 1,
            }
        )

    async def _features(self, window: StreamWindow, engine: FeatureEngine, layer: int | None) -> Features:
        due = time.monotonic() + self._seconds
        reservation = await self._admit(engine, len(window.waveform), layer, due)
        try:
            async with asyncio.timeout(due - time.monotonic()):
                found = await engine.features(window.waveform, layer, self._query.space, reservation)
        except TimeoutError:
            message = f"The features of a window were not complete within {self._seconds:g} seconds."
            raise ServiceError("deadline", message) from None
        except EngineClosedError:
            message = "The model was replaced, or the service is stopping; open a new stream."
            raise ServiceError("not_ready", message) from None
        finally:
            engine.release(reservation)
        self._metrics.record_features(found)
        return found

    async def _admit(self, engine: FeatureEngine, length: int, layer: int | None, due: float) -> Reservation:
        """Admit a window like a request of its own; while the model is overloaded, wait instead of reading on."""
        while True:
            try:
                return engine.admit([length], layer, due)
            except ServiceError as error:
                pause = min(_LONGEST_PAUSE, float(error.headers.get("retry-after", "inf")))
                if error.error_type != "overloaded" or time.monotonic() + pause > due:
                    raise
                await asyncio.sleep(pause)

    async def _send_features(self, window: StreamWindow, found: Features) -> None:
        array = found.array[..., window.kept, :].astype(self._query.dtype)
        about = {
            "first_frame": window.first,
            "shape": list(array.shape),
            "queue_seconds": round(found.queue_seconds, 6),
            "inference_seconds": round(found.inference_seconds, 6),
        }
        if self._query.format == "binary":
            await self._send(about)
            await self._websocket.send_bytes(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        else:
            # Every float16 is exact in float32.
            await self._send(about | {"features": np.ascontiguousarray(array, np.float32)})

    async def _send(self, message: dict[str, Any]) -> None:
        text = await anyio.to_thread.run_sync(lambda: orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY).decode())
        await self._websocket.send_text(text)
