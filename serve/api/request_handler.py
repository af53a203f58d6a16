"""The handling of one request from body to features: decoding, inference, deadline and disconnected clients."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request

from ray_distill.serve.api.admission import HeldBytes
from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.api.metrics import Metrics
from ray_distill.serve.api.observability import RequestRecord, record_of
from ray_distill.serve.api.parameters import Query, choose_layer, parse_parameters
from ray_distill.serve.api.request_body import is_json, read_body
from ray_distill.serve.decoders import Decoders
from ray_distill.serve.decoding import header_of
from ray_distill.serve.inference.backends import Array, Backend, Space
from ray_distill.serve.inference.engine import EngineClosedError, FeatureEngine, Features
from ray_distill.serve.inference.models import Models, ServedModel
from ray_distill.serve.inference.schedule import Reservation
from ray_distill.serve.inference.windows import features_in_windows, split_windows
from ray_distill.serve.settings import Limits
from ray_distill.teacher_cache.audio import AudioHeader
from ray_distill.teacher_cache.frames import RECEPTIVE_FIELD, SAMPLE_RATE, num_frames

Result = TypeVar("Result")


@dataclass(frozen=True)
class RequestResult:
    """Features of all files of a request.

    Attributes:
        model: Model that computed them.
        layer: Layer counted from 1, or None for all layers.
        features: Features of each file.
        is_list: Whether a JSON response has a list even for one file.
    """

    model: ServedModel
    layer: int | None
    features: list[Features]
    is_list: bool

    def headers(self) -> dict[str, str]:
        """Return the longest queue and inference times of the files in seconds, and the number of windows of each file."""
        return {
            "x-queue-time": f"{max(item.queue_seconds for item in self.features):.6f}",
            "x-inference-time": f"{max(item.inference_seconds for item in self.features):.6f}",
            "x-windows": ";".join(str(item.windows) for item in self.features),
        }


class RequestHandler:
    """Computes the features that requests ask for, within limits.

    Args:
        models: Models to choose from.
        limits: Limits of a request.
        metrics: Metrics that record each utterance.
    """

    def __init__(self, models: Models, limits: Limits, metrics: Metrics) -> None:
        self.models, self.limits = models, limits
        self._metrics = metrics
        self.decoders = Decoders(limits, metrics.decoding.observe)

    def close(self) -> None:
        """Stop the decoder threads."""
        self.decoders.close()

    async def handle(
        self,
        request: Request,
        held: HeldBytes,
        kind: type[Query],
        check: Callable[[Query, int], None] = lambda query, num_files: None,
    ) -> tuple[Query, RequestResult]:
        """Return the parameters of a request and the features of its files.

        Args:
            request: Admitted request.
            held: Memory that the request holds; it grows with the body, the audio and the response.
            kind: Class of the parameters.
            check: Called with the parameters and the number of files before any file is decoded; it may refuse them.

        Raises:
            ServiceError: The request is refused or fails; every error type except ``internal`` is possible.
            ClientDisconnect: The client disconnected; its work is cancelled.
        """
        limit = self.limits.deadline_seconds
        due = time.monotonic() + limit
        try:
            async with asyncio.timeout(limit) as deadline:

                def shorten(timeout: float | None) -> None:
                    nonlocal limit, due
                    if timeout and timeout < limit:
                        deadline.reschedule(deadline.when() - limit + timeout)  # type: ignore[operator]
                        due -= limit - timeout
                        limit = timeout

                # The query string is checked before the body is read; a JSON body may name another model.
                early = parse_parameters(kind, request.query_params, {})
                shorten(early.timeout)
                record = record_of(request)
                model = await self.models.find(early.model)
                engine, record.model = model.engine, model.name
                if early.model or not is_json(request):
                    engine.check_room(due)
                started = time.monotonic()
                files, members, is_list = await read_body(request, self.limits.max_bytes, held)
                record.num_bytes = held.count
                record.steps.append(("read the body", started, time.monotonic() - started))
                query = parse_parameters(kind, request.query_params, members)
                shorten(query.timeout)
                check(query, len(files))
                return query, await _unless_disconnected(
                    request, self._features(query, files, is_list, held, due, record)
                )
        except TimeoutError as error:
            raise ServiceError("deadline", f"The request did not finish within {limit:g} seconds.") from error

    async def _features(
        self, query: Any, files: list[bytes], is_list: bool, held: HeldBytes, deadline: float, record: RequestRecord
    ) -> RequestResult:
        # What these checks and the admission refuse costs no decoding.
        model = await self.models.find(query.model)
        record.model = model.name
        layer, dim = resolve_layer(query, model.engine.backend)
        model.engine.check_room(deadline)
        headers = [await anyio.to_thread.run_sync(header_of, file, self.limits) for file in files]
        delay = self.decoders.admit(headers)
        lengths = [_samples(header, self.limits) for header in headers]
        reservation = self._admit(model.engine, lengths, layer, deadline, delay)
        try:
            # Memory of a frame: the features, and the response that is made of them.
            frame_bytes = 2 * 4 * dim * (model.engine.backend.num_layers if layer is None else 1)
            body_bytes = held.count
            started = time.monotonic()
            waveforms = await self._decode(files, headers, frame_bytes, held)
            record.steps.append(("decode", started, time.monotonic() - started))
            record.audio_seconds = sum(map(len, waveforms)) / SAMPLE_RATE
            held.release(body_bytes)
            longer = sum(map(len, waveforms)) > sum(lengths) + SAMPLE_RATE
            lengths = [len(waveform) for waveform in waveforms]
            while True:
                current = await self.models.find(query.model)
                layer, _ = resolve_layer(query, current.engine.backend)
                if longer or current is not model:  # The headers promised less, or the model has been replaced.
                    model.engine.release(reservation)
                    reservation = self._admit(current.engine, lengths, layer, deadline)
                    longer, model = False, current
                try:
                    features = await self._run(model, waveforms, layer, query.space, reservation)
                except EngineClosedError:
                    if await self.models.find(query.model) is model:
                        raise ServiceError("not_ready", "The service is stopping.") from None
                    continue  # The model was replaced after it was looked up.
                for item in features:
                    self._metrics.record_features(item)
                    end = item.completed
                    record.steps.append(("wait", end - item.inference_seconds - item.queue_seconds, item.queue_seconds))
                    record.steps.append(("inference", end - item.inference_seconds, item.inference_seconds))
                return RequestResult(model, layer, features, is_list)
        finally:
            model.engine.release(reservation)

    def _admit(
        self, engine: FeatureEngine, lengths: list[int], layer: int | None, deadline: float, delay: float = 0.0
    ) -> Reservation:
        windows: list[int] = []
        for length in lengths:
            if self._in_windows(length):
                split = split_windows(length, self.limits.window_seconds, self.limits.overlap_seconds)
                windows += [window.samples.stop - window.samples.start for window in split]
            else:
                windows.append(length)
        return engine.admit(windows, layer, deadline, delay)

    def _in_windows(self, num_samples: int) -> bool:
        return self.limits.long_audio == "windows" and num_samples > self.limits.max_seconds * SAMPLE_RATE

    async def _decode(
        self, files: list[bytes], headers: list[AudioHeader], frame_bytes: int, held: HeldBytes
    ) -> list[Array]:
        """Return the waveforms of files; the list of files is emptied."""
        waveforms: list[Array] = []
        remaining_seconds = self.limits.request_seconds
        for file, header in zip(files, headers, strict=True):
            waveform = await self.decoders.decode(file, header)
            remaining_seconds -= len(waveform) / SAMPLE_RATE
            if remaining_seconds < 0:
                message = (
                    f"The files contain more than the limit of {self.limits.request_seconds:g} seconds of audio per request; "
                    "send them in several requests."
                )
                raise ServiceError("too_long", message)
            held.acquire(waveform.nbytes + num_frames(len(waveform)) * frame_bytes)
            waveforms.append(waveform)
        files.clear()
        return waveforms

    async def _run(
        self, model: ServedModel, waveforms: list[Array], layer: int | None, space: Space, reservation: Reservation
    ) -> list[Features]:
        async def run(waveform: Array) -> Features:
            if self._in_windows(len(waveform)):
                return await features_in_windows(model.engine, waveform, self.limits, layer, space, reservation)
            return await model.engine.features(waveform, layer, space, reservation)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(waveform)) for waveform in waveforms]
        except ExceptionGroup as errors:
            raise first_exception(errors) from None
        return [task.result() for task in tasks]


def _samples(header: AudioHeader, limits: Limits) -> int:
    """Return the number of samples at 16 kHz that a header promises, within the limits."""
    seconds = min(header.claimed_frames / header.rate, limits.longest_seconds)
    return max(RECEPTIVE_FIELD, round(seconds * SAMPLE_RATE))


def resolve_layer(query: Any, backend: Backend) -> tuple[int | None, int]:
    """Return the layer that a request selects (None for all) and the dimension of its features.

    Raises:
        ServiceError: ``bad_layer``, or ``bad_parameter`` if the model has no features in this space.
    """
    layer = choose_layer(query.layer, backend.num_layers)
    dim = backend.dim if query.space == "student" else backend.teacher_dim
    if dim is None:
        message = (
            "Parameter 'space' is wrong: this model has no heads that predict the teacher's layers; use 'student'."
        )
        raise ServiceError("bad_parameter", message)
    return layer, dim


def first_exception(error: BaseException) -> BaseException:
    """Return the first exception of a group that is not a group itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of ``work``; cancel it and raise ClientDisconnect if the client disconnects first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, disconnection = asyncio.ensure_future(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((result, disconnection), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        for task in (result, disconnection):
            task.cancel()
            with suppress(asyncio.CancelledError):
                if not task.done():
                    await task
