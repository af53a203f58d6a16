"""A cache in a store: its files, their commit records and its identity.

    CACHE/
      cache.json                           identity: specification, sets of layers, fingerprint, counts; with a checksum
      plan.parquet                         one row per utterance: its shard and row
      manifest.parquet                     the commit records in one file, so that readers open with few requests
      codec/set=0.safetensors              state of a codec that has one
      clean/part-00000.parquet             id, num_samples, num_frames, audio, layer columns
      masked/draw=0/part-00000.parquet     id, mask, layer columns at unmasked frames
      audio/part-00000.parquet             id, num_samples, audio: the only shard files of an audio store, to which caches refer
      commits/clean/part-00000.json        one per shard file, written after it: rows, bytes, SHA-256, failed utterances; with a
                                         checksum
      verified.json                        which parts were read whole and are sound; not part of the cache
      builds/...                           one record per build with measured times; not part of the identity
      copies/...                           copies of cache.json, plan.parquet and codec states, for repair

Files are written atomically, and a shard file counts only once its commit record exists. A killed build therefore leaves no
partial file that looks complete, and writing a file twice is harmless. Layers and draws added later are stored in files of
their own.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pydantic
from torch import Tensor

from ray_distill.plugins import missing_plugin
from ray_distill.teacher_cache.codecs import ColumnCodec, open_codec
from ray_distill.teacher_cache.frames import shown_audio
from ray_distill.teacher_cache.storage.cache_spec import (
    SCHEMA_VERSION,
    CacheAccessError,
    CacheError,
    CacheSpec,
    LayerSet,
    Part,
    content_key_of,
    content_tree,
    fingerprint,
    parts_of,
)
from ray_distill.teacher_cache.storage.json_record import MAX_RECORD_BYTES, decode_record, encode_record
from ray_distill.teacher_cache.storage.limits import check_commit, check_identity, load_state, read_plan
from ray_distill.teacher_cache.storage.missing_files import MissingFiles
from ray_distill.teacher_cache.storage.shard_plan import PLAN_SCHEMA, Shard, Shards
from ray_distill.teacher_cache.storage.store import Store

CACHE_JSON = "cache.json"
PLAN = "plan.parquet"
COPIES = "copies"
_RANDOM = re.compile(r"(?:[a-z-]+:)*random:(\d+)x(\d+)")
CONTENT_KEY = b"ray_distill.content"
"""Key of the content key in the metadata of a shard file's Parquet footer. Files of earlier versions don't have it."""
DATA_FOLDERS = ("audio", "clean", "masked", "composite", "commits")


def column_name(layers: Iterable[int]) -> str:
    """Return the name of a column: ``layer_01`` for one layer, ``layers_01_02_...`` for several."""
    numbers = [f"{layer:02d}" for layer in layers]
    return f"layer{'s' if len(numbers) > 1 else ''}_{'_'.join(numbers)}"


def state_name(layer_set: int) -> str:
    """Return the name of the file with the codec's state for a set of layers."""
    return f"codec/set={layer_set}.safetensors"


def damage_error(store: Store, name: str, damage: str) -> CacheError:
    """Return the error for a damaged file. ``damage`` is a verb phrase, such as ``is missing``."""
    return CacheError(f"{store.at(name)} {damage}; `ray-distill cache repair {store.location}` restores it")


def _invalid(store: Store, name: str, error: Exception) -> CacheError:
    reason = f"{error}"
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return CacheError(f"{store.at(name)} is not valid ({reason}); build the cache again")


def file_name(part: Part, shard: int) -> str:
    """Return the name of a shard file, relative to the cache."""
    return f"{part.folder}/part-{shard:05d}.parquet"


def commit_name(part: Part, shard: int) -> str:
    """Return the name of its commit record, relative to the cache."""
    return f"commits/{part.folder}/part-{shard:05d}.json"


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard.

    Attributes:
        shard: Number of the shard.
        part: Part of the shard that the file holds.
        content: Key of the content; see `cache_spec.content_key`.
    """

    shard: int
    part: Part
    content: str

    @property
    def name(self) -> str:
        """Name of the file, relative to the cache."""
        return file_name(self.part, self.shard)

    @property
    def commit(self) -> str:
        """Name of the commit record, relative to the cache."""
        return commit_name(self.part, self.shard)


@dataclass(frozen=True, repr=False)
class Cache:
    """An opened cache. Opening reads ``cache.json`` only; other files are read when they are needed.

    Attributes:
        store: Store that holds the cache.
        spec: Specification of the cache.
        layer_sets: Sets of layers that were cached together.
        record: Content of ``cache.json``.

    Example:
        >>> Cache.open("caches/demo")
        Cache('caches/demo', teacher='random:4x96', layers=(1, 2, 3, 4), codec='pca', ...)
    """

    store: Store
    spec: CacheSpec
    layer_sets: tuple[LayerSet, ...]
    record: Mapping[str, Any]

    @staticmethod
    def exists(store: Store) -> bool:
        """Return whether the store holds a cache.

        Raises:
            ValueError: A location in S3 has no bucket, so that no cache can be built there.
        """
        if store.size(CACHE_JSON) is not None:
            return True
        store.check_bucket()
        return False

    @classmethod
    def open(cls, location: "str | Path | Store") -> "Cache":
        """Open the cache at a location.

        Raises:
            CacheError: If there is no cache, or ``cache.json`` is damaged or of another version.
        """
        store = location if isinstance(location, Store) else Store(location)
        try:
            return cls._from(store, CACHE_JSON)
        except FileNotFoundError:
            store.check_bucket()
            raise CacheError(
                f"there is no teacher cache at {store.location} (no {CACHE_JSON}); run the cache stage first"
            ) from None

    @classmethod
    def open_copy(cls, store: Store) -> "Cache":
        """Open a cache from the copy of its ``cache.json``; otherwise the same as `open`."""
        try:
            return cls._from(store, f"{COPIES}/{CACHE_JSON}")
        except FileNotFoundError:
            raise CacheError(f"{store.at(COPIES)} has no {CACHE_JSON}") from None

    @classmethod
    def _from(cls, store: Store, name: str) -> "Cache":
        try:
            record = decode_record(store.read(name, MAX_RECORD_BYTES))
        except CacheAccessError:
            raise
        except ValueError as error:
            raise damage_error(store, name, f"is damaged ({error})") from error
        tree = record.get("spec")
        version = tree.get("schema_version") if isinstance(tree, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise CacheError(
                f"the cache at {store.location} has schema version {str(version)[:20]}, but this program reads version "
                f"{SCHEMA_VERSION}; build the cache again or use the program that built it"
            )
        if (absent := missing_plugin(record.get("plugins"), "codec")) is not None:
            raise CacheError(f"the cache at {store.location} needs {absent}")
        try:
            spec = CacheSpec.model_validate(tree)
            sets = tuple(LayerSet.model_validate(item) for item in record["sets"])
            check_identity(spec, sets, record)
        except (ValueError, KeyError, TypeError) as error:
            raise _invalid(store, name, error) from error
        return cls(store, spec, sets, record)

    def __repr__(self) -> str:
        spec, record = self.spec, self.record
        return (
            f"Cache({self.store.location!r}, teacher={record['teacher_name']!r}, layers={spec.layers}, codec={spec.codec!r}, "
            f"targets={spec.targets!r}, draws={spec.masks.draws}, utterances={record['utterances']}, "
            f"hours={record['seconds'] / 3600:.2f}, fingerprint='{self.fingerprint[:8]}...')"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the identity. Caches with equal fingerprints are interchangeable."""
        return fingerprint(self.spec, self.layer_sets)

    @cached_property
    def plan(self) -> pa.Table:
        """The plan of shards. CacheError if its file is missing or damaged."""
        return self.plan_columns(PLAN_SCHEMA.names)

    def plan_columns(self, names: Sequence[str]) -> pa.Table:
        """Return columns of the plan, all of numbers among them, without reading the others. Raises as `plan`."""
        if "plan" in self.__dict__:  # It was read before.
            return self.plan.select(names)
        try:
            # Without a name here, the bytes of the file are freed as soon as they are decoded.
            return read_plan(self._read_checked(PLAN, self.record["plan"]), self.spec, len(self.layer_sets), names)
        except CacheError:
            raise
        except ValueError as error:
            raise _invalid(self.store, PLAN, error) from error

    @cached_property
    def shards(self) -> Shards:
        """The shards of the plan, sorted by number."""
        return Shards(self.plan)

    def _read_checked(self, name: str, sha256: str) -> bytes:
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            raise damage_error(self.store, name, "is missing") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise damage_error(self.store, name, "is damaged (SHA-256 differs)")
        return data

    def is_of_teacher(self, name: str, fingerprint: str) -> bool:
        """Return whether the cache was made with a teacher of this fingerprint, or with the same random weights.

        Fingerprints are hashes of weights as stored in checkpoints (fp16 weights are float32 numbers too, and weight norms are kept
        as they are), so they are exact. The weights of ``random:`` teachers are computed, with a last bit that differs between
        processors with and without AVX2, so these teachers are known by name as well.
        """
        if fingerprint == self.spec.teacher:
            return True
        size = _RANDOM.fullmatch(name)
        return (
            size is not None
            and self.record["teacher_spec"] == name
            and (int(size[1]), int(size[2])) == (self.spec.num_layers, self.spec.dim)
        )

    def check_teacher(self, name: str, fingerprint: str) -> None:
        """Raise CacheError if the cache was made with another teacher; see `is_of_teacher`."""
        if not self.is_of_teacher(name, fingerprint):
            raise CacheError(f"{name} is not the teacher that the cache at {self.store.location} was made with")

    def codecs(self, layer_set: int) -> tuple[ColumnCodec, ...]:
        """Return the codecs of a set of layers, one per column. CacheError if their state is missing or damaged."""
        chosen = self.layer_sets[layer_set]
        state: dict[str, Tensor] = {}
        data = None if chosen.state is None else self._read_checked(state_name(layer_set), chosen.state)
        try:
            if data is not None:
                state = load_state(data, self.spec, chosen)
            return open_codec(self.spec.codec, chosen.layers, self.spec.dim, state)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise CacheError(f"the cache at {self.store.location} can't be decoded: {error}") from error

    def files(self, shard: Shard, needed: CacheSpec | None = None) -> list[ShardFile]:
        """Return the files of a shard, or only those that a need reads. A file with audio is the first."""
        return [
            ShardFile(shard.number, part, content_key_of(self._content_tree(part, shard.split), shard.number))
            for part in self._parts(shard.split, needed)
        ]

    def _content_tree(self, part: Part, split: str) -> dict[str, Any]:
        if (part, split) not in self._content_trees:
            layer_set = self.layer_sets[part.layer_set]
            self._content_trees[part, split] = content_tree(self.spec, layer_set, part, split)
        return self._content_trees[part, split]

    @cached_property
    def _content_trees(self) -> dict[tuple[Part, str], dict[str, Any]]:
        return {}

    def _parts(self, split: str, needed: CacheSpec | None) -> list[Part]:
        parts = parts_of(self.spec, len(self.layer_sets), split)
        return [part for part in parts if self._reads(needed, part)]

    def parts(self, needed: CacheSpec | None = None) -> Iterator[tuple[Part, np.ndarray]]:
        """Yield the parts of each split with the (K,) bool that says which shards have them; see `files`.

        The parts of a split come in the order of its files, and splits by name.
        """
        splits, split_of = self.shards.splits
        for split in sorted(range(len(splits)), key=splits.__getitem__):
            for part in self._parts(splits[split], needed):
                yield part, split_of == split

    def _reads(self, needed: CacheSpec | None, part: Part) -> bool:
        if needed is None or part.has_audio:
            return True
        if part.draw is not None and (part.draw >= needed.masks.draws or needed.targets == "clean_only"):
            return False
        return bool(set(self.layer_sets[part.layer_set].layers) & set(needed.layers))

    def commit_of(self, file: ShardFile) -> dict[str, Any] | None:
        """Return the commit record of a file, or None if the file is not finished.

        Raises:
            CacheError: If the record is damaged or belongs to a file with other content.
        """
        try:
            record = decode_record(self.store.read(file.commit, MAX_RECORD_BYTES))
            check_commit(record)
        except FileNotFoundError:
            return None
        except CacheAccessError:
            raise
        except ValueError as error:
            raise damage_error(self.store, file.commit, f"is damaged ({error})") from error
        if record["content"] != file.content:
            raise damage_error(self.store, file.commit, "belongs to another file or cache")
        return record

    def missing(self, needed: CacheSpec | None = None) -> MissingFiles:
        """Return the files without a commit record by shard number, or only those that a need reads."""
        committed = set(self.store.names("commits"))
        shards = self.shards
        count = max((len(self._parts(split, needed)) for split in shards.splits[0]), default=0)
        absent = np.zeros((len(shards), count), bool)
        position = np.zeros(len(shards), np.int64)
        for part, members in self.parts(needed):
            numbers = shards.numbers[members].tolist()
            absent[members, position[members]] = [commit_name(part, number) not in committed for number in numbers]
            position[members] += 1
        return MissingFiles(shards.numbers, absent, lambda number: self.files(shards.numbered(number), needed))

    def covers(self, needed: CacheSpec) -> bool:
        """Return whether the specification has all layers and draws that a need reads.

        Raises:
            CacheError: If the cache can't serve the need even when extended.
        """
        differences = self.spec.differences(needed)
        if differences:
            raise CacheError(
                f"the cache at {self.store.location} ({self.record['utterances']} utterances, "
                f"{shown_audio(self.record['seconds'])} of audio) was made for something else ({'; '.join(differences)}); "
                "set cache.path to another folder, or use the settings the cache was made with"
            )
        return self.spec.lacking(needed) is None


def check_content(metadata: Mapping[bytes, bytes] | None, file: ShardFile) -> None:
    """Raise ValueError if the metadata in a Parquet footer say that it is not this shard file."""
    if (metadata or {}).get(CONTENT_KEY, file.content.encode()) != file.content.encode():
        raise ValueError("it belongs to another file or cache")


def file_record(path: Path, rows: int, content: str, failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the commit record of a file at a local path: rows, bytes, SHA-256, content key, and failed utterances if any."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"rows": rows, "bytes": path.stat().st_size, "sha256": digest, "content": content}
    return record | ({"failed": dict(failed)} if failed else {})


def write_commit(store: Store, file: ShardFile, record: dict[str, Any]) -> None:
    """Write the commit record of a shard file. Call it only after the file itself was written."""
    store.write(file.commit, encode_record(record))


def cache_bytes(cache: Cache) -> int:
    """Return the total size in bytes of the existing shard files of a cache."""
    sizes, numbers = cache.store.sizes(), cache.shards.numbers
    return sum(
        sizes.get(file_name(part, shard), 0) for part, members in cache.parts() for shard in numbers[members].tolist()
    )
