"""Formats of features in responses: JSON, base64, npy, npz, safetensors and Arrow."""

import base64
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson
import safetensors.numpy
from fastapi import Response

from ray_distill.serve.api.errors import ServiceError
from ray_distill.serve.api.parameters import MEDIA_TYPES, Format
from ray_distill.serve.api.streaming_response import CHUNK_BYTES, streaming_response
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE

Values = npt.NDArray[np.floating[Any]]
TIMESTAMPS = "frame i covers seconds [0.02 i, 0.02 i + 0.025)"
_BASE64_BYTES = 3 * 2**16  # A multiple of three, so that chunks are encoded without padding.
_JSON_FRAMES = 256  # Frames per chunk, so that a long response is never held as text.
_MEDIA_TYPE = {name: media_type for media_type, name in MEDIA_TYPES.items() if media_type != "application/octet-stream"}


def check_format(format: Format, num_files: int) -> None:
    """Raise ServiceError ``bad_parameter`` if the format can't hold the features of several files."""
    if format == "npy" and num_files > 1:
        raise ServiceError(
            "bad_parameter", "An npy file holds one array: use npz, safetensors or arrow for several files."
        )


def features_response(
    arrays: list[Values], dtype: str, is_list: bool, format: Format, metadata: dict[str, Any]
) -> Response:
    """Return the response of ``/v1/features``. It needs at most the memory of the arrays once more.

    Args:
        arrays: Features of each file, (T, d) or (L, T, d), float32. The list is emptied.
        dtype: Data type of the values in the response, ``float32`` or ``float16``.
        is_list: Whether JSON has a list even for one file.
        format: Format of the response.
        metadata: Model, revision, layer and space, for JSON, the metadata of safetensors and Arrow, and the headers.
    """
    arrays = [arrays.pop(0).astype(dtype, copy=False) for _ in range(len(arrays))]
    metadata = metadata | {
        "dtype": str(arrays[0].dtype),
        "frame_seconds": FRAME_SAMPLES / SAMPLE_RATE,
        "frame_rate": SAMPLE_RATE / FRAME_SAMPLES,
        "timestamps": TIMESTAMPS,
    }
    headers = {
        f"x-{key.replace('_', '-')}": str(value).encode("ascii", "replace").decode() for key, value in metadata.items()
    }
    headers["x-shape"] = ";".join(",".join(map(str, array.shape)) for array in arrays)
    if format in ("json", "base64"):
        return streaming_response(_json_chunks(arrays, is_list, format, metadata), "application/json", headers)
    names = [str(index) for index in range(len(arrays))]
    text = {key: str(value) for key, value in metadata.items()}
    buffer = io.BytesIO()
    whole: memoryview
    if format == "npy":
        np.save(buffer, arrays[0], allow_pickle=False)
    elif format == "npz":
        np.savez(buffer, allow_pickle=False, **dict(zip(names, arrays, strict=True)))
    elif format == "arrow":
        _write_arrow(buffer, arrays, text)
    if format == "safetensors":
        whole = memoryview(safetensors.numpy.save(dict(zip(names, arrays, strict=True)), metadata=text))
    else:
        whole = buffer.getbuffer()
    chunks = (bytes(whole[start : start + CHUNK_BYTES]) for start in range(0, len(whole), CHUNK_BYTES))
    return streaming_response(chunks, _MEDIA_TYPE[format], headers | {"content-length": str(len(whole))})


def base64_chunks(array: Values) -> Iterator[bytes]:
    """Yield base64 of the little-endian values in C order."""
    values = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    for start in range(0, len(values), _BASE64_BYTES):
        yield base64.b64encode(values[start : start + _BASE64_BYTES].tobytes())


def _write_arrow(file: BinaryIO, arrays: list[Values], metadata: dict[str, str]) -> None:
    """Write one row per file: ``shape``, and ``features`` as the flat values in C order."""
    import pyarrow as pa  # Imported here because only this format needs it.

    kind = pa.float16() if arrays[0].dtype == np.float16 else pa.float32()
    schema = pa.schema([("shape", pa.list_(pa.int64())), ("features", pa.large_list(kind))], metadata=metadata)
    offsets = np.cumsum([0] + [array.size for array in arrays])
    flat = pa.array(np.concatenate([array.ravel() for array in arrays]), kind)
    columns = [
        pa.array([list(array.shape) for array in arrays], pa.list_(pa.int64())),
        pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat),
    ]
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))


def _json_chunks(arrays: list[Values], is_list: bool, format: Format, metadata: dict[str, Any]) -> Iterator[bytes]:
    yield orjson.dumps(metadata)[:-1]
    yield b',"data":[' if is_list else b","
    for index, array in enumerate(arrays):
        own = {"num_frames": array.shape[-2], "dim": array.shape[-1], "shape": list(array.shape)}
        if is_list:
            yield (b"," if index else b"") + orjson.dumps({"index": index} | own)[:-1] + b',"features":'
        else:
            yield orjson.dumps(own)[1:-1] + b',"features":'
        if format == "base64":
            yield b'"'
            yield from base64_chunks(array)
            yield b'"'
        else:
            yield from _nested_chunks(array)
        yield b"}" if is_list else b""
    yield b"]}" if is_list else b"}"


def _nested_chunks(features: Values) -> Iterator[bytes]:
    """Yield JSON lists of the shortest decimals that parse to the same float32; every float16 is exact in float32."""
    yield b"["
    if features.ndim == 3:
        for index, layer in enumerate(features):
            yield b"," if index else b""
            yield from _nested_chunks(layer)
    else:
        for start in range(0, len(features), _JSON_FRAMES):
            values = np.ascontiguousarray(features[start : start + _JSON_FRAMES], np.float32)
            chunk = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
            yield b"," + chunk if start else chunk
    yield b"]"
