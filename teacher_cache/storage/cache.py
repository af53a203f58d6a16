"""A cache on disk: its files, their commit records, its identity and how it grows.

    CACHE/
      cache.json                           identity: spec, sets of layers, fingerprint, counts; sealed
      plan.parquet                         one row per utterance: where it belongs
      codec/set=0.safetensors              what the codec learnt, where it learns
      clean/part-00000.parquet             id, num_samples, num_frames, audio, layer columns
      masked/draw=0/part-00000.parquet     id, mask, layer columns at unmasked frames
      commits/clean/part-00000.json        written last, one for each shard file: rows, bytes, SHA-256; sealed
      builds/...                           one for each build: what its teachers did; measured, so no part of the identity
      copies/...                           cache.json, plan.parquet and codec states once more, for repair

A file is put in its place whole, and counts only when its commit record is there. So a killed build leaves nothing half done
that looks whole, and doing a file twice is harmless. Layers and draws added later are files of their own.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import safetensors.torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import ColumnCodec, is_learned, open_codec
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache_spec import (
    SCHEMA_VERSION,
    CacheError,
    CacheSpec,
    LayerSet,
    MaskDraws,
    Part,
    content_key,
    fingerprint,
    parts_of,
)
from ray_distill.teacher_cache.storage.lock import CLAIM
from ray_distill.teacher_cache.storage.sealed_json import sealed, unsealed
from ray_distill.teacher_cache.storage.shard_plan import Shard, Utterance, plan_shards, shard_numbers, shards_of
from ray_distill.teacher_cache.storage.store import Store

__all__ = [
    "Cache",
    "CacheError",
    "CacheSpec",
    "MaskDraws",
    "ShardFile",
    "Utterance",
    "plan_shards",
    "shard_numbers",
]

CACHE_JSON = "cache.json"
PLAN = "plan.parquet"
COPIES = "copies"
DATA_FOLDERS = ("clean", "masked", "composite", "commits")


def column_name(layers: Iterable[int]) -> str:
    """``layer_01`` for one layer, ``layers_01_02_...`` for several in one column."""
    numbers = [f"{layer:02d}" for layer in layers]
    return f"layer{'s' if len(numbers) > 1 else ''}_{'_'.join(numbers)}"


def state_name(layer_set: int) -> str:
    """File of a codec's state."""
    return f"codec/set={layer_set}.safetensors"


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard, and the key of what it must hold."""

    shard: int
    part: Part
    content: str

    @property
    def name(self) -> str:
        """Below the cache's folder."""
        return f"{self.part.folder}/part-{self.shard:05d}.parquet"

    @property
    def commit(self) -> str:
        """Name of its commit record."""
        return f"commits/{self.part.folder}/part-{self.shard:05d}.json"


@dataclass(frozen=True)
class Cache:
    """An opened cache. Cheap to open; files are looked at only when asked for.

    Attributes:
        store: where it lies.
        spec: what it is.
        layer_sets: layers cached together.
        record: the whole of ``cache.json``.
    """

    store: Store
    spec: CacheSpec
    layer_sets: tuple[LayerSet, ...]
    record: Mapping[str, Any]

    @staticmethod
    def exists(store: Store) -> bool:
        """Whether there is a cache."""
        return store.size(CACHE_JSON) is not None

    @classmethod
    def open(cls, location: "str | Path | Store") -> "Cache":
        """The cache at a location. CacheError where there is none, or ``cache.json`` is damaged or of another version."""
        store = location if isinstance(location, Store) else Store(location)
        try:
            data = store.read(CACHE_JSON)
        except FileNotFoundError:
            raise CacheError(
                f"there is no teacher cache at {store.location} (no {CACHE_JSON}); run the cache stage first"
            ) from None
        return cls._from(store, data, CACHE_JSON)

    @classmethod
    def open_copy(cls, store: Store) -> "Cache":
        """As `open`, from the copy that is kept of ``cache.json``."""
        try:
            return cls._from(store, store.read(f"{COPIES}/{CACHE_JSON}"), f"{COPIES}/{CACHE_JSON}")
        except FileNotFoundError:
            raise CacheError(f"{store.at(COPIES)} has no {CACHE_JSON}") from None

    @classmethod
    def _from(cls, store: Store, data: bytes, name: str) -> "Cache":
        try:
            record = unsealed(data)
        except ValueError as error:
            raise CacheError(f"{store.at(name)} is damaged ({error}); `repair` restores it") from error
        version = record["spec"].get("schema_version")
        if version != SCHEMA_VERSION:
            raise CacheError(
                f"the cache at {store.location} has schema version {version}, this program reads version "
                f"{SCHEMA_VERSION}; build it again or use the program that made it"
            )
        try:
            spec = CacheSpec.model_validate(record["spec"])
            sets = tuple(LayerSet.model_validate(item) for item in record["sets"])
        except (pydantic.ValidationError, KeyError) as error:
            raise CacheError(f"{store.at(name)} can't be understood ({error}); build the cache again") from error
        return cls(store, spec, sets, record)

    @property
    def fingerprint(self) -> str:
        """Two caches with one fingerprint are interchangeable."""
        return fingerprint(self.spec, self.layer_sets)

    @cached_property
    def plan(self) -> pa.Table:
        """The plan of shards. CacheError where it is missing or not as ``cache.json`` says."""
        return pq.read_table(io.BytesIO(self._checked(PLAN, self.record["plan"])))

    @cached_property
    def shards(self) -> list[Shard]:
        """The plan by shards."""
        return shards_of(self.plan)

    def _checked(self, name: str, sha256: str) -> bytes:
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            raise CacheError(f"{self.store.at(name)} is missing; `repair` restores it") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CacheError(f"{self.store.at(name)} is damaged (SHA-256 differs); `repair` restores it")
        return data

    def codecs(self, layer_set: int) -> tuple[ColumnCodec, ...]:
        """The codecs of a set of layers, one for each column. CacheError where the state is missing or damaged."""
        chosen = self.layer_sets[layer_set]
        state: dict[str, Tensor] = {}
        if chosen.state is not None:
            state = safetensors.torch.load(self._checked(state_name(layer_set), chosen.state))
        try:
            return open_codec(self.spec.codec, chosen.layers, self.spec.dim, state)
        except ValueError as error:
            raise CacheError(f"the cache at {self.store.location} can't be decoded: {error}") from error

    def files(self, shard: Shard, needed: CacheSpec | None = None) -> list[ShardFile]:
        """A shard's files, the one with the audio first: all, or those that a need reads."""
        return [
            ShardFile(
                shard.number,
                part,
                content_key(self.spec, self.layer_sets[part.layer_set], part, shard.number, shard.split),
            )
            for part in parts_of(self.spec, len(self.layer_sets), shard.split)
            if needed is None or self._reads(needed, part)
        ]

    def _reads(self, needed: CacheSpec, part: Part) -> bool:
        if part.kind == "clean" and part.layer_set == 0:  # The audio.
            return True
        if part.draw is not None and (part.draw >= needed.masks.draws or needed.targets == "clean_only"):
            return False
        return bool(set(self.layer_sets[part.layer_set].layers) & set(needed.layers))

    def commit_of(self, file: ShardFile) -> dict[str, Any] | None:
        """A file's commit record; None where it is not finished.

        Raises:
            CacheError: the record is damaged, or of a file with another content.
        """
        try:
            data = self.store.read(file.commit)
        except FileNotFoundError:
            return None
        try:
            record = unsealed(data)
        except ValueError as error:
            raise CacheError(f"{self.store.at(file.commit)} is damaged ({error}); `repair` restores it") from error
        if record["content"] != file.content:
            raise CacheError(f"{self.store.at(file.commit)} belongs to another file or cache; `repair` restores it")
        return record

    def missing(self, needed: CacheSpec | None = None) -> dict[int, list[ShardFile]]:
        """Files without a commit record, by shard; with a need, of those that it reads."""
        committed = set(self.store.names("commits"))
        absent = {
            shard.number: [file for file in self.files(shard, needed) if file.commit not in committed]
            for shard in self.shards
        }
        return {number: files for number, files in absent.items() if files}

    def covers(self, needed: CacheSpec) -> bool:
        """Whether all layers and draws that are needed are here, in the spec; CacheError where they can't ever be."""
        differences = self.spec.differences(needed)
        if differences:
            raise CacheError(
                f"the cache at {self.store.location} was made for something else ({'; '.join(differences)}); "
                "give cache.path another folder, or the settings the cache was made with"
            )
        return set(needed.layers) <= set(self.spec.layers) and needed.masks.draws <= self.spec.masks.draws


def refuse_strangers(store: Store) -> None:
    """CacheError where there is no cache, but there are files that no beginning of one explains."""
    known = (CACHE_JSON, PLAN, "codec", COPIES, BUILDS, CLAIM)
    strangers = [name for name in store.names() if name.partition("/")[0] not in known]
    if strangers and not Cache.exists(store):
        raise CacheError(
            f"{store.location} holds files (such as {strangers[0]}) but no {CACHE_JSON}; give cache.path an empty or a new folder"
        )


def create_cache(
    store: Store,
    spec: CacheSpec,
    plan: pa.Table,
    *,
    teacher_name: str,
    teacher_spec: str,
    state: Mapping[str, Tensor],
    threads: int = 1,
) -> Cache:
    """Begins a cache in an empty folder: plan, codec state, and last ``cache.json``.

    Args:
        store: where.
        spec: its identity.
        plan: of `plan_shards`.
        teacher_name: for people.
        teacher_spec: for `load_teacher`, so that repair finds the teacher again.
        state: what the codec learnt; empty where it learns nothing.
        threads: of PyTorch where the teacher runs on a CPU: they decide rounding, so whoever adds or repairs uses as many.

    Raises:
        CacheError: the folder holds other files.
    """
    assert bool(state) == is_learned(spec.codec)
    refuse_strangers(store)
    buffer = io.BytesIO()
    pq.write_table(plan, buffer, compression="zstd")
    for name in (PLAN, f"{COPIES}/{PLAN}"):
        store.write(name, buffer.getvalue())
    samples = plan["num_samples"].to_numpy()
    record = {
        "plan": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "teacher_name": teacher_name,
        "teacher_spec": teacher_spec,
        "threads": threads,
        "utterances": plan.num_rows,
        "shards": len(shard_numbers(plan)),
        "seconds": float(samples.sum() / SAMPLE_RATE),
        "frames": int(plan["num_frames"].to_numpy().sum()),
    }
    layer_set = LayerSet(layers=spec.layers, state=_write_state(store, 0, state))
    return _write_record(store, spec, (layer_set,), record)


def grow_cache(cache: Cache, needed: CacheSpec, state: Mapping[str, Tensor]) -> Cache:
    """Adds the layers and draws of a need to a cache's identity; what is there stays valid, the new files are missing.

    Args:
        cache: `Cache.covers` said False.
        needed: what is wanted.
        state: of the codec for the layers that are new; empty where there are none, or it learns nothing.
    """
    sets = cache.layer_sets
    new = tuple(sorted(set(needed.layers) - set(cache.spec.layers)))
    if new:
        sets = (*sets, LayerSet(layers=new, state=_write_state(cache.store, len(sets), state)))
    record = {key: value for key, value in cache.record.items() if key not in ("spec", "sets", "fingerprint")}
    return _write_record(cache.store, cache.spec.grown(needed), sets, record)


def _write_state(store: Store, layer_set: int, state: Mapping[str, Tensor]) -> str | None:
    if not state:
        return None
    data = safetensors.torch.save({key: value.cpu().contiguous() for key, value in state.items()})
    for name in (state_name(layer_set), f"{COPIES}/{state_name(layer_set)}"):
        store.write(name, data)
    return hashlib.sha256(data).hexdigest()


def _write_record(store: Store, spec: CacheSpec, sets: tuple[LayerSet, ...], record: dict[str, Any]) -> Cache:
    data = sealed(
        record
        | {
            "spec": spec.model_dump(mode="json"),
            "sets": [layer_set.model_dump(mode="json") for layer_set in sets],
            "fingerprint": fingerprint(spec, sets),
        }
    )
    for name in (f"{COPIES}/{CACHE_JSON}", CACHE_JSON):
        store.write(name, data)
    return Cache.open(store)


def file_record(path: Path, rows: int, content: str) -> dict[str, Any]:
    """What a commit says of a file at a local path: rows, bytes, SHA-256, content key."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"rows": rows, "bytes": path.stat().st_size, "sha256": digest, "content": content}


def write_commit(store: Store, file: ShardFile, record: dict[str, Any]) -> None:
    """Makes a shard file count. Only after the file itself is in its place."""
    store.write(file.commit, sealed(record))


def cache_bytes(cache: Cache) -> int:
    """Bytes of all data files that are there and belong to the cache."""
    sizes = cache.store.sizes()
    return sum(sizes.get(file.name, 0) for shard in cache.shards for file in cache.files(shard))
