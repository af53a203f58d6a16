"""The parts of the OpenAPI schema that FastAPI can't derive: bodies of several types, and parameters in two places."""

from typing import Any

from pydantic import BaseModel

from ray_distill.serve.api.parameters import MEDIA_TYPES

_BINARY = {"schema": {"type": "string", "format": "binary"}}
BINARY_RESPONSES: dict[str, Any] = {
    media_type: _BINARY for media_type in MEDIA_TYPES if media_type != "application/json"
}
"""Formats of features other than JSON, as OpenAPI's ``content``."""
_RAW_TYPES = ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "application/octet-stream")
_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
}


def describe(query: type[BaseModel]) -> dict[str, Any]:
    """Return ``requestBody`` and ``parameters`` of a route that accepts audio and these parameters."""
    properties: dict[str, Any] = query.model_json_schema()["properties"]
    base64 = {"type": "string", "contentEncoding": "base64"}
    body = {
        "type": "object",
        "required": ["input"],
        "additionalProperties": False,
        "properties": {"input": {"anyOf": [base64, {"type": "array", "items": base64}]}, **properties},
    }
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()
        ],
        "requestBody": {
            "required": True,
            "description": "Audio files: wav, flac, ogg (Vorbis, Opus) or mp3, with any sample rate and number of channels. "
            "Channels are averaged, and the audio is resampled to 16 kHz.",
            "content": {
                **dict.fromkeys(_RAW_TYPES, _BINARY),
                "multipart/form-data": {"schema": _FORM},
                "application/json": {"schema": body},
            },
        },
    }
