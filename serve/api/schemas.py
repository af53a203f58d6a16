"""The JSON answers, as OpenAPI describes them."""

from typing import Literal

from pydantic import BaseModel, Field


class FeaturesResponse(BaseModel):
    """Features of one audio file. Several files: ``data`` lists num_frames, dim, shape and features of each instead."""

    model: str = Field(description="Name of the model.")
    revision: str = Field(description="First 12 hexadecimal digits of the SHA-256 of its weights.")
    layer: int | Literal["all"] = Field(description="The layer given, counted from 1, or 'all'.")
    space: Literal["student", "teacher"] = Field(description="Hidden states, or the heads' projections.")
    dtype: Literal["float32", "float16"] = Field(description="Type of the values.")
    frame_seconds: float = Field(description="Seconds between the starts of neighbouring frames; each sees 25 ms.")
    frame_rate: float = Field(description="Frames a second.")
    timestamps: str = Field(description="Which seconds a frame covers.")
    num_frames: int = Field(description="Frames T = (samples at 16 kHz - 400) // 320 + 1.")
    dim: int = Field(description="Width d of a frame's vector.")
    shape: list[int] = Field(description="[T, d], or [L, T, d] for all layers.")
    features: list[list[float]] | list[list[list[float]]] | str = Field(
        description="Nested as in shape, the exact values; or base64 of them, little-endian in C order."
    )


class Embedding(BaseModel):
    """One file's vector."""

    object: Literal["embedding"]
    index: int = Field(description="Place of the file in the request, from 0.")
    embedding: list[float] | str = Field(description="The vector, or base64 of its little-endian float32 values.")


class EmbeddingsResponse(BaseModel):
    """Pooled features, one vector a file."""

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
    usage: dict[str, int] = Field(description="Frames, counted as tokens.")


class ModelRecord(BaseModel):
    """One model."""

    id: str = Field(description="Its name; NAME@REVISION asks for this revision or none.")
    object: Literal["model"] = "model"
    owned_by: str = "local"
    revision: str = Field(description="First 12 hexadecimal digits of the SHA-256 of its weights.")
    layers: int
    dim: int = Field(description="Width of hidden states.")
    teacher_dim: int | None = Field(description="Width of projections; null: it has none.")
    parameters: int = Field(description="Parameters of the student, heads included.")
    runtime: Literal["torch", "onnx"]
    device: str = Field(description="Where inference runs.")


class ModelList(BaseModel):
    """The models, the default first."""

    object: Literal["list"] = "list"
    data: list[ModelRecord]
    library: list[str] = Field(description="Further models, loaded when first asked for.")
