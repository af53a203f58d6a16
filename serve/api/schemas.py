"""JSON responses, as OpenAPI describes them."""

from typing import Literal

from pydantic import BaseModel, Field


class _Description(BaseModel):
    """What all features of a response have in common."""

    model: str = Field(description="Name of the model.")
    revision: str = Field(
        description="First 12 hexadecimal digits of the SHA-256 hash of its configuration and weights."
    )
    layer: int | Literal["all"] = Field(description="Layer of the features, counted from 1, or 'all'.")
    space: Literal["student", "teacher"] = Field(
        description="student: hidden states; teacher: predictions of the teacher's layers."
    )
    dtype: Literal["float32", "float16"] = Field(description="Data type of the values.")
    frame_seconds: float = Field(description="Seconds between the starts of neighbouring frames; a frame covers 25 ms.")
    frame_rate: float = Field(description="Frames per second.")
    timestamps: str = Field(description="The seconds that frame i covers.")


class _FileFeatures(BaseModel):
    """The features of one file."""

    num_frames: int = Field(description="Number of frames T = (samples at 16 kHz - 400) // 320 + 1.")
    dim: int = Field(description="Dimension d of a frame's vector.")
    shape: list[int] = Field(description="[T, d], or [L, T, d] for all layers.")
    features: list[list[float]] | list[list[list[float]]] | str = Field(
        description="Exact values as lists nested according to shape, or base64 of the little-endian values in C order."
    )


class IndexedFeatures(_FileFeatures):
    """The features of one of several files."""

    index: int = Field(description="Position of the file in the request, counted from 0.")


class FeaturesResponse(_Description, _FileFeatures):
    """Features of one audio file."""


class SeveralFeaturesResponse(_Description):
    """Features of several audio files, or of a list in JSON."""

    data: list[IndexedFeatures] = Field(description="The features of each file, in order.")


class Embedding(BaseModel):
    """The vector of one file."""

    object: Literal["embedding"]
    index: int = Field(description="Position of the file in the request, counted from 0.")
    embedding: list[float] | str = Field(description="The vector, or base64 of its little-endian float32 values.")


class EmbeddingsResponse(BaseModel):
    """Pooled features, one vector per file."""

    object: Literal["list"]
    model: str
    revision: str
    layer: int
    space: Literal["student", "teacher"]
    pooling: str
    dtype: Literal["float32"]
    shape: list[int]
    frame_rate: float
    data: list[Embedding]
    usage: dict[str, int] = Field(description="Number of frames, counted as tokens.")


class ModelRecord(BaseModel):
    """A model."""

    id: str = Field(description="Name of the model; NAME@REVISION selects exactly this revision.")
    object: Literal["model"] = "model"
    owned_by: str = "local"
    revision: str = Field(
        description="First 12 hexadecimal digits of the SHA-256 hash of its configuration and weights."
    )
    layers: int
    dim: int = Field(description="Dimension of the hidden states.")
    teacher_dim: int | None = Field(
        description="Dimension of the predictions of the teacher's layers; null if the model makes none."
    )
    parameters: int = Field(description="Number of parameters, heads included.")
    runtime: Literal["torch", "onnx"]
    device: str = Field(description="Device that runs the model.")


class ModelList(BaseModel):
    """The models; the default is first."""

    object: Literal["list"] = "list"
    data: list[ModelRecord]
    library: list[str] = Field(description="Further models, each loaded when a request first names it.")
