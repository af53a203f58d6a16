"""The FastAPI application: audio in, student features out."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import torch
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.ask import Asker, Limits
from serve.embeddings import embeddings_answer
from serve.engine import BatchLimits
from serve.errors import STATUS, ErrorResponse, ErrorType, ServiceError
from serve.formats import render
from serve.models import Models, load_model
from serve.observation import Metrics, Observed
from serve.openapi import BINARY_ANSWERS, describe
from serve.page import add_page
from serve.parameters import EmbeddingsQuery, FeaturesQuery, format_accepted
from serve.schemas import EmbeddingsResponse, FeaturesResponse, Health, ModelList, ModelRecord
from student import Student


def create_app(
    model: str | Path | Student,
    *,
    name: str | None = None,
    more: Mapping[str, str | Path | Student] | None = None,
    device: str | torch.device = "cpu",
    max_seconds: float = Limits.max_seconds,
    max_bytes: int = Limits.max_bytes,
    deadline_seconds: float = Limits.deadline_seconds,
    max_requests: int = Limits.max_requests,
    batch: BatchLimits | None = None,
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """Build the service around one student or several. ``app.state.models.put(name, student)`` replaces one of them.

    Example:
        >>> app = create_app("runs/demo/export", max_seconds=30)
        >>> uvicorn.run(app)

    Args:
        model: a student, or the folder of one as ``student.save_student`` writes it.
        name: what answers call the model. Default: the folder's name (of ``NAME/export``: NAME), or ``student``.
        more: further students or folders, by name.
        device: where inference runs.
        max_seconds, max_bytes, deadline_seconds, max_requests: as `Limits`.
        batch: bounds of batches and the queue; the defaults of `BatchLimits`.
        api_keys: clients of /v1 must send one as a bearer token; none: everyone may ask.

    Raises:
        ValueError: a limit that is not positive, a device that isn't there, or a folder without a readable student.
    """
    batch = batch or BatchLimits()
    # What the queue can't hold would be told to come again, for ever.
    limits = Limits(max_seconds, max_bytes, deadline_seconds, max_requests, max(max_seconds, batch.queue_seconds))
    metrics = Metrics()
    models = Models(device, batch, metrics.record_batch)
    own_name, student = ("student", model) if isinstance(model, Student) else load_model(model)
    models.put(name or own_name, student)
    for other, value in (more or {}).items():
        models.put(other, value if isinstance(value, Student) else load_model(value)[1])
    asker = Asker(models, limits, metrics, api_keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # Uvicorn has waited for the open requests by now.
        await anyio.to_thread.run_sync(models.close)

    app = FastAPI(
        title="Student speech features",
        version="1",
        description="Frame-level speech features (one vector per 20 ms) from a distilled student of HuBERT, WavLM or "
        "wav2vec 2.0. The same audio always gets the same features, whatever else is being served.",
        lifespan=lifespan,
    )
    app.state.models = models
    add_page(app)
    _add_status_routes(app, asker, metrics)
    _add_error_handlers(app, metrics)
    app.add_middleware(Observed, metrics=metrics)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": ", ".join(kind for kind in STATUS if STATUS[kind] == status)}
        for status in sorted({*STATUS.values()} - {405, 500})
    }

    @app.post(
        "/v1/features",
        summary="Features of audio files, one vector for each 20 ms",
        tags=["features"],
        response_class=Response,
        responses={
            200: {"model": FeaturesResponse, "description": "The features.", "content": BINARY_ANSWERS},
            **refusals,
        },
        openapi_extra=describe(FeaturesQuery),
    )
    async def features(request: Request) -> Response:
        """The student's hidden states (or its guess of the teacher's) for each audio file of the request."""
        query, answered = await asker.answer(request, FeaturesQuery)
        about = {
            "model": answered.model.name,
            "revision": answered.model.revision,
            "layer": answered.layer or "all",
            "space": query.space,
        }
        form = query.format or format_accepted(request.headers.get("accept", ""))
        arrays = [item.array.astype(query.dtype, copy=False) for item in answered.features]
        response = await anyio.to_thread.run_sync(render, arrays, answered.many, form, about)
        response.headers.update(answered.headers())
        return response

    @app.post(
        "/v1/embeddings",
        summary="One vector for each audio file, in the shape of OpenAI's embeddings",
        tags=["features"],
        response_class=Response,
        responses={200: {"model": EmbeddingsResponse, "description": "The embeddings."}, **refusals},
        openapi_extra=describe(EmbeddingsQuery),
    )
    async def embeddings(request: Request) -> Response:
        """Features pooled over frames."""
        query, answered = await asker.answer(request, EmbeddingsQuery)
        return await anyio.to_thread.run_sync(embeddings_answer, query, answered)

    return app


def _add_status_routes(app: FastAPI, asker: Asker, metrics: Metrics) -> None:
    models, limits = asker.models, asker.limits

    @app.get("/healthz", summary="Is the service alive, and what does it serve?", tags=["service"])
    async def healthz() -> Health:
        first = models.get(None)
        return Health(
            model=first.name,
            layers=first.engine.num_layers,
            dim=first.engine.dim,
            parameters=first.engine.num_parameters,
            device=str(first.engine.device),
            max_seconds=limits.max_seconds,
            max_bytes=limits.max_bytes,
        )

    @app.get("/readyz", summary="Is every model loaded, warmed up and taking work?", tags=["service"])
    async def readyz() -> dict[str, str]:
        if not all(model.engine.alive for model in models):
            raise ServiceError("not_ready", "A model takes no work: the service is stopping.")
        return {"status": "ready"}

    @app.get("/info", summary="Models and limits", tags=["service"])
    async def info() -> dict[str, Any]:
        return {"models": [_record(model) for model in models], "limits": vars(limits)}

    @app.get("/v1/models", summary="The models to choose from; the first is the default", tags=["features"])
    async def list_models(request: Request) -> ModelList:
        asker.check_key(request)
        return ModelList(data=[_record(model) for model in models])

    @app.get("/metrics", summary="Prometheus metrics", tags=["service"], response_class=Response)
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _record(model: Any) -> ModelRecord:
    engine = model.engine
    return ModelRecord(
        id=model.name,
        revision=model.revision,
        layers=engine.num_layers,
        dim=engine.dim,
        teacher_dim=engine.teacher_dim,
        device=str(engine.device),
    )


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Give every failure, the framework's own included, the one shape of ``ErrorResponse``."""

    def refuse(error: ServiceError) -> Response:
        metrics.errors.labels(error.error_type).inc()
        return error.response()

    @app.exception_handler(ServiceError)
    async def refused(_: Request, error: ServiceError) -> Response:
        return refuse(error)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        kinds: dict[int, ErrorType] = {404: "not_found", 405: "method_not_allowed"}
        message = f"Can't {request.method} {request.url.path[:80]!r}: {str(error.detail).lower()}; see /docs."
        kind = kinds.get(error.status_code, "bad_request")
        return refuse(ServiceError(kind, message, dict(error.headers or {})))

    @app.exception_handler(ClientDisconnect)
    async def client_left(_: Request, __: ClientDisconnect) -> Response:
        return refuse(ServiceError("bad_request", "The client left before the answer."))

    @app.exception_handler(Exception)
    async def internal(_: Request, __: Exception) -> Response:
        # Starlette raises the exception again after this answer, so its trace is logged and the client never sees it.
        return refuse(ServiceError("internal", "The service failed on this request; its log holds the cause."))
