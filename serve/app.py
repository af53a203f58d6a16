"""The FastAPI application: audio in, student features out."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ray_distill.serve.api.admission import Admission, Held, Limits
from ray_distill.serve.api.embeddings import embeddings_answer
from ray_distill.serve.api.errors import STATUS, ErrorResponse, ErrorType, ServiceError
from ray_distill.serve.api.formats import check_form, render
from ray_distill.serve.api.observation import Metrics, Observed
from ray_distill.serve.api.openapi import BINARY_ANSWERS, describe
from ray_distill.serve.api.parameters import EmbeddingsQuery, FeaturesQuery, Format, format_accepted
from ray_distill.serve.api.request_handler import Asker
from ray_distill.serve.api.schemas import EmbeddingsResponse, FeaturesResponse, ModelList, ModelRecord
from ray_distill.serve.api.streaming_response import PatientSending
from ray_distill.serve.inference.backends import BackendOptions
from ray_distill.serve.inference.engine import BatchLimits
from ray_distill.serve.inference.models import Models, ServedModel, Source, model_name
from ray_distill.serve.page import add_page


def create_app(
    model: Source,
    *,
    name: str | None = None,
    more: Mapping[str, Source] | None = None,
    library: str | Path | None = None,
    library_loaded: int = 4,
    backend: BackendOptions | None = None,
    limits: Limits | None = None,
    batch: BatchLimits | None = None,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Build the service around one student or several. ``app.state.models.put(name, student)`` replaces one of them.

    Example:
        >>> app = create_app("runs/demo/export", limits=Limits(max_seconds=30))
        >>> uvicorn.run(app)

    Args:
        model: a student, the folder of one as ``student.save_student`` writes it, or a file of ``export --format onnx``.
        name: what answers call the model. Default: the folder's name (of ``NAME/export``: NAME), or ``student``.
        more: further ones, by name.
        library, library_loaded: models loaded when asked for, as `Models`.
        backend: how models are run; the defaults of `BackendOptions`.
        limits: what requests may take; the defaults of `Limits`.
        batch: bounds of batches and the queue; the defaults of `BatchLimits`.
        api_keys: clients of /v1 and /info must send one as a bearer token; none: everyone may ask.
        cors_origins: origins whose pages may ask from a browser, ``*`` for all; none: only the service's own.

    Raises:
        ValueError: a limit that is not positive, a device that isn't there, or a folder without a readable student.
    """
    limits, batch = limits or Limits(), batch or BatchLimits()
    # A request with more than the queue holds would fill it alone.
    most = max(limits.longest_seconds, batch.queue_seconds)
    limits = replace(limits, request_seconds=min(most, max(limits.request_seconds, limits.longest_seconds)))
    admission = Admission(limits, api_keys)
    metrics = Metrics()
    models = Models(backend or BackendOptions(), batch, metrics.record_batch, library, library_loaded)
    models.put(name or model_name(model), model)
    for other, source in (more or {}).items():
        models.put(other, source)
    asker = Asker(models, limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # Uvicorn has waited for the open requests by now.
        await anyio.to_thread.run_sync(asker.close)
        await anyio.to_thread.run_sync(models.close)

    app = FastAPI(
        title="Student speech features",
        version="1",
        description="Frame-level speech features (one vector per 20 ms) from a distilled student of HuBERT, WavLM or "
        "wav2vec 2.0. The same audio always gets the same features, whatever else is being served.",
        lifespan=lifespan,
    )
    app.state.models, app.state.admission = models, admission
    app.state.leaving = False  # Set by whoever stops the service, so that balancers send no more.
    add_page(app)
    _add_status_routes(app, models, admission, metrics)
    _add_error_handlers(app, metrics)
    app.add_middleware(Observed, metrics=metrics)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["*"],
        )
    app.add_middleware(PatientSending, seconds=limits.deadline_seconds)  # Outermost.
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
    async def features(request: Request, held: Annotated[Held, Depends(admission.admit)]) -> Response:
        """The student's hidden states (or its guess of the teacher's) for each audio file of the request."""

        def form(query: FeaturesQuery) -> Format:
            return query.format or format_accepted(request.headers.get("accept", ""))

        query, answered = await asker.answer(
            request, held, FeaturesQuery, lambda query, num_files: check_form(form(query), num_files)
        )
        about = {
            "model": answered.model.name,
            "revision": answered.model.revision,
            "layer": answered.layer or "all",
            "space": query.space,
        }
        headers = answered.headers()
        arrays = [item.array for item in answered.features]
        answered.features.clear()
        response = await anyio.to_thread.run_sync(render, arrays, query.dtype, answered.many, form(query), about)
        response.headers.update(headers)
        return response

    @app.post(
        "/v1/embeddings",
        summary="One vector for each audio file, in the shape of OpenAI's embeddings",
        tags=["features"],
        response_class=Response,
        responses={200: {"model": EmbeddingsResponse, "description": "The embeddings."}, **refusals},
        openapi_extra=describe(EmbeddingsQuery),
    )
    async def embeddings(request: Request, held: Annotated[Held, Depends(admission.admit)]) -> Response:
        """Features pooled over frames."""
        query, answered = await asker.answer(request, held, EmbeddingsQuery)
        return await anyio.to_thread.run_sync(embeddings_answer, query, answered)

    return app


def _add_status_routes(app: FastAPI, models: Models, admission: Admission, metrics: Metrics) -> None:
    @app.get("/healthz", summary="Is the service alive?", tags=["service"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Is every model loaded, warmed up and taking work?", tags=["service"])
    async def readyz() -> dict[str, str]:
        if app.state.leaving or not all(model.engine.alive for model in models):
            raise ServiceError("not_ready", "The service is stopping, or a model takes no work.")
        return {"status": "ready"}

    @app.get("/info", summary="Models and limits", tags=["service"])
    async def info(request: Request) -> dict[str, Any]:
        admission.check_key(request)
        return {"models": [_record(model) for model in models], "limits": asdict(admission.limits)}

    @app.get("/v1/models", summary="The models to choose from; the first is the default", tags=["features"])
    async def list_models(request: Request) -> ModelList:
        admission.check_key(request)
        served = [_record(model) for model in models]
        others = (await anyio.to_thread.run_sync(models.in_library)).keys() - {record.id for record in served}
        return ModelList(data=served, library=sorted(others))

    @app.get("/metrics", summary="Prometheus metrics", tags=["service"], response_class=Response)
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
