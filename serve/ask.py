"""One request from body to features: admission, decoding, inference, deadline, and a client that leaves."""

import asyncio
import hmac
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request

from serve.body import read_body
from serve.decoding import decode
from serve.engine import Array, EngineClosedError, Features, Space
from serve.errors import ServiceError
from serve.models import Models, ServedModel
from serve.observation import Metrics
from serve.parameters import Query, choose_layer, parse_parameters
from teacher_cache.frames import SAMPLE_RATE

_DECODERS = 4  # audio files decoded at once, which bounds the memory of decoding
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take.

    Attributes:
        max_seconds: longest audio accepted, in seconds. Default 60.
        max_bytes: largest request body accepted, in bytes. Default 32 MiB.
        deadline_seconds: longest time for an answer; a request may ask for less. Default 30.
        max_requests: requests answered at once; more are refused. Default 256.
        request_seconds: audio in all files of a request together, in seconds. Default 300.
    """

    max_seconds: float = 60.0
    max_bytes: int = 32 * 2**20
    deadline_seconds: float = 30.0
    max_requests: int = 256
    request_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_seconds", "deadline_seconds", "request_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}.")
        for name in ("max_bytes", "max_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Answered:
    """Features of each file of a request, of one model and layer (None: all)."""

    model: ServedModel
    layer: int | None
    features: list[Features]
    many: bool

    def headers(self) -> dict[str, str]:
        """Seconds in queue and inference, the longest of the request's files."""
        return {
            "x-queue-time": f"{max(item.queue_seconds for item in self.features):.6f}",
            "x-inference-time": f"{max(item.inference_seconds for item in self.features):.6f}",
        }


class Asker:
    """Answers requests for features under limits.

    Args:
        models: what is served.
        limits: of a request, and of all.
        metrics: told of each utterance.
        api_keys: clients must send one as a bearer token; none: everyone may ask.
    """

    def __init__(self, models: Models, limits: Limits, metrics: Metrics, api_keys: Sequence[str] = ()) -> None:
        self.models, self.limits = models, limits
        self._metrics = metrics
        self._keys = [key.encode() for key in api_keys]
        self._open = 0
        self._decoders = anyio.CapacityLimiter(_DECODERS)

    async def answer(self, request: Request, kind: type[Query]) -> tuple[Query, Answered]:
        """Features for every file of a request, and its parameters.

        Raises:
            ServiceError: any of its types but ``not_ready`` and ``internal``.
            ClientDisconnect: the client left; what it waited for is cancelled.
        """
        self.check_key(request)
        if self._open >= self.limits.max_requests:
            message = f"The service is overloaded: {self._open} requests are open; ask again later."
            raise ServiceError("overloaded", message, {"retry-after": "1"})
        self._open += 1
        limit = self.limits.deadline_seconds
        try:
            # Parameters in the query are checked before anything is read.
            engine = self.models.get(request.query_params.get("model")).engine
            early = parse_parameters(kind, dict(request.query_params), {}, engine.num_layers)
            engine.check_room()
            limit = min(limit, early.timeout or limit)
            async with asyncio.timeout(limit) as deadline:
                files, members, many = await read_body(request, self.limits.max_bytes)
                query = parse_parameters(kind, dict(request.query_params), members, engine.num_layers)
                if query.timeout and query.timeout < limit:
                    deadline.reschedule(deadline.when() - limit + query.timeout)  # type: ignore[operator]
                    limit = query.timeout
                return query, await _unless_client_leaves(request, self._features(query, files, many))
        except TimeoutError as error:
            raise ServiceError("deadline", f"There was no answer within {limit:g} seconds.") from error
        finally:
            self._open -= 1

    def check_key(self, request: Request) -> None:
        """ServiceError ``unauthorized`` without one of the keys, if there are any."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        token = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, in constant time, so that timing tells nothing about any.
        if self._keys and not sum([hmac.compare_digest(token, key) for key in self._keys]):
            headers = {"www-authenticate": "Bearer"}
            raise ServiceError("unauthorized", "Send a valid API key as 'Authorization: Bearer KEY'.", headers)

    async def _features(self, query: Any, files: list[bytes], many: bool) -> Answered:
        # Bound before decoding: a wrong layer must not cost any.
        choose_layer(query.layer, self.models.get(query.model).engine.num_layers)
        waveforms: list[Array] = []
        room = self.limits.request_seconds
        for file in files:
            seconds = self.limits.max_seconds
            waveforms.append(await anyio.to_thread.run_sync(decode, file, seconds, limiter=self._decoders))
            room -= len(waveforms[-1]) / SAMPLE_RATE
            if room < 0:
                limit = f"{self.limits.request_seconds:g}"
                message = f"The files hold more than the {limit} seconds of audio that a request may have; send fewer at once."
                raise ServiceError("too_long", message)
        while True:
            model = self.models.get(query.model)
            layer = choose_layer(query.layer, model.engine.num_layers)
            try:
                features = await _together(model, waveforms, layer, query.space)
            except EngineClosedError:
                if self.models.get(query.model) is model:
                    raise ServiceError("not_ready", "The service is stopping.") from None
                continue  # Replaced between look-up and queue.
            for item in features:
                self._metrics.record_features(item)
            return Answered(model, layer, features, many)


async def _together(model: ServedModel, waveforms: list[Array], layer: int | None, space: Space) -> list[Features]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(model.engine.features(waveform, layer, space)) for waveform in waveforms]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _unless_client_leaves(request: Request, work: Awaitable[Result]) -> Result:
    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError):
                if not task.done():
                    await task
