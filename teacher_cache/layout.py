"""What a cache is on disk: its identity, its plan of shards, its commit records, and how files get there whole.

    CACHE/
      cache.json                           identity (CacheSpec), fingerprint, counts
      plan.parquet                         one row per utterance: where it belongs
      clean/part-00000.parquet             id, num_samples, num_frames, audio, layer_01 ...
      masked/draw=0/part-00000.parquet     id, mask, layer_01 ... at unmasked frames
      commits/part-00000.json              written last: rows, bytes and SHA-256 of each of the shard's files

A file is written beside its place, synced, and renamed into it; a shard counts as done only when its commit record is
there. So a killed build leaves no half shard that looks whole, and doing a shard twice is harmless.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from teacher_cache.frames import SAMPLE_RATE, num_frames
from teacher_cache.masks import MaskPolicy

SCHEMA_VERSION = 1


class CacheError(ValueError):
    """A cache that is not there, not whole, or not what was asked for; the message is for the user."""


class MaskDraws(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Which random masks a cache holds.

    Attributes:
        policy: how spans are drawn.
        draws: number of independent masks of every utterance; 0 caches clean targets only. Default 1.
        seed: of all of them. Default 0.
    """

    policy: MaskPolicy = MaskPolicy()
    draws: int = pydantic.Field(default=1, ge=0)
    seed: int = 0


class CacheSpec(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Everything that decides a cache's content. Equal specs mean interchangeable caches.

    Attributes:
        teacher: the teacher's fingerprint.
        num_layers: layers the teacher has.
        dim: the teacher's width D.
        layers: 1-based layers kept, ascending.
        masks: mask draws kept.
        codec: name of the codec.
        corpus: fingerprint of the corpus (ids, samples, splits).
        shard_seconds: audio per shard the plan aims at.
        batch_seconds: padded audio per teacher batch (it decides rounding, hence bytes).
        schema_version: of the layout described in this module.
    """

    teacher: str
    num_layers: int
    dim: int
    layers: tuple[int, ...]
    masks: MaskDraws
    codec: str
    corpus: str
    shard_seconds: float
    batch_seconds: float
    schema_version: int = SCHEMA_VERSION

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON of this spec."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def differences(self, other: "CacheSpec") -> list[str]:
        """One readable phrase for each value that differs, as ``name: self's -> other's``."""
        mine, theirs = (_flatten(spec.model_dump(mode="json")) for spec in (self, other))
        return [
            f"{key}: {mine.get(key)!r} -> {theirs.get(key)!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@dataclass(frozen=True)
class SourceUtterance:
    """One utterance to cache.

    Attributes:
        id: unique within the corpus.
        path: audio file.
        num_samples: at 16 kHz.
        split: ``train`` or ``validation``.
        sha256: of the decoded float32 samples, so that a file that changed since the index is noticed.
    """

    id: str
    path: str
    num_samples: int
    split: str
    sha256: str


@dataclass(frozen=True)
class Layout:
    """Names of a cache's files."""

    root: Path

    @property
    def cache_json(self) -> Path:
        """The identity record."""
        return self.root / "cache.json"

    @property
    def plan(self) -> Path:
        """The plan of utterances and shards."""
        return self.root / "plan.parquet"

    def clean(self, shard: int) -> Path:
        """The clean pass of a shard."""
        return self.root / "clean" / f"part-{shard:05d}.parquet"

    def masked(self, shard: int, draw: int) -> Path:
        """One draw's masked pass of a shard."""
        return self.root / "masked" / f"draw={draw}" / f"part-{shard:05d}.parquet"

    def commit(self, shard: int) -> Path:
        """The record that a shard is whole."""
        return self.root / "commits" / f"part-{shard:05d}.json"

    def files(self, shard: int, draws: int) -> list[Path]:
        """All data files of a shard."""
        return [self.clean(shard), *(self.masked(shard, draw) for draw in range(draws))]

    def is_committed(self, shard: int) -> bool:
        """Whether the shard's commit record is there."""
        return self.commit(shard).is_file()


def layer_column(layer: int) -> str:
    """Column of 1-based layer k: ``layer_01``, ``layer_02``, ..."""
    return f"layer_{layer:02d}"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success syncs it and renames it into place, on failure removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(root: Path) -> None:
    """Removes temporaries that killed writers left behind. Only while no build is running."""
    for temporary in root.rglob(".*.tmp"):
        temporary.unlink()


def file_record(path: Path, rows: int) -> dict[str, Any]:
    """What a commit says of a file: rows, bytes, SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"rows": rows, "bytes": path.stat().st_size, "sha256": digest}


def plan_shards(utterances: Sequence[SourceUtterance], shard_seconds: float) -> pa.Table:
    """Assigns every utterance a shard and a row in it; a pure function of its arguments.

    Utterances of a split are put in a fixed pseudo-random order (by hash of the id, so that every shard has a mix of
    speakers) and cut into shards of about ``shard_seconds``; a shard holds one split only. Within a shard rows go from
    the longest to the shortest, so that teacher batches need little padding.

    Returns:
        Table of id, split, path, sha256, num_samples (int64), num_frames (int64), shard (int32), row (int32), sorted by
        shard and row.
    """
    rows: list[tuple[int, int, SourceUtterance]] = []
    shard = 0
    for split in sorted({utterance.split for utterance in utterances}):
        members = [utterance for utterance in utterances if utterance.split == split]
        members.sort(key=lambda utterance: hashlib.sha256(utterance.id.encode()).digest())
        group: list[SourceUtterance] = []
        groups = [group]
        samples = 0
        for utterance in members:
            if group and samples + utterance.num_samples > shard_seconds * SAMPLE_RATE:
                group, samples = [], 0
                groups.append(group)
            group.append(utterance)
            samples += utterance.num_samples
        for group in groups:
            group.sort(key=lambda utterance: (-utterance.num_samples, utterance.id))
            rows += [(shard, row, utterance) for row, utterance in enumerate(group)]
            shard += 1
    return pa.table(
        {
            "id": pa.array([u.id for *_, u in rows], pa.string()),
            "split": pa.array([u.split for *_, u in rows], pa.string()),
            "path": pa.array([u.path for *_, u in rows], pa.string()),
            "sha256": pa.array([u.sha256 for *_, u in rows], pa.string()),
            "num_samples": pa.array([u.num_samples for *_, u in rows], pa.int64()),
            "num_frames": pa.array([num_frames(u.num_samples) for *_, u in rows], pa.int64()),
            "shard": pa.array([s for s, *_ in rows], pa.int32()),
            "row": pa.array([r for _, r, _ in rows], pa.int32()),
        }
    )


def open_or_create(root: Path, spec: CacheSpec, plan: pa.Table, teacher_name: str) -> Layout:
    """Claims a folder for a cache of this spec, or accepts the cache of the same spec that is there.

    Raises:
        CacheError: the folder holds a cache made for something else (the differences are named), or other files.
    """
    layout = Layout(root)
    if layout.cache_json.is_file():
        existing = read_spec(root)
        if existing.fingerprint != spec.fingerprint:
            raise CacheError(
                f"the cache at {root} was made for something else ({'; '.join(existing.differences(spec))}); "
                "give cache.path another folder, or the settings the cache was made with"
            )
        return layout
    if root.is_dir() and any(
        path.name != layout.plan.name and not path.name.startswith(".") for path in root.iterdir()
    ):
        raise CacheError(f"{root} holds files but no cache.json; give cache.path an empty or a new folder")
    samples = plan["num_samples"].to_numpy()
    record = {
        "spec": spec.model_dump(mode="json"),
        "fingerprint": spec.fingerprint,
        "teacher_name": teacher_name,
        "utterances": plan.num_rows,
        "shards": int(plan["shard"].to_numpy().max()) + 1,
        "seconds": float(samples.sum() / SAMPLE_RATE),
        "frames": int(plan["num_frames"].to_numpy().sum()),
    }
    with written_whole(layout.plan) as temporary:
        pq.write_table(plan, temporary, compression="zstd")
    with written_whole(layout.cache_json) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    return layout


def read_record(root: Path) -> dict[str, Any]:
    """The content of ``cache.json``; CacheError where there is none or it can't be read."""
    path = Layout(root).cache_json
    if not path.is_file():
        raise CacheError(f"there is no teacher cache at {root} (no cache.json); run the cache stage first")
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if record["spec"]["schema_version"] != SCHEMA_VERSION:
            raise CacheError(
                f"the cache at {root} has schema version {record['spec']['schema_version']}, this program reads "
                f"version {SCHEMA_VERSION}; build it again or use the program that made it"
            )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged ({error}); restore it or build the cache again") from error
    return record


def read_spec(root: Path) -> CacheSpec:
    """The identity of the cache at ``root``; CacheError where there is none or it can't be read."""
    record = read_record(root)
    try:
        spec = CacheSpec.model_validate(record["spec"])
    except pydantic.ValidationError as error:
        raise CacheError(
            f"{Layout(root).cache_json} is damaged ({error.errors()[0]['msg']}); build the cache again"
        ) from error
    if spec.fingerprint != record.get("fingerprint"):
        raise CacheError(f"{Layout(root).cache_json} was altered: its fingerprint does not match its spec")
    return spec


def read_commit(layout: Layout, shard: int) -> dict[str, Any]:
    """A shard's commit record; CacheError where it is missing or can't be read."""
    path = layout.commit(shard)
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise CacheError(
            f"shard {shard} of the cache at {layout.root} is not finished; run the cache stage again"
        ) from None
    except json.JSONDecodeError as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and run the cache stage again") from error
    return record


def shard_numbers(plan: pa.Table) -> list[int]:
    """All shards of a plan, ascending."""
    return [int(shard) for shard in np.unique(plan["shard"].to_numpy())]


def cache_bytes(root: Path) -> int:
    """Bytes of all committed data files."""
    layout = Layout(root)
    plan = pq.read_table(layout.plan)
    return sum(
        file["bytes"]
        for shard in shard_numbers(plan)
        if layout.is_committed(shard)
        for file in read_commit(layout, shard)["files"].values()
    )
