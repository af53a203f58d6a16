"""Parameters of requests, and their checks."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import QueryParams

from ray_distill.serve.api.errors import ServiceError
from ray_distill.teacher_cache.frames import SAMPLE_RATE

Format = Literal["json", "base64", "npy", "npz", "safetensors", "arrow"]
Pooling = Literal["mean", "max", "mean_std"]


class CommonQuery(BaseModel):
    """Parameters of every route that accepts audio; unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any) -> Any:
        """Refuse true and false, which would be read as the numbers 1 and 0."""
        if isinstance(value, bool):
            raise ValueError("no parameter is true or false")
        return value

    model: str | None = Field(None, description="Name of a model in /v1/models. Default: the first one.")
    space: Literal["student", "teacher"] = Field(
        "student",
        description="student: hidden states of the student. teacher: its predictions of the teacher's layers.",
    )
    timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Time limit of the request, in seconds; after it the response is 504. The service's own limit also holds.",
    )


class FeaturesQuery(CommonQuery):
    """Parameters of ``/v1/features``, in the query string or beside ``input`` in a JSON body."""

    layer: int | Literal["last", "all"] = Field(
        "last", description="Transformer layer counted from 1, 'last', or 'all' for every layer at once."
    )
    format: Format | None = Field(None, description="Format of the response. Default: chosen by the Accept header.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Data type of the values.")


class StreamQuery(CommonQuery):
    """Parameters of ``/v1/features/stream``, in the query string."""

    layer: int | Literal["last", "all"] = Field(
        "last", description="Transformer layer counted from 1, 'last', or 'all' for every layer at once."
    )
    format: Literal["json", "binary"] = Field(
        "json",
        description="json: each window is one text message. binary: its values are a binary message after the text message.",
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="Data type of the values.")
    encoding: Literal["s16le", "f32le"] = Field(
        "s16le", description="Encoding of the samples: 16-bit integers, or floats of which 1 is full scale."
    )
    rate: int = Field(SAMPLE_RATE, ge=2_000, description="Sampling rate in Hz.")
    channels: int = Field(1, ge=1, description="Number of interleaved channels; they are averaged.")
    window: float | None = Field(
        None, allow_inf_nan=False, description="Length of a window in seconds. Default: the service's window_seconds."
    )
    overlap: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Minimum overlap of two windows in seconds, at most half of a window. Default: the service's overlap_seconds.",
    )
    timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Longest wait for audio, and for the features of a window, in seconds.",
    )


class EmbeddingsQuery(CommonQuery):
    """Parameters of ``/v1/embeddings``, in the query string or beside ``input`` in a JSON body."""

    layer: int | Literal["last"] = Field("last", description="Transformer layer counted from 1, or 'last'.")
    pooling: Pooling = Field(
        "mean", description="How frames are pooled; 'mean_std' is the mean followed by the standard deviation."
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or base64 of little-endian float32 values, as in OpenAI's API."
    )
    user: str | None = Field(None, description="Ignored; accepted for clients of OpenAI's API.")


Query = TypeVar("Query", bound=CommonQuery)


def parse_parameters(kind: type[Query], query: QueryParams, members: dict[str, Any]) -> Query:
    """Return the parameters of a request, each from the query string or from a member of a JSON body.

    Raises:
        ServiceError: ``bad_parameter``, also for one that is repeated, or ``bad_layer`` if the layer is wrong.
    """
    if repeated := [name for name in query if len(query.getlist(name)) > 1 or name in members]:
        raise ServiceError("bad_parameter", f"Parameter {repeated[0][:40]!r} is given several times; give it once.")
    try:
        return kind.model_validate({**query, **members})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name == "layer":
            raise _bad_layer(first["input"]) from error
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ServiceError("bad_parameter", f"Parameter {name[:40]!r} is unknown; use {known}.") from error
        raise ServiceError("bad_parameter", f"Parameter {name[:40]!r} is wrong: {first['msg'].lower()}.") from error


def choose_layer(layer: int | str, num_layers: int) -> int | None:
    """Return the number of a layer counted from 1, or None for all.

    Raises:
        ServiceError: ``bad_layer`` if the model has no such layer.
    """
    if layer == "all":
        return None
    if layer == "last":
        return num_layers
    if isinstance(layer, int) and 1 <= layer <= num_layers:
        return layer
    raise _bad_layer(layer, num_layers)


def _bad_layer(layer: object, num_layers: int | None = None) -> ServiceError:
    numbers = "a number counted from 1" if num_layers is None else f"a number from 1 to {num_layers}"
    message = f"The model has no layer {str(layer)[:40]!r}: use {numbers}, 'last', or 'all' (for features only)."
    return ServiceError("bad_layer", message)


MEDIA_TYPES: dict[str, Format] = {
    "application/json": "json",
    "application/x-npy": "npy",
    "application/octet-stream": "npy",
    "application/x-npz": "npz",
    "application/vnd.safetensors": "safetensors",
    "application/vnd.apache.arrow.file": "arrow",
}


def accepted_format(accept: str) -> Format:
    """Return the format that an Accept header prefers (RFC 9110, section 12.5.1); JSON if it names no supported type."""
    best: Format = "json"
    best_quality = 0.0
    for item in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        quality = _quality(weight)
        if media_type in MEDIA_TYPES and quality > best_quality:
            best, best_quality = MEDIA_TYPES[media_type], quality
    return best


def _quality(weight: str) -> float:
    try:
        return float(weight)
    except ValueError:
        return 0.0
