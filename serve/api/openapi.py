"""What OpenAPI can't learn from the code: bodies of several kinds, and parameters that may come in two places."""

from typing import Any

from pydantic import BaseModel

from ray_distill.serve.api.parameters import MEDIA_TYPES

_BINARY = {"schema": {"type": "string", "format": "binary"}}
BINARY_ANSWERS: dict[str, Any] = {media_type: _BINARY for media_type in MEDIA_TYPES if media_type != "application/json"}
"""The forms of features other than JSON, as OpenAPI's ``content``."""
_RAW_TYPES = ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "application/octet-stream")
_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
}


def describe(query: type[BaseModel]) -> dict[str, Any]:
    """``requestBody`` and ``parameters`` of a route that takes audio and these parameters."""
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
            "description": "Audio files: wav, flac, ogg (Vorbis, Opus) or mp3, of any rate and channel count. They are "
            "averaged to mono and resampled to 16 kHz.",
            "content": {
                **dict.fromkeys(_RAW_TYPES, _BINARY),
                "multipart/form-data": {"schema": _FORM},
                "application/json": {"schema": body},
            },
        },
    }
