"""The forms in which features are sent: JSON, base64, npy, npz, safetensors, Arrow."""

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
from ray_distill.serve.api.streaming_response import PIECE_BYTES, answer_in_pieces
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, SAMPLE_RATE

Values = npt.NDArray[np.floating[Any]]
TIMESTAMPS = "frame i covers seconds [0.02 i, 0.02 i + 0.025)"
_BASE64_BYTES = 3 * 2**16  # a multiple of three: no padding within
_JSON_FRAMES = 256  # frames a piece of JSON: a long answer is never text as a whole
_MEDIA_TYPE = {form: media_type for media_type, form in MEDIA_TYPES.items() if media_type != "application/octet-stream"}


def check_form(form: Format, num_files: int) -> None:
    """ServiceError ``bad_parameter`` where several files are wanted as one npy."""
    if form == "npy" and num_files > 1:
        raise ServiceError("bad_parameter", "An npy file holds one array: ask for npz, safetensors or arrow.")


def render(arrays: list[Values], dtype: str, many: bool, form: Format, about: dict[str, Any]) -> Response:
    """The answer to ``/v1/features``; beside the arrays it holds at most their bytes once more.

    Args:
        arrays: one a file, (T, d) or (L, T, d), float32; emptied.
        dtype: of the answer's values, float32 or float16.
        many: whether JSON gives a list even for one file.
        form: which form.
        about: model, revision, layer, space: goes into JSON, safetensors' metadata and Arrow's schema, and headers.
    """
    arrays = [arrays.pop(0).astype(dtype, copy=False) for _ in range(len(arrays))]
    about = about | {
        "dtype": str(arrays[0].dtype),
        "frame_seconds": FRAME_SAMPLES / SAMPLE_RATE,
        "frame_rate": SAMPLE_RATE / FRAME_SAMPLES,
        "timestamps": TIMESTAMPS,
    }
    headers = {
        f"x-{key.replace('_', '-')}": str(value).encode("ascii", "replace").decode() for key, value in about.items()
    }
    headers["x-shape"] = ";".join(",".join(map(str, array.shape)) for array in arrays)
    if form in ("json", "base64"):
        return answer_in_pieces(_json_answer(arrays, many, form, about), "application/json", headers)
    names = [str(index) for index in range(len(arrays))]
    text = {key: str(value) for key, value in about.items()}
    buffer = io.BytesIO()
    whole: memoryview
    if form == "npy":
        np.save(buffer, arrays[0], allow_pickle=False)
    elif form == "npz":
        np.savez(buffer, allow_pickle=False, **dict(zip(names, arrays, strict=True)))
    elif form == "arrow":
        _write_arrow(buffer, arrays, text)
    if form == "safetensors":
        whole = memoryview(safetensors.numpy.save(dict(zip(names, arrays, strict=True)), metadata=text))
    else:
        whole = buffer.getbuffer()
    pieces = (bytes(whole[start : start + PIECE_BYTES]) for start in range(0, len(whole), PIECE_BYTES))
    return answer_in_pieces(pieces, _MEDIA_TYPE[form], headers | {"content-length": str(len(whole))})


def base64_pieces(array: Values) -> Iterator[bytes]:
    """Little-endian values in C order."""
    values = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    for start in range(0, len(values), _BASE64_BYTES):
        yield base64.b64encode(values[start : start + _BASE64_BYTES].tobytes())


def _write_arrow(file: BinaryIO, arrays: list[Values], about: dict[str, str]) -> None:
    """One row a file: ``shape``, and ``features`` as the flat values in C order."""
    import pyarrow as pa  # Heavy, and only this form needs it.

    kind = pa.float16() if arrays[0].dtype == np.float16 else pa.float32()
    schema = pa.schema([("shape", pa.list_(pa.int64())), ("features", pa.large_list(kind))], metadata=about)
    offsets = np.cumsum([0] + [array.size for array in arrays])
    flat = pa.array(np.concatenate([array.ravel() for array in arrays]), kind)
    columns = [
        pa.array([list(array.shape) for array in arrays], pa.list_(pa.int64())),
        pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat),
    ]
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))


def _json_answer(arrays: list[Values], many: bool, form: Format, about: dict[str, Any]) -> Iterator[bytes]:
    yield orjson.dumps(about)[:-1]
    yield b',"data":[' if many else b","
    for index, array in enumerate(arrays):
        own = {"num_frames": array.shape[-2], "dim": array.shape[-1], "shape": list(array.shape)}
        if many:
            yield (b"," if index else b"") + orjson.dumps({"index": index} | own)[:-1] + b',"features":'
        else:
            yield orjson.dumps(own)[1:-1] + b',"features":'
        if form == "base64":
            yield b'"'
            yield from base64_pieces(array)
            yield b'"'
        else:
            yield from _nested_pieces(array)
        yield b"}" if many else b""
    yield b"]}" if many else b"}"


def _nested_pieces(features: Values) -> Iterator[bytes]:
    """The shortest decimals that are read as the same float32 (every float16 is one)."""
    yield b"["
    if features.ndim == 3:
        for index, layer in enumerate(features):
            yield b"," if index else b""
            yield from _nested_pieces(layer)
    else:
        for start in range(0, len(features), _JSON_FRAMES):
            values = np.ascontiguousarray(features[start : start + _JSON_FRAMES], np.float32)
            piece = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
            yield b"," + piece if start else piece
    yield b"]"
