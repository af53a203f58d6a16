"""Limits of a cache's records, which may come from a stranger. They are checked before anything is allocated from them.

Every cache that this program builds is far below the limits. A function raises ``ValueError`` with a phrase about the file.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
from torch import Tensor

from ray_distill.first_line import first_line
from ray_distill.teacher_cache.codecs import CODECS, is_joint
from ray_distill.teacher_cache.codecs.direct_sum import SIZE
from ray_distill.teacher_cache.embedded_audio import MAX_SAMPLES
from ray_distill.teacher_cache.masks import MaskPolicy
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec, LayerSet
from ray_distill.teacher_cache.storage.shard_plan import PLAN_SCHEMA, first_rows

MAX_LAYERS = 1000
MAX_DIM = 65_536
MAX_THREADS = 1024
MAX_TEXT = 4096
"""Maximum number of bytes of an id, a path or a name."""
MAX_UTTERANCES = 1_000_000_000
MAX_FILES = 100_000_000
"""Maximum number of shard files."""
MAX_STATE_HEADER = 1 << 20
"""Maximum size of the JSON header of a codec's state."""
_PLAN_BYTES_PER_ROW = 16
"""Minimum size of a row in a plan. A row has a SHA-256, whose 32 random bytes no compression removes."""
_PLAN_BATCH = 1 << 16
"""Rows of a plan that are checked at a time, before their texts are expanded."""
_THREADS = 8
"""Maximum number of row groups of a plan that are decoded side by side."""
_SMALL_PLAN = 1000
"""Number of rows that a plan of any size may have."""
_MAX_SETTING = 1_000_000
_TEXTS = ("plan", "teacher_name", "teacher_spec", "fingerprint")
_COUNTS = {"utterances": MAX_UTTERANCES, "shards": MAX_UTTERANCES, "frames": 2**62, "seconds": 2**62}


def check_identity(spec: CacheSpec, layer_sets: Sequence[LayerSet], record: Mapping[str, Any]) -> None:
    """Check ``cache.json``: its numbers and texts, and that the sets of layers are the layers of the specification."""
    for key in _TEXTS:
        value = record.get(key)
        if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
            raise ValueError(f"{key} is not a text of at most {MAX_TEXT} printable characters")
    for key, most in _COUNTS.items():
        _check_number(record, key, 0, most, float if key == "seconds" else int)
    _check_number(record, "threads", 1, MAX_THREADS, int)
    place = record.get("audio_path", "")
    if not isinstance(place, str) or len(place) > MAX_TEXT or not place.isprintable():
        raise ValueError(f"audio_path is not a text of at most {MAX_TEXT} printable characters")
    if spec.is_audio_store:
        if not spec.embeds_audio or [layer_set.layers for layer_set in layer_sets] != [()]:
            raise ValueError("it has no layers, but is no audio store")
        _check_seconds(spec, "shard_seconds")
        return
    if not 1 <= spec.num_layers <= MAX_LAYERS or not 1 <= spec.dim <= MAX_DIM:
        raise ValueError(
            f"it has {spec.num_layers} layers of width {spec.dim}; the limits are {MAX_LAYERS} and {MAX_DIM}"
        )
    cached = [layer for layer_set in layer_sets for layer in layer_set.layers]
    if sorted(cached) != sorted(spec.layers) or len(set(cached)) != len(cached):
        raise ValueError("its sets of layers are not its layers")
    if not all(1 <= layer <= spec.num_layers for layer in cached) or not all(s.layers for s in layer_sets):
        raise ValueError(f"its layers are not among 1 to {spec.num_layers}")
    _check_seconds(spec, "shard_seconds")
    if spec.batch_seconds != "auto":
        _check_seconds(spec, "batch_seconds")
    for policy in (spec.masks.policy, *spec.masks.policies):
        _check_policy(policy)


def _check_seconds(spec: CacheSpec, name: str) -> None:
    if not 0 < getattr(spec, name) < math.inf:
        raise ValueError(f"{name} is not a positive number")


def check_commit(record: Mapping[str, Any]) -> None:
    """Check the keys of a commit record."""
    for key in ("rows", "bytes"):
        _check_number(record, key, 0, 2**62, int)
    for key in ("sha256", "content"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"{key} is not a text")
    failed = record.get("failed", {})
    if not isinstance(failed, dict) or not all(isinstance(reason, str) for reason in failed.values()):
        raise ValueError("failed is not a table of texts")
    if not all(len(reason) <= MAX_TEXT and reason.isprintable() for reason in failed.values()):
        raise ValueError(f"failed has a reason of more than {MAX_TEXT} characters, or of some that can't be printed")


def _check_policy(policy: MaskPolicy) -> None:
    if max(policy.mask_length, policy.mask_other, policy.min_space) > _MAX_SETTING:
        raise ValueError(f"a mask policy has a value above {_MAX_SETTING}")


def read_plan(
    data: bytes, spec: CacheSpec, num_sets: int, columns: Sequence[str] = tuple(PLAN_SCHEMA.names)
) -> pa.Table:
    """Read the bytes of ``plan.parquet``, or only some columns, which must include all of numbers."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            rows = file.metadata.num_rows
            _check_rows(rows)
            if rows > _SMALL_PLAN + len(data) // _PLAN_BYTES_PER_ROW:
                raise ValueError(f"it has {rows} rows in {len(data)} bytes, which can't be rows of utterances")
            if file.schema_arrow.names != PLAN_SCHEMA.names:
                raise ValueError(f"its columns are not {', '.join(PLAN_SCHEMA.names)}")
            groups = range(file.num_row_groups)
        schema = pa.schema([PLAN_SCHEMA.field(name) for name in columns])
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            batches = [batch for part in pool.map(partial(_row_group, data, schema), groups) for batch in part]
        table = pa.Table.from_batches(batches, schema)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"it is not a plan: {first_line(error)}") from error
    del data
    pa.default_memory_pool().release_unused()  # Otherwise what decoding used stays allocated beside what follows.
    if any(column.null_count for column in table.columns):
        raise ValueError("it has empty values")
    samples, frames, shards, row = (table[name].to_numpy() for name in ("num_samples", "num_frames", "shard", "row"))
    starts = first_rows(shards)
    check_plan(samples, len(starts), spec, num_sets)
    if len(frames) and (frames.min() < 0 or bool((frames > samples).any())):
        raise ValueError("it has an utterance with more frames than samples")
    expected = np.arange(rows) - np.repeat(starts, np.diff(starts, append=rows))
    if bool((shards[:1] < 0).any() or (shards[1:] < shards[:-1]).any()) or not np.array_equal(row, expected):
        raise ValueError("its rows are not in the order of shards")
    return table


def _row_group(data: bytes, schema: pa.Schema, number: int) -> list[pa.RecordBatch]:
    batches = []
    with pq.ParquetFile(pa.BufferReader(data), read_dictionary=["id", "split", "path", "sha256"]) as file:
        for batch in file.iter_batches(_PLAN_BATCH, [number], schema.names, use_threads=False):
            for field in schema:
                if pa.types.is_string(field.type):
                    _check_texts(batch[field.name])
            batches.append(batch.select(schema.names).cast(schema))
    return batches


def check_plan(num_samples: np.ndarray, shards: int, spec: CacheSpec, num_sets: int) -> None:
    """Check the number of utterances of a plan, their numbers of samples, and the number of files of its shards."""
    _check_rows(len(num_samples))
    if len(num_samples) and (num_samples.min() < 0 or num_samples.max() > MAX_SAMPLES):
        worst = num_samples.max() if num_samples.min() >= 0 else num_samples.min()
        raise ValueError(f"it has an utterance of {worst} samples; the limit is {MAX_SAMPLES} (four hours)")
    if (files := shards * num_sets * (1 + spec.masks.draws)) > MAX_FILES:
        raise ValueError(f"it has {shards} shards, so there would be {files} files; the limit is {MAX_FILES}")


def _check_rows(rows: int) -> None:
    if rows > MAX_UTTERANCES:
        raise ValueError(f"it has {rows} utterances; the limit is {MAX_UTTERANCES}")


def _check_texts(column: pa.Array) -> None:
    # A dictionary with one long text, named in millions of rows, would be expanded.
    texts = column.dictionary if pa.types.is_dictionary(column.type) else column
    longest = pc.max(pc.binary_length(texts)).as_py() or 0
    if longest > MAX_TEXT:
        raise ValueError(f"it has a text of {longest} bytes; the limit is {MAX_TEXT}")


def load_state(data: bytes, spec: CacheSpec, layer_set: LayerSet) -> dict[str, Tensor]:
    """Load the bytes of a codec's state. The length of its header and the shapes of its tensors are checked."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_STATE_HEADER, len(data) - 8):
        raise ValueError(
            f"its header has {size} bytes; the limit is {MAX_STATE_HEADER}, and the file has {len(data)} bytes"
        )
    try:
        state: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"its state is not a safetensors file ({error})") from error
    groups = [layer_set.layers] if is_joint(spec.codec) else [(layer,) for layer in layer_set.layers]
    if spec.codec.partition(":")[0] in CODECS:  # What a codec of another package keeps is known to that package alone.
        _check_shapes(state, groups, spec.dim)
    return state


def _check_shapes(state: Mapping[str, Tensor], groups: Iterable[tuple[int, ...]], dim: int) -> None:
    sizes = {str(number): len(layers) for number, layers in enumerate(groups)}
    for key, value in state.items():
        number, _, name = key.partition(".")
        count = sizes.get(number, 0)
        shapes = {
            "mean": (count, dim),
            "scale": (count, dim),
            "spread": (count,),
            "error": (count,),
            "basis": (count, dim),
            "centroids": (count, dim),
            "codebooks": (SIZE, dim),
        }
        shape = tuple(value.shape[1:] if name in ("basis", "centroids", "codebooks") else value.shape)
        if shape != shapes.get(name, ()):
            raise ValueError(f"its {key} has shape {tuple(value.shape)}, which does not fit its layers of width {dim}")
        if name == "wide" and not 0 <= int(value) <= len(state.get(f"{number}.basis", ())):
            raise ValueError(f"its {key} is {int(value)}, more than there are components")


def _check_number(record: Mapping[str, Any], key: str, least: int, most: int, kind: type[int] | type[float]) -> None:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise ValueError(f"{key} is not a number")
    if not least <= value <= most:  # False for NaN, too.
        raise ValueError(f"{key} is {str(value)[:30]}; it must be between {least} and {most}")
