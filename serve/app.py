"""The FastAPI application: audio in, student features out."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import monotonic
from typing import Annotated, Any

import anyio
from fastapi import Depends, FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ray_distill.serve.api.admission import Admission, HeldBytes
from ray_distill.serve.api.cross_origin import CrossOriginMiddleware
from ray_distill.serve.api.embeddings import embeddings_response
from ray_distill.serve.api.errors import ErrorType, ServiceError
from ray_distill.serve.api.formats import check_format, features_response
from ray_distill.serve.api.metrics import Metrics
from ray_distill.serve.api.observability import ObservabilityMiddleware, record_of
from ray_distill.serve.api.openapi import BINARY_RESPONSES, COMMON_HEADERS, ERROR_RESPONSES, FEATURE_HEADERS, describe
from ray_distill.serve.api.parameters import EmbeddingsQuery, FeaturesQuery, Format, accepted_format
from ray_distill.serve.api.request_handler import RequestHandler
from ray_distill.serve.api.schemas import (
    EmbeddingsResponse,
    FeaturesResponse,
    ModelList,
    ModelRecord,
    SeveralFeaturesResponse,
)
from ray_distill.serve.api.streaming_response import SendTimeoutMiddleware
from ray_distill.serve.api.traces import Traces
from ray_distill.serve.inference.models import Models, ServedModel, Source, default_name
from ray_distill.serve.page import add_page
from ray_distill.serve.reference import add_reference
from ray_distill.serve.settings import AppSettings
from ray_distill.serve.streams.session import add_streams


def create_app(
    model: Source,
    settings: AppSettings | None = None,
    *,
    more: Mapping[str, Source] | None = None,
    **keywords: Any,
) -> FastAPI:
    """Build the service around one student or several. ``app.state.models.put(name, student)`` replaces one of them.

    Example:
        >>> app = create_app("runs/demo/export", max_seconds=30)
        >>> uvicorn.run(app)

    Args:
        model: Student, folder written by ``student.save_student``, or file written by ``export --format onnx``.
        settings: Settings of the application. Default: ``AppSettings(**keywords)``.
        more: Further models, by name.
        keywords: Settings by name, or in the tables ``limits``, ``batch`` and ``backend``; see `AppSettings`.

    Raises:
        ValueError: a setting is impossible, the device doesn't exist, a folder holds no readable student, or two models have one
            name.
    """
    assert settings is None or not keywords, "give the settings once"
    settings = AppSettings(**keywords) if settings is None else settings
    # A request with more audio than the queue holds would fill the queue alone.
    most = max(settings.longest_seconds, settings.queue_seconds)
    request_seconds = min(most, max(settings.request_seconds, settings.longest_seconds))
    settings = settings.model_copy(update={"request_seconds": request_seconds})
    admission = Admission(settings, settings.read_api_keys())
    metrics = Metrics()
    traces = Traces() if settings.traces else None
    models = Models(settings, metrics.record_batch, lambda outcome: metrics.loads.labels(outcome).inc())
    name = settings.name or default_name(model)
    if more and name in more:
        raise ValueError(f"Two models are named {name!r}: give one of them another name.")
    for each, source in {name: model, **(more or {})}.items():
        models.put(each, source)
    handler = RequestHandler(models, settings, metrics)
    metrics.watch(models, lambda: admission.held_bytes, lambda: handler.decoders.waiting_seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # Uvicorn has already waited for the open requests.
        await anyio.to_thread.run_sync(handler.close)
        await anyio.to_thread.run_sync(models.close)
        if traces:
            await anyio.to_thread.run_sync(traces.close)

    app = FastAPI(
        title="Student speech features",
        version="1",
        description="Frame-level speech features (one vector per 20 ms) from a distilled student of HuBERT, WavLM or "
        "wav2vec 2.0. The features of an audio file do not depend on other requests. Audio that is still being recorded is sent "
        "to the WebSocket /v1/features/stream, which OpenAPI can't describe; docs/in-depth/serving.md does.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # A redirect would have the Host header of the request in its Location.
    )
    app.state.models, app.state.admission = models, admission

    def reload() -> None:
        admission.reload_keys(settings.read_api_keys)
        models.reload()

    app.state.reload = reload  # Called on SIGHUP.
    app.state.draining = False  # Set when the service is about to stop, so that load balancers send no new requests.
    add_page(app)
    add_reference(app)
    _add_status_routes(app, models, admission, metrics)
    _add_error_handlers(app, metrics)
    app.add_middleware(ObservabilityMiddleware, metrics=metrics, traces=traces)
    if settings.cors_origins:
        app.add_middleware(
            CrossOriginMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "traceparent", "x-request-id"],
            expose_headers=["*"],
        )
    app.add_middleware(SendTimeoutMiddleware, seconds=settings.deadline_seconds)  # The outermost middleware.
    _add_feature_routes(app, admission, handler, needs_key=settings.api_keys is not None)
    add_streams(app, models, admission, metrics, settings.cors_origins)
    return app


def _add_feature_routes(app: FastAPI, admission: Admission, handler: RequestHandler, needs_key: bool) -> None:
    # The scheme gives /docs its button for the key; `Admission` checks it.
    security = [Depends(HTTPBearer(auto_error=False, description="An API key of this service."))] if needs_key else []

    @app.post(
        "/v1/features",
        summary="Compute the features of audio files, one vector per 20 ms",
        tags=["features"],
        response_class=Response,
        responses={
            200: {
                "model": FeaturesResponse | SeveralFeaturesResponse,
                "description": "The features.",
                "content": BINARY_RESPONSES,
                "headers": FEATURE_HEADERS,
            },
            **ERROR_RESPONSES,
        },
        dependencies=security,
        openapi_extra=describe(FeaturesQuery),
    )
    async def features(request: Request, held: Annotated[HeldBytes, Depends(admission.admit)]) -> Response:
        """Return the student's hidden states, or its predictions of the teacher's layers, for each audio file."""

        def response_format(query: FeaturesQuery) -> Format:
            return query.format or accepted_format(request.headers.get("accept", ""))

        query, result = await handler.handle(
            request, held, FeaturesQuery, lambda query, num_files: check_format(response_format(query), num_files)
        )
        metadata = {
            "model": result.model.name,
            "revision": result.model.revision,
            "layer": result.layer or "all",
            "space": query.space,
        }
        headers = result.headers()
        arrays = [item.array for item in result.features]
        result.features.clear()
        started = monotonic()
        response = await anyio.to_thread.run_sync(
            features_response, arrays, query.dtype, result.is_list, response_format(query), metadata
        )
        record_of(request).steps.append(("encode the response", started, monotonic() - started))
        response.headers.update(headers)
        return response

    @app.post(
        "/v1/embeddings",
        summary="Compute one vector per audio file, in the shape of OpenAI's embeddings",
        tags=["features"],
        response_class=Response,
        responses={
            200: {"model": EmbeddingsResponse, "description": "The embeddings.", "headers": COMMON_HEADERS},
            **ERROR_RESPONSES,
        },
        dependencies=security,
        openapi_extra=describe(EmbeddingsQuery),
    )
    async def embeddings(request: Request, held: Annotated[HeldBytes, Depends(admission.admit)]) -> Response:
        """Return the features of each audio file, pooled over frames."""
        query, result = await handler.handle(request, held, EmbeddingsQuery)
        return await anyio.to_thread.run_sync(embeddings_response, query, result)


def _add_status_routes(app: FastAPI, models: Models, admission: Admission, metrics: Metrics) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Check that the service is alive", tags=["service"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Check that every model is loaded, warmed up and accepts work", tags=["service"])
    async def readyz() -> dict[str, str]:
        if app.state.draining or not all(model.engine.alive for model in models):
            raise ServiceError("not_ready", "The service is stopping, or inference has failed.")
        return {"status": "ready"}

    @app.get("/info", summary="Describe the models and the limits", tags=["service"])
    async def info(request: Request) -> dict[str, Any]:
        admission.check_key(request)
        return {"models": [_record(model) for model in models], "limits": admission.limits.record()}

    @app.get("/v1/models", summary="List the models; the first is the default", tags=["features"])
    async def list_models(request: Request) -> ModelList:
        admission.check_key(request)
        served = [_record(model) for model in models]
        others = (await anyio.to_thread.run_sync(models.in_library)).keys() - {record.id for record in served}
        return ModelList(data=served, library=sorted(others))

    default = next(iter(models)).name

    @app.get(
        "/v1/models/{name}",
        summary="Describe a model; one of the library is loaded first",
        tags=["features"],
        responses={status: ERROR_RESPONSES[status] for status in (401, 404, 503)},
    )
    async def show_model(
        request: Request, name: Annotated[str, PathParameter(description="NAME or NAME@REVISION.", examples=[default])]
    ) -> ModelRecord:
        admission.check_key(request)
        return _record(await models.find(name))

    @app.get("/metrics", summary="Show the Prometheus metrics", tags=["service"], response_class=Response)
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _record(model: ServedModel) -> ModelRecord:
    backend = model.engine.backend
    return ModelRecord(
        id=model.name,
        revision=model.revision,
        layers=backend.num_layers,
        dim=backend.dim,
        teacher_dim=backend.teacher_dim,
        parameters=backend.num_parameters,
        runtime=backend.runtime,
        device=backend.device,
    )


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Give every failure, including those of the framework, the shape of ``ErrorResponse``."""

    def count_and_respond(request: Request, error: ServiceError) -> Response:
        record_of(request).error_type = error.error_type
        metrics.errors.labels(error.error_type).inc()
        return error.response()

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> Response:
        return count_and_respond(request, error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kinds: dict[int, ErrorType] = {404: "not_found", 405: "method_not_allowed"}
        detail = str(error.detail).lower()
        message = f"{request.method} {request.url.path[:80]!r} failed: {detail}. The routes are listed at /docs."
        kind = kinds.get(error.status_code, "bad_request")
        return count_and_respond(request, ServiceError(kind, message, dict(error.headers or {})))

    @app.exception_handler(ClientDisconnect)
    async def client_disconnected(request: Request, _: ClientDisconnect) -> Response:
        error = ServiceError("client_disconnected", "The client disconnected before the response.")
        return count_and_respond(request, error)
