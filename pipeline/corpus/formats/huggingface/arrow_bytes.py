"""Where the bytes of audio are in an Arrow file, so that each is later read alone, without Arrow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_distill.first_line import first_line


@dataclass(frozen=True)
class ArrowRow:
    """A row of an Arrow file.

    Attributes:
        name: Path of the audio, as the dataset names it; empty if it doesn't.
        offset: First byte of the audio in the file. None if the row has no bytes.
        size: Number of bytes.
        labels: Values of the other columns that were asked for.
    """

    name: str
    offset: int | None
    size: int
    labels: dict[str, Any]


def _open(file: Path) -> tuple[pa.Buffer, pa.Schema, Iterator[pa.RecordBatch]]:
    with pa.memory_map(str(file)) as mapped:
        whole = mapped.read_buffer()
    try:
        stream = pa.ipc.open_stream(whole)
        return whole, stream.schema, iter(stream)
    except pa.ArrowInvalid:  # The other of Arrow's two formats.
        reader = pa.ipc.open_file(whole)
        return whole, reader.schema, (reader.get_batch(n) for n in range(reader.num_record_batches))


def read_schema(file: Path) -> pa.Schema:
    """Return the schema of an Arrow file, in the stream or the file format.

    Raises:
        pyarrow.ArrowException: It is no such file.
        OSError: It can't be opened.
    """
    return _open(file)[1]


def read_rows(file: Path, column: str, labels: list[str]) -> Iterator[ArrowRow]:
    """Yield the rows of an Arrow file. The file is mapped, and the bytes of audio are not read.

    Args:
        file: Arrow file.
        column: Column of audio: a struct with the fields ``bytes`` and ``path``.
        labels: Other columns to read.

    Raises:
        ValueError: The file can't be read, or its buffers are compressed.
    """
    try:
        whole, _, batches = _open(file)
        for batch in batches:
            batch.validate(full=True)
            audio = batch.column(column)
            fields = {audio.type.field(n).name: part for n, part in enumerate(audio.flatten())}
            data = fields["bytes"]
            starts = _starts(file, whole, data)
            valid = data.is_valid().to_pylist()
            names = fields["path"].to_pylist() if "path" in fields else [None] * len(batch)
            others = batch.select(labels).to_pylist() if labels else [{}] * len(batch)
            for n, (is_valid, name, values) in enumerate(zip(valid, names, others, strict=True)):
                offset = int(starts[n]) if is_valid else None
                yield ArrowRow(name or "", offset, int(starts[n + 1] - starts[n]), values)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{file} can't be read ({first_line(error)})") from error


def _starts(file: Path, whole: pa.Buffer, data: pa.Array) -> np.ndarray:
    """Return the positions in the file at which the values of an array of bytes start, and at the end that behind the last one."""
    _, offsets, values = data.buffers()
    width = np.int64 if pa.types.is_large_binary(data.type) else np.int32
    bounds: np.ndarray = np.frombuffer(offsets, width)[data.offset : data.offset + len(data) + 1].astype(np.int64)
    if values is None or not values.size:
        return np.zeros_like(bounds)
    if not 0 <= values.address - whole.address <= whole.size - values.size:
        raise ValueError(f"{file} is compressed, so its audio can't be read in place; save it without compression")
    bounds += values.address - whole.address
    return bounds
