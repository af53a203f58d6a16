"""The parts of the OpenAPI schema that FastAPI can't derive: bodies of several types, and parameters in two places."""

import base64
from typing import Any

from pydantic import BaseModel

from ray_distill.serve.api.errors import STATUS, ErrorResponse
from ray_distill.serve.api.parameters import MEDIA_TYPES

_BINARY = {"schema": {"type": "string", "format": "binary"}}
BINARY_RESPONSES: dict[str, Any] = {
    media_type: _BINARY for media_type in MEDIA_TYPES if media_type != "application/json"
}
"""Formats of features other than JSON, as OpenAPI's ``content``."""


def _headers(**descriptions: str) -> dict[str, Any]:
    return {
        name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
        for name, text in descriptions.items()
    }


COMMON_HEADERS = _headers(
    x_request_id="ID of the request: the client's own, or a new one.",
    traceparent="Span of the request (W3C Trace Context).",
    x_queue_time="Longest time of a file in the queue, in seconds.",
    x_inference_time="Longest inference time of a file's batch, in seconds.",
    x_windows="Number of windows of each file, separated by semicolons.",
)
"""Headers of every response with features or embeddings, as OpenAPI's ``headers``."""
FEATURE_HEADERS = COMMON_HEADERS | _headers(
    x_model="Name of the model.",
    x_revision="Revision of the model.",
    x_layer="Layer of the features, or all.",
    x_space="student or teacher.",
    x_dtype="Data type of the values.",
    x_shape="Shape of each file's features, as comma-separated numbers; the files are separated by semicolons.",
    x_frame_seconds="Seconds between the starts of neighbouring frames.",
    x_frame_rate="Frames per second.",
    x_timestamps="The seconds that frame i covers.",
)
"""Headers of responses with features."""
_ERROR_HEADERS = {
    401: _headers(www_authenticate="Bearer."),
    429: _headers(retry_after="Seconds after which the work that is now admitted is expected to be complete."),
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "model": ErrorResponse,
        "description": ", ".join(kind for kind in STATUS if STATUS[kind] == status),
        "headers": _headers(x_request_id="ID of the request.") | _ERROR_HEADERS.get(status, {}),
    }
    for status in sorted({*STATUS.values()} - {405, 499})
}
"""Errors of the routes that accept audio. 405 is for other methods, and a client that has disconnected sees no 499."""
_WAV_HEADER = bytes.fromhex("524946464403000057415645666d74201000000001000100803e0000007d0000020010006461746120030000")
"""Header of 400 samples, 16 bits each, at 16 kHz."""
_RAW_TYPES = ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "application/octet-stream")
_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
}


def describe(query: type[BaseModel]) -> dict[str, Any]:
    """Return ``requestBody`` and ``parameters`` of a route that accepts audio and these parameters."""
    properties: dict[str, Any] = query.model_json_schema()["properties"]
    base64_string = {"type": "string", "contentEncoding": "base64"}
    body = {
        "type": "object",
        "required": ["input"],
        "additionalProperties": False,
        "properties": {"input": {"anyOf": [base64_string, {"type": "array", "items": base64_string}]}, **properties},
    }
    # 25 ms of silence, so that the example is a whole request.
    silence = base64.b64encode(_WAV_HEADER + bytes(800)).decode()
    wanted = {"layer": 2, "format": "base64"} if "format" in properties else {"pooling": "mean_std"}
    examples = {
        "one file": {"value": {"input": silence}},
        "several files with parameters": {"value": {"input": [silence, silence], **wanted}},
    }
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()
        ],
        "requestBody": {
            "required": True,
            "description": "Audio files: wav, flac, ogg (Vorbis, Opus) or mp3; /info has the limits on sampling rate and channels. "
            "Channels are averaged, and the audio is resampled to 16 kHz.",
            "content": {
                **dict.fromkeys(_RAW_TYPES, _BINARY),
                "multipart/form-data": {"schema": _FORM},
                "application/json": {"schema": body, "examples": examples},
            },
        },
    }
