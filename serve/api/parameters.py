"""What a request may ask for: the parameters of each route, checked."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ray_distill.serve.api.errors import ServiceError

Format = Literal["json", "base64", "npy", "npz", "safetensors", "arrow"]
Pooling = Literal["mean", "max", "mean_std"]


class CommonQuery(BaseModel):
    """Parameters of every route that takes audio; one it doesn't know is refused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Name of a model of /v1/models; the first by default.")
    space: Literal["student", "teacher"] = Field(
        "student",
        description="The student's hidden states, or its heads' projections: its guess of the teacher's layers.",
    )
    timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds after which to give up with 504."
    )


class FeaturesQuery(CommonQuery):
    """Parameters of ``/v1/features``, in the query or beside ``input`` in a JSON body."""

    layer: int | Literal["last", "all"] = Field(
        "last", description="Transformer layer, counted from 1; or 'last', or 'all' for every layer at once."
    )
    format: Format | None = Field(None, description="Form of the answer; without it the Accept header decides.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Type of the values.")


class EmbeddingsQuery(CommonQuery):
    """Parameters of ``/v1/embeddings``, in the query or beside ``input`` in a JSON body."""

    layer: int | Literal["last"] = Field("last", description="Transformer layer, counted from 1; or 'last'.")
    pooling: Pooling = Field("mean", description="Over frames; 'mean_std' is the mean, then the standard deviation.")
    encoding_format: Literal["float", "base64"] = Field("float", description="As OpenAI's: base64 of float32 values.")
    user: str | None = Field(None, description="Accepted for OpenAI's clients, and ignored.")


Query = TypeVar("Query", bound=CommonQuery)


def parse_parameters(kind: type[Query], query: dict[str, str], members: dict[str, Any]) -> Query:
    """The parameters of a request; a JSON body's members win over the query.

    Raises:
        ServiceError: ``bad_parameter``, or ``bad_layer`` where the layer is wrong.
    """
    try:
        return kind.model_validate({**query, **members})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name == "layer":
            raise _bad_layer(first["input"]) from error
        raise ServiceError("bad_parameter", f"Parameter {name[:40]!r} is wrong: {first['msg'].lower()}.") from error


def choose_layer(layer: int | str, num_layers: int) -> int | None:
    """1-based number of a layer, None for all; ServiceError ``bad_layer`` where the model lacks it."""
    if layer == "all":
        return None
    if layer == "last":
        return num_layers
    if isinstance(layer, int) and 1 <= layer <= num_layers:
        return layer
    raise _bad_layer(layer, num_layers)


def _bad_layer(layer: object, num_layers: int | None = None) -> ServiceError:
    numbers = "a number, counted from 1" if num_layers is None else f"a number from 1 to {num_layers}"
    message = f"There is no layer {str(layer)[:40]!r}: use {numbers}, 'last', or for features 'all'."
    return ServiceError("bad_layer", message)


MEDIA_TYPES: dict[str, Format] = {
    "application/json": "json",
    "application/x-npy": "npy",
    "application/octet-stream": "npy",
    "application/x-npz": "npz",
    "application/vnd.safetensors": "safetensors",
    "application/vnd.apache.arrow.file": "arrow",
}


def format_accepted(accept: str) -> Format:
    """The form an Accept header prefers (RFC 9110, 12.5.1); JSON where it names none of ours."""
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
