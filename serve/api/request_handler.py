"""One request from body to features: decoding, inference, deadline, and a client that leaves."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from ray_distill.serve.api.admission import Held, Limits
from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.api.observation import Metrics
from ray_distill.serve.api.parameters import Query, choose_layer, parse_parameters
from ray_distill.serve.api.request_body import is_json, read_body
from ray_distill.serve.decoding import decode
from ray_distill.serve.inference.backends import Array, Backend, Space
from ray_distill.serve.inference.engine import EngineClosedError, Features
from ray_distill.serve.inference.models import Models, ServedModel
from ray_distill.serve.inference.windows import features_in_windows
from ray_distill.teacher_cache.frames import SAMPLE_RATE, num_frames

DECODERS = min(4, len(os.sched_getaffinity(0)))
"""Audio files decoded at once: bounds the memory of decoding, and no more than cores, which inference needs too."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answered:
    """Features of each file of a request, of one model and layer (None: all)."""

    model: ServedModel
    layer: int | None
    features: list[Features]
    many: bool

    def headers(self) -> dict[str, str]:
        """Seconds in queue and inference, the longest of the request's files; in how many windows each was run."""
        return {
            "x-queue-time": f"{max(item.queue_seconds for item in self.features):.6f}",
            "x-inference-time": f"{max(item.inference_seconds for item in self.features):.6f}",
            "x-windows": ";".join(str(item.windows) for item in self.features),
        }


class Asker:
    """Answers requests for features under limits.

    Args:
        models: what is served.
        limits: of a request.
        metrics: told of each utterance.
    """

    def __init__(self, models: Models, limits: Limits, metrics: Metrics) -> None:
        self.models, self.limits = models, limits
        self._metrics = metrics
        # Threads of their own: one that a request no longer waits for still counts, until it is done.
        self._decoders = ThreadPoolExecutor(DECODERS, "decoder")

    def close(self) -> None:
        """Ends its threads."""
        self._decoders.shutdown(cancel_futures=True)

    async def answer(
        self,
        request: Request,
        held: Held,
        kind: type[Query],
        check: Callable[[Query, int], None] = lambda query, num_files: None,
    ) -> tuple[Query, Answered]:
        """Features for every file of a request, and its parameters.

        Args:
            request: admitted.
            held: what it holds: grows with its body, audio and answer.
            kind: of its parameters.
            check: refuses parameters for so many files, before any is decoded.

        Raises:
            ServiceError: any of its types but ``internal``.
            ClientDisconnect: the client left; what it waited for is cancelled.
        """
        limit = self.limits.deadline_seconds
        try:
            async with asyncio.timeout(limit) as deadline:

                def shorten(timeout: float | None) -> None:
                    nonlocal limit
                    if timeout and timeout < limit:
                        deadline.reschedule(deadline.when() - limit + timeout)  # type: ignore[operator]
                        limit = timeout

                # Parameters in the query are checked before anything is read; a JSON body may name another model.
                early = parse_parameters(kind, dict(request.query_params), {})
                shorten(early.timeout)
                engine = (await self.models.find(early.model)).engine
                if early.model or not is_json(request):
                    engine.check_room()
                files, members, many = await read_body(request, self.limits.max_bytes, held)
                query = parse_parameters(kind, dict(request.query_params), members)
                shorten(query.timeout)
                check(query, len(files))
                return query, await _unless_client_leaves(request, self._features(query, files, many, held))
        except TimeoutError as error:
            raise ServiceError("deadline", f"There was no answer within {limit:g} seconds.") from error

    async def _features(self, query: Any, files: list[bytes], many: bool, held: Held) -> Answered:
        # Before decoding: a full queue or a wrong layer must not cost any.
        engine = (await self.models.find(query.model)).engine
        engine.check_room()
        layer, dim = _chosen(query, engine.backend)
        # The features, and the answer that is made of them.
        frame_bytes = 2 * 4 * dim * (engine.backend.num_layers if layer is None else 1)
        waveforms: list[Array] = []
        room = self.limits.request_seconds
        body_bytes = held.count
        for file in files:
            seconds = self.limits.longest_seconds
            waveform = await asyncio.get_running_loop().run_in_executor(self._decoders, decode, file, seconds)
            room -= len(waveform) / SAMPLE_RATE
            if room < 0:
                limit = f"{self.limits.request_seconds:g}"
                message = f"The files hold more than the {limit} seconds of audio that a request may have; send fewer at once."
                raise ServiceError("too_long", message)
            held.take(waveform.nbytes + num_frames(len(waveform)) * frame_bytes)
            waveforms.append(waveform)
        files.clear()
        held.give_back(body_bytes)
        while True:
            model = await self.models.find(query.model)
            layer, _ = _chosen(query, model.engine.backend)
            try:
                features = await self._together(model, waveforms, layer, query.space)
            except EngineClosedError:
                if await self.models.find(query.model) is model:
                    raise ServiceError("not_ready", "The service is stopping.") from None
                continue  # Replaced between look-up and queue.
            for item in features:
                self._metrics.record_features(item)
            return Answered(model, layer, features, many)

    async def _together(
        self, model: ServedModel, waveforms: list[Array], layer: int | None, space: Space
    ) -> list[Features]:
        # The first is refused where the queue is full; together they may be more than it ever holds.
        def run(waveform: Array, first: bool) -> Coroutine[Any, Any, Features]:
            if self.limits.long_audio and len(waveform) > self.limits.max_seconds * SAMPLE_RATE:
                return features_in_windows(model.engine, waveform, self.limits.long_audio, layer, space)
            return (model.engine.features if first else model.engine.patient_features)(waveform, layer, space)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(waveform, not index)) for index, waveform in enumerate(waveforms)]
        except ExceptionGroup as errors:
            raise _first(errors) from None
        return [task.result() for task in tasks]


def _chosen(query: Any, backend: Backend) -> tuple[int | None, int]:
    """The layer (None: all) and width that a request wants of a model."""
    layer = choose_layer(query.layer, backend.num_layers)
    dim = backend.dim if query.space == "student" else backend.teacher_dim
    if dim is None:
        raise ServiceError("bad_parameter", "Parameter 'space' is wrong: this model has no heads, so no teacher space.")
    return layer, dim


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


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
