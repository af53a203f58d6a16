"""Building a cache with Ray Data: one row per shard, one actor per teacher, features straight from the model into the shard."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from teacher_cache.batches import cut_by_seconds
from teacher_cache.codecs import get_codec
from teacher_cache.flac import to_flac
from teacher_cache.frames import SAMPLE_RATE
from teacher_cache.layout import (
    CacheError,
    CacheSpec,
    Layout,
    SourceUtterance,
    file_record,
    layer_column,
    open_or_create,
    read_spec,
    remove_leftovers,
    shard_numbers,
    written_whole,
)
from teacher_cache.reader import load_source, masks_of, pad_waveforms
from teacher_cache.teachers import load_teacher

_FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Progress:
    """How far a build is. Seconds are of audio, ``elapsed`` of wall time."""

    shards_done: int
    shards: int
    seconds_done: float
    seconds: float
    elapsed: float


@dataclass(frozen=True)
class BuildReport:
    """What a build did: shards written now, shards that were there already, wall seconds."""

    written: int
    reused: int
    elapsed: float


class ShardWriter:
    """Runs the teacher over whole shards and writes them. One lives in each Ray Data actor; plain Python can use it too.

    Args:
        root: folder of an opened cache (``cache.json`` and ``plan.parquet`` are there).
        teacher_spec: for `load_teacher`.
        device: ``cuda`` or ``cpu``.
        threads: CPU threads for PyTorch; 0 leaves its default.
    """

    def __init__(self, root: str, teacher_spec: str, device: str, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._layout = Layout(Path(root))
        self._spec = read_spec(self._layout.root)
        self._codec = get_codec(self._spec.codec)
        self._teacher = load_teacher(teacher_spec, device)
        if self._teacher.fingerprint != self._spec.teacher:
            raise CacheError(f"teacher {teacher_spec!r} is not the one the cache at {root} was begun with")
        self._plan = pq.read_table(self._layout.plan)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Ray Data's batch function: shard numbers in, one small record each out."""
        records = [self.write(int(shard)) for shard in batch["shard"]]
        return {key: [record[key] for record in records] for key in records[0]}

    def write(self, shard: int) -> dict[str, Any]:
        """Writes one shard unless it is committed. A shard with unreadable audio is left uncommitted and reported."""
        rows = self._plan.filter(pc.equal(self._plan["shard"], shard)).to_pylist()
        utterances = [SourceUtterance(**{k: row[k] for k in SourceUtterance.__dataclass_fields__}) for row in rows]
        record = {"shard": shard, "seconds": sum(u.num_samples for u in utterances) / SAMPLE_RATE, "failures": ""}
        if self._layout.is_committed(shard):
            return record
        waveforms, failures = [], []
        for utterance in utterances:
            try:
                waveforms.append(load_source(utterance))
            except (ValueError, OSError) as error:
                failures.append(str(error))
        if failures:
            return record | {"failures": "\n".join(failures)}
        self._write_files(shard, utterances, waveforms, [row["num_frames"] for row in rows])
        return record

    def _write_files(
        self, shard: int, utterances: list[SourceUtterance], waveforms: list[np.ndarray], frames: list[int]
    ) -> None:
        spec, layout = self._spec, self._layout
        features = [(layer_column(layer), pa.large_binary()) for layer in spec.layers]
        clean_schema = pa.schema(
            [
                ("id", pa.string()),
                ("num_samples", pa.int64()),
                ("num_frames", pa.int64()),
                ("audio", pa.large_binary()),
                *features,
            ]
        )
        masked_schema = pa.schema([("id", pa.string()), ("mask", pa.list_(pa.bool_())), *features])
        samples = np.array([len(waveform) for waveform in waveforms])
        batches = cut_by_seconds(range(len(utterances)), samples, spec.batch_seconds)
        # One pass over the shard per file keeps a single writer and one batch's features in memory.
        with written_whole(layout.clean(shard)) as temporary, _writer(temporary, clean_schema) as writer:
            for batch in batches:
                hidden = self._hidden([waveforms[i] for i in batch], None)
                for b, i in enumerate(batch):
                    values = [utterances[i].id, int(samples[i]), frames[i], to_flac(waveforms[i])]
                    values += [self._codec.encode(hidden[b, n, : frames[i]]) for n in range(len(spec.layers))]
                    writer.write_table(_row(clean_schema, values), row_group_size=1)
        for draw in range(spec.masks.draws):
            with written_whole(layout.masked(shard, draw)) as temporary, _writer(temporary, masked_schema) as writer:
                for batch in batches:
                    masks = masks_of(spec.masks, draw, [utterances[i].id for i in batch], [frames[i] for i in batch])
                    hidden = self._hidden([waveforms[i] for i in batch], masks)
                    for b, i in enumerate(batch):
                        mask = masks[b, : frames[i]]
                        kept = hidden[b, :, : frames[i]][:, ~mask.to(hidden.device)]
                        values = [utterances[i].id, mask.tolist()]
                        values += [self._codec.encode(kept[n]) for n in range(len(spec.layers))]
                        writer.write_table(_row(masked_schema, values), row_group_size=1)
        files = {
            str(path.relative_to(layout.root)): file_record(path, len(utterances))
            for path in layout.files(shard, spec.masks.draws)
        }
        with written_whole(layout.commit(shard)) as temporary:
            temporary.write_text(
                json.dumps({"shard": shard, "fingerprint": spec.fingerprint, "files": files}, indent=2) + "\n"
            )

    def _hidden(self, waveforms: list[np.ndarray], masks: torch.Tensor | None) -> torch.Tensor:
        padded, lengths = pad_waveforms(waveforms)
        device = self._teacher.device
        hidden = self._teacher.hidden_states(
            padded.to(device), lengths.to(device), None if masks is None else masks.to(device)
        )
        return hidden[:, [layer - 1 for layer in self._spec.layers]]


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Features do not compress and have no useful statistics; dictionaries would double the work.
    return pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )


def _row(schema: pa.Schema, values: list[Any]) -> pa.Table:
    return pa.table([pa.array([value], field.type) for value, field in zip(values, schema, strict=True)], schema=schema)


def build_cache(
    root: Path,
    spec: CacheSpec,
    plan: pa.Table,
    teacher_spec: str,
    *,
    teacher_name: str,
    actors: int,
    gpus_per_actor: float = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BuildReport:
    """Writes every shard that is not committed yet, with Ray Data; Ray must be initialised.

    Args:
        root: folder of the cache, absolute, reachable from every node.
        spec: its identity.
        plan: of `plan_shards`.
        teacher_spec: for `load_teacher`, on every node.
        teacher_name: for people, kept in ``cache.json``.
        actors: teachers that run side by side.
        gpus_per_actor: GPUs each takes; 0 runs on one CPU core each.
        on_progress: called after every shard.

    Raises:
        CacheError: the folder holds something else, or files changed since the index (all others are cached first).
    """
    import ray.data

    started = time.monotonic()
    layout = open_or_create(root, spec, plan, teacher_name)
    remove_leftovers(root)
    shards = shard_numbers(plan)
    missing = [shard for shard in shards if not layout.is_committed(shard)]
    seconds = float(plan["num_samples"].to_numpy().sum()) / SAMPLE_RATE
    by_shard = dict.fromkeys(shards, 0.0)
    for shard, samples in zip(plan["shard"].to_pylist(), plan["num_samples"].to_pylist(), strict=True):
        by_shard[shard] += samples / SAMPLE_RATE
    done = sum(by_shard[shard] for shard in shards) - sum(by_shard[shard] for shard in missing)
    failures: list[str] = []
    if missing:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        device = "cuda" if gpus_per_actor else "cpu"
        dataset = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
        records: Iterator[dict[str, Any]] = dataset.map_batches(
            ShardWriter,
            fn_constructor_args=(str(root), teacher_spec, device, 0 if gpus_per_actor else 1),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(missing))),
            num_gpus=gpus_per_actor,
            num_cpus=1,
        ).iter_rows()
        for count, record in enumerate(records, 1):
            if record["failures"]:
                failures += record["failures"].split("\n")
            done += record["seconds"]
            on_progress(
                Progress(len(shards) - len(missing) + count, len(shards), done, seconds, time.monotonic() - started)
            )
    remove_leftovers(root)
    if failures:
        more = f" and {len(failures) - _FAILURES_SHOWN} more" if len(failures) > _FAILURES_SHOWN else ""
        raise CacheError(
            f"{len(failures)} utterances could not be cached: {'; '.join(failures[:_FAILURES_SHOWN])}{more}"
        )
    return BuildReport(len(missing), len(shards) - len(missing), time.monotonic() - started)
