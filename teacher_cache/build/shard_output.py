"""A shard file while it is written: one row group per utterance, and the commit record at the end."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.teacher_cache.build.shard_audio import ShardAudio
from ray_distill.teacher_cache.codecs import ColumnCodec
from ray_distill.teacher_cache.storage.build_statistics import TeacherTime
from ray_distill.teacher_cache.storage.cache import (
    CONTENT_KEY,
    Cache,
    ShardFile,
    column_name,
    file_record,
    write_commit,
)
from ray_distill.teacher_cache.storage.cache_spec import Part
from ray_distill.teacher_cache.storage.shard_plan import Shard


class EncodedPart:
    """What the encoding of a part needs, and which utterances it could not encode.

    Args:
        part: The part.
        codecs: Codecs of its columns; none for a part without features.
        failed: Reasons by id for utterances that have failed before.

    Attributes:
        failed: Reasons by id for all utterances that have failed.
    """

    def __init__(self, part: Part, codecs: tuple[ColumnCodec, ...], failed: Mapping[str, str]) -> None:
        self.part, self.codecs, self.failed = part, codecs, dict(failed)

    def fail(self, failed: Mapping[str, str]) -> None:
        """Leave out utterances, with reasons by id. The first reason of an utterance counts."""
        self.failed = {**failed, **self.failed}


class ShardOutput(EncodedPart):
    """A shard file that is being written, with one row group per utterance in the shard's order, without the failed ones.

    Attributes:
        rows: Number of rows written so far.
    """

    def __init__(
        self, path: Path, file: ShardFile, codecs: tuple[ColumnCodec, ...], shard: Shard, audio: ShardAudio
    ) -> None:
        super().__init__(file.part, codecs, audio.failed)
        self.rows = 0
        self._shard = shard
        part = file.part
        self._audio = audio.embedded if part.has_audio else None
        fields = [pa.field("id", pa.string(), nullable=False)]
        if self._audio is not None:
            fields.append(pa.field("num_samples", pa.int64(), nullable=False))
            if part.kind != "audio":  # An audio store is not for one teacher, which would count the frames.
                fields.append(pa.field("num_frames", pa.int64(), nullable=False))
            fields.append(pa.field("audio", pa.large_binary(), nullable=False))
        if part.draw is not None:
            fields.append(pa.field("mask", pa.list_(pa.field("element", pa.bool_(), nullable=False)), nullable=False))
        compression = {field.name: "none" for field in fields}
        for codec in codecs:
            fields.append(pa.field(column_name(codec.layers), pa.large_binary(), nullable=False))
            compression[fields[-1].name] = codec.compression
        self._schema = pa.schema(fields, metadata={CONTENT_KEY: file.content})
        # Statistics of codes are useless, and dictionary encoding would double the time.
        self.writer = pq.ParquetWriter(
            path,
            self._schema,
            compression=compression,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def write(self, rows: list[int], codes: list[np.ndarray], masks: np.ndarray | None) -> None:
        """Append rows of the shard. Codes hold the kept frames of all rows, concatenated."""
        starts = [0] * len(codes)
        for b, row in enumerate(rows):
            frames = self._shard.num_frames[row]
            values: list[Any] = [self._shard.utterances[row].id]
            kept = frames
            if self._audio is not None:
                counts = [] if self.part.kind == "audio" else [frames]
                values += [self._shard.utterances[row].num_samples, *counts, self._audio[row]]
            if masks is not None:
                values.append(masks[b, :frames])
                if self.part.kind == "masked" and not self.part.at_masked:
                    kept -= int(masks[b, :frames].sum())
            for n, (codec, column) in enumerate(zip(self.codecs, codes, strict=True)):
                value = column[starts[n] : starts[n] + kept]
                starts[n] += kept
                values.append(np.ascontiguousarray(value.T if codec.planar else value).tobytes())
            if self._shard.utterances[row].id in self.failed:
                continue
            self.rows += 1
            arrays = [pa.array([value], field.type) for value, field in zip(values, self._schema, strict=True)]
            self.writer.write_table(pa.table(arrays, schema=self._schema), row_group_size=1)


def shard_record(
    shard: Shard,
    teacher_time: TeacherTime | None = None,
    *,
    busy: float = 0.0,
    written: int = 0,
    batch_seconds: float = 0.0,
    failed: Mapping[str, str] | None = None,
    failures: Sequence[str] = (),
    notes: Sequence[str] = (),
    full: bool = False,
) -> dict[str, Any]:
    """Return what a worker tells of a shard: a row of plain values, as Ray Data passes it on.

    Its keys are ``shard`` (the number), ``utterances``, ``seconds`` (of audio), the columns of `TeacherTime`, ``bytes``, and the
    other arguments by their names.

    Args:
        shard: The shard.
        teacher_time: Time of the teacher's passes. Default: there is no teacher.
        busy: Seconds of the teacher and the codecs.
        written: Bytes written.
        batch_seconds: Seconds of audio in the teacher's batches; 0 if there were none.
        failed: Reasons by id for the utterances that the files lack, stored as JSON. Default: none.
        failures: Sentences; if there are any, the shard is not finished.
        notes: Sentences about the worker since the record before.
        full: Whether the disk is full.
    """
    record = {"shard": shard.number, "utterances": len(shard.utterances), "seconds": shard.seconds, "busy": busy}
    return (
        record
        | (teacher_time or TeacherTime()).to_columns()
        | {
            "bytes": written,
            "batch_seconds": batch_seconds,
            "failed": json.dumps(dict(failed or {})),
            "failures": list(failures),
            "notes": list(notes),
            "full": full,
        }
    )


@contextmanager
def open_output(
    cache: Cache, file: ShardFile, codecs: list[tuple[ColumnCodec, ...]], shard: Shard, audio: ShardAudio
) -> Iterator[ShardOutput]:
    """Yield a new shard file, which is moved into place and committed when the block ends without an error."""
    chosen = codecs[file.part.layer_set] if file.part.features else ()
    with cache.store.create(file.name) as path:
        output = ShardOutput(path, file, chosen, shard, audio)
        try:
            yield output
        finally:
            output.writer.close()
        record = file_record(path, output.rows, file.content, output.failed)
    write_commit(cache.store, file, record)
