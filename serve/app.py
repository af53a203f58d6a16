"""The FastAPI application: audio in, student features out."""

import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import numpy as np
import torch
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.body import read_audio_bytes
from serve.engine import Array, FeatureEngine
from serve.errors import ErrorResponse, Reason, ServiceError
from student import Student, load_student
from teacher_cache.audio import AudioError, load_audio
from teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE

MAX_SECONDS = 60.0
MAX_BYTES = 32 * 2**20
NPY = "application/x-npy"
_JSON_FRAMES = 256  # frames a piece of JSON: a long answer is never a list of Python floats as a whole
_DECODERS = 4  # audio files decoded at once, which bounds the memory of decoding

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "format": "binary", "description": "The audio file."}},
}
_REQUEST_BODY = {
    "required": True,
    "description": "An audio file: wav, flac, ogg or mp3, of any rate and channel count. It is averaged to mono "
    "and resampled to 16 kHz. Any content type but multipart/form-data means that the body is the file.",
    "content": {
        **dict.fromkeys(("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "application/octet-stream"), _BINARY),
        "multipart/form-data": {"schema": _FORM},
    },
}


class FeaturesQuery(BaseModel):
    """Query of ``/v1/features``; a parameter it doesn't know is refused."""

    model_config = ConfigDict(extra="forbid")

    layer: int | Literal["last", "all"] = Field(
        "last", description="Transformer layer, counted from 1; or 'last', or 'all' for every layer at once."
    )
    format: Literal["json", "npy"] | None = Field(
        None, description=f"Form of the answer. Without it the Accept header decides ({NPY} or JSON); JSON by default."
    )


class FeaturesResponse(BaseModel):
    """Features of one audio file."""

    model: str = Field(description="Name of the model.")
    layer: int | Literal["all"] = Field(description="The layer given, counted from 1, or 'all'.")
    num_frames: int = Field(description="Frames T = (samples at 16 kHz - 400) // 320 + 1.")
    dim: int = Field(description="Width d of a frame's vector.")
    frame_seconds: float = Field(description="Seconds between the starts of neighbouring frames; each sees 25 ms.")
    shape: list[int] = Field(description="[T, d], or [L, T, d] for all layers.")
    features: list[list[float]] | list[list[list[float]]] = Field(
        description="The encoder's hidden states, nested as in shape; the exact float32 values."
    )


class Health(BaseModel):
    """What is being served."""

    status: Literal["ok"] = "ok"
    model: str = Field(description="Name of the model.")
    layers: int = Field(description="Transformer layers to choose from.")
    dim: int = Field(description="Width of a frame's vector.")
    parameters: int = Field(description="Parameters of the student, heads included.")
    device: str = Field(description="Where inference runs.")
    max_seconds: float = Field(description="Longest audio accepted.")
    max_bytes: int = Field(description="Largest request body accepted.")


def create_app(
    model: str | Path | Student,
    *,
    name: str | None = None,
    device: str | torch.device = "cpu",
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_BYTES,
) -> FastAPI:
    """Build the service around one student.

    Example:
        >>> app = create_app("runs/demo/export", max_seconds=30)
        >>> uvicorn.run(app)

    Args:
        model: a student, or the folder of one as ``student.save_student`` writes it.
        name: what answers call the model. Default: the folder's name (of ``NAME/export``: NAME), or ``student``.
        device: where inference runs.
        max_seconds: longest audio accepted, in seconds.
        max_bytes: largest request body accepted, in bytes.

    Raises:
        ValueError: a limit that is not positive, a device that isn't there, or a folder without a readable student.
    """
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be greater than 0, not {max_seconds}.")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, not {max_bytes}.")
    if isinstance(model, str | Path):
        folder = Path(model)
        if not folder.is_dir():
            raise ValueError(f"There is no model folder at '{folder}': give the folder that the export stage wrote.")
        name = name or _run_name(folder)
        model = load_student(folder)
    name = name or "student"
    engine = FeatureEngine(model, device)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # Uvicorn has waited for the open requests by now.
        engine.close()

    app = FastAPI(
        title="Student speech features",
        version="1",
        description="Frame-level speech features (one vector per 20 ms) from a distilled student of HuBERT, WavLM or "
        "wav2vec 2.0. The same audio always gets the same features, whatever else is being served.",
        lifespan=lifespan,
    )
    _add_error_handlers(app, engine.num_layers)
    decoders = anyio.CapacityLimiter(_DECODERS)

    @app.get("/healthz", summary="Is the service alive, and what does it serve?", tags=["service"])
    async def healthz() -> Health:
        return Health(
            model=name,
            layers=engine.num_layers,
            dim=engine.dim,
            parameters=engine.num_parameters,
            device=str(engine.device),
            max_seconds=max_seconds,
            max_bytes=max_bytes,
        )

    @app.post(
        "/v1/features",
        summary="Features of one audio file",
        tags=["features"],
        response_class=Response,
        responses={
            200: {
                "model": FeaturesResponse,
                "description": f"The features: JSON, or one float32 array in NumPy's .npy format ({NPY}).",
                "content": {NPY: _BINARY},
            },
            400: {
                "model": ErrorResponse,
                "description": "`empty`: no audio; `bad_multipart`: the form is broken or holds not just one file.",
            },
            413: {
                "model": ErrorResponse,
                "description": f"`too_large`: a body over {max_bytes} bytes; `too_long`: audio over {max_seconds:g} s.",
            },
            422: {
                "model": ErrorResponse,
                "description": "`undecodable`: not an audio file the service reads; `too_short`: less than one frame "
                "(25 ms); `bad_layer`: a layer the model lacks; `bad_parameter`: another mistake in the query.",
            },
        },
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def features(request: Request, query: Annotated[FeaturesQuery, Query()]) -> Response:
        """The student's encoder hidden states for an audio file: one vector for each 20 ms."""
        layer = _choose_layer(query.layer, engine.num_layers)
        audio = await read_audio_bytes(request, max_bytes)
        waveform = await anyio.to_thread.run_sync(_decode, audio, max_seconds, limiter=decoders)
        array = await engine.features(waveform, layer)
        if (query.format or _format_accepted(request.headers.get("accept", ""))) == "npy":
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            return Response(buffer.getvalue(), media_type=NPY)
        head = {
            "model": name,
            "layer": layer or "all",
            "num_frames": array.shape[-2],
            "dim": array.shape[-1],
            "frame_seconds": FRAME_SAMPLES / SAMPLE_RATE,
            "shape": list(array.shape),
        }
        return StreamingResponse(_json_pieces(head, array), media_type="application/json")

    return app


def _run_name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name == "export" and folder.parent.name else folder.name


def _choose_layer(layer: int | str, num_layers: int) -> int | None:
    if layer == "all":
        return None
    if layer == "last":
        return num_layers
    if isinstance(layer, int) and 1 <= layer <= num_layers:
        return layer
    raise _bad_layer(layer, num_layers)


def _bad_layer(layer: object, num_layers: int) -> ServiceError:
    message = f"There is no layer {str(layer)[:40]!r}: use a number from 1 to {num_layers}, 'last' or 'all'."
    return ServiceError("bad_layer", message)


def _decode(audio: bytes, max_seconds: float) -> Array:
    try:
        return load_audio(io.BytesIO(audio), max_seconds=max_seconds)
    except AudioError as error:
        # The loader's own words are for files with names, and quote the decoder's.
        messages = {
            "empty": "The audio file holds no samples.",
            "too_short": "The audio is too short: one frame needs at least 400 samples at 16 kHz (25 ms).",
            "too_long": f"The audio is longer than the {max_seconds:g} seconds allowed.",
            "undecodable": "The body can't be decoded as audio, or is damaged: send a whole wav, flac, ogg or mp3 file.",
        }
        raise ServiceError(error.reason, messages[error.reason]) from error


def _format_accepted(accept: str) -> Literal["json", "npy"]:
    """The form an Accept header prefers (RFC 9110, 12.5.1); JSON where it names neither."""
    quality = {"json": 0.0, "npy": 0.0}
    forms = {"application/json": "json", NPY: "npy", "application/octet-stream": "npy"}
    for item in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        if media_type in forms:
            weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
            form = forms[media_type]
            quality[form] = max(quality[form], _quality(weight))
    return "npy" if quality["npy"] > quality["json"] else "json"


def _quality(weight: str) -> float:
    try:
        return float(weight)
    except ValueError:
        return 0.0


def _json_pieces(head: dict[str, Any], features: Array) -> Iterator[str]:
    yield json.dumps(head)[:-1] + ', "features": '
    yield from _nested_pieces(features)
    yield "}"


def _nested_pieces(features: Array) -> Iterator[str]:
    yield "["
    if features.ndim == 3:
        for index, layer in enumerate(features):
            yield "," if index else ""
            yield from _nested_pieces(layer)
    else:
        for start in range(0, len(features), _JSON_FRAMES):
            piece = json.dumps(features[start : start + _JSON_FRAMES].tolist())[1:-1]
            yield f", {piece}" if start else piece
    yield "]"


def _add_error_handlers(app: FastAPI, num_layers: int) -> None:
    """Give every failure, the framework's own included, the one shape of ``ErrorResponse``."""

    @app.exception_handler(ServiceError)
    async def refused(_: Request, error: ServiceError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid_query(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        parameter = str(first["loc"][1])
        if parameter == "layer":
            return _bad_layer(first["input"], num_layers).response()
        message = f"Query parameter {parameter[:40]!r} is wrong: {first['msg'].lower()}."
        return ServiceError("bad_parameter", message).response()

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        reason: Reason = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")  # type: ignore[assignment]
        message = f"Can't {request.method} {request.url.path[:80]!r}: {str(error.detail).lower()}; see /docs."
        return ServiceError(reason, message).response(dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def client_left(_: Request, __: ClientDisconnect) -> Response:
        return ServiceError("bad_request", "The client left before the whole body had arrived.").response()

    @app.exception_handler(Exception)
    async def internal(_: Request, __: Exception) -> Response:
        # Starlette raises the exception again after this answer, so its trace is logged and the client never sees it.
        return ServiceError("internal", "The service failed on this request; its log holds the cause.").response()
