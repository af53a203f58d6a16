"""Creation of a cache, and its extension by layers and mask draws."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from torch import Tensor

from ray_distill.plugins import Plugin, find_plugin
from ray_distill.teacher_cache.codecs import CODECS, is_learned
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache import CACHE_JSON, COPIES, PLAN, Cache, state_name
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec, LayerSet, fingerprint
from ray_distill.teacher_cache.storage.json_record import encode_record
from ray_distill.teacher_cache.storage.limits import check_identity, check_plan
from ray_distill.teacher_cache.storage.lock import CLAIMS, LEASE
from ray_distill.teacher_cache.storage.shard_plan import PLAN_ROWS, PLAN_SCHEMA, plain_rows, shard_numbers
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import split_options, teacher_of_package


def check_location(store: Store) -> None:
    """Check that a cache can be built at a location.

    Raises:
        CacheError: It has no cache but other files, except for those of an interrupted `create_cache`.
        ValueError: A location in S3 has no bucket.
    """
    known = (CACHE_JSON, PLAN, "codec", COPIES, BUILDS, LEASE, CLAIMS)
    names = store.names()
    if not names:
        store.check_bucket()
    foreign = [name for name in names if name.partition("/")[0] not in known]
    if foreign and not Cache.exists(store):
        raise CacheError(
            f"{store.location} holds files (such as {foreign[0]}) but no {CACHE_JSON}; set cache.path to an empty or new folder"
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
    audio_path: str | None = None,
) -> Cache:
    """Create a cache in an empty location: write the plan, the codec's state and last ``cache.json``.

    Args:
        store: Store of the cache.
        spec: Specification of the cache.
        plan: Table from `plan_shards`.
        teacher_name: Name of the teacher for people to read.
        teacher_spec: Specification of the teacher for `load_teacher`, used by repair.
        state: State of the codec. Empty for a codec without state.
        threads: Number of PyTorch threads of a teacher on a CPU. It affects rounding, so later builds and repairs use the
            same number.
        audio_path: Where the audio is that the cache refers to, as `recorded_place` writes it. Default None: the cache
            embeds it, or reads it from the corpus.

    Raises:
        CacheError: If the location holds other files, or the specification or plan is beyond the limits of a cache.
    """
    assert bool(state) == is_learned(spec.codec)
    assert (audio_path is not None) == spec.refers_to_store
    check_location(store)
    samples, shards = plan["num_samples"].to_numpy(), len(shard_numbers(plan))
    _check(store, lambda: check_plan(samples, shards, spec, 1))
    record = {
        "plan": _write_plan(store, plan),
        "teacher_name": teacher_name,
        "teacher_spec": teacher_spec,
        "threads": threads,
        "utterances": plan.num_rows,
        "shards": shards,
        "seconds": float(samples.sum() / SAMPLE_RATE),
        "frames": int(plan["num_frames"].to_numpy().sum()),
    }
    if audio_path is not None:
        record["audio_path"] = audio_path
    if needed := _plugins(spec.codec, teacher_spec):
        record["plugins"] = [plugin.record() for plugin in needed]
    layer_set = LayerSet(layers=spec.layers, state=_write_state(store, 0, state))
    cache = _write_record(store, spec, (layer_set,), record)
    vars(cache)["plan"] = plan  # It needs not be read again.
    return cache


def _write_plan(store: Store, plan: pa.Table) -> str:
    """Write a plan and its copy, and return the SHA-256 of the file."""
    with store.create(f"{COPIES}/{PLAN}") as copy, store.create(PLAN) as path:
        with path.open("wb") as output, pq.ParquetWriter(output, PLAN_SCHEMA, compression="zstd") as writer:
            for rows in plain_rows(plan):
                writer.write_table(rows, PLAN_ROWS)
        shutil.copyfile(path, copy)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _plugins(codec: str, teacher_spec: str) -> list[Plugin]:
    """Return what the cache needs of other packages: its codec, and its teacher for repair."""
    kind = codec.partition(":")[0]
    teacher = teacher_of_package(split_options(teacher_spec)[1])
    found = [None if kind in CODECS else find_plugin("codec", kind), None if teacher is None else teacher.plugin]
    return [plugin for plugin in found if plugin is not None]


def refuse_derived(cache: Cache, needed: CacheSpec | None = None) -> None:
    """Raise CacheError if a cache that lacks files, or some of a need, was derived, because the teacher would compute others."""
    if cache.spec.derived_from is not None:
        lacking = None if needed is None else cache.spec.lacking(needed)
        raise CacheError(
            f"the cache at {cache.store.location} was derived from another one, with the fingerprint {cache.spec.derived_from}, and "
            f"lacks {lacking or 'files'}; run `ray-distill cache derive` from that cache again"
            + (", with another --output and all layers that are needed" if lacking else "")
        )


def grow_cache(cache: Cache, needed: CacheSpec, state: Mapping[str, Tensor]) -> Cache:
    """Extend a cache's identity by the layers and draws of a need. Existing files stay valid; the new ones are missing.

    Args:
        cache: A cache for which `Cache.covers` is False.
        needed: Specification of the need.
        state: State of the codec for the new layers. Empty without new layers or for a codec without state.

    Returns:
        The extended cache.
    """
    sets = cache.layer_sets
    new = tuple(sorted(set(needed.layers) - set(cache.spec.layers)))
    if new:
        sets = (*sets, LayerSet(layers=new, state=_write_state(cache.store, len(sets), state)))
    record = {key: value for key, value in cache.record.items() if key not in ("spec", "sets", "fingerprint")}
    return _write_record(cache.store, cache.spec.grown(needed), sets, record)


def move_audio(cache: Cache, audio_path: str) -> Cache:
    """Record the new place of the audio that a cache refers to, as `recorded_place` writes it."""
    record = {key: value for key, value in cache.record.items() if key not in ("spec", "sets", "fingerprint")}
    return _write_record(cache.store, cache.spec, cache.layer_sets, record | {"audio_path": audio_path})


def is_growth(cache: Cache, copy: Cache) -> bool:
    """Return whether the copy of ``cache.json`` is an extension of it, as an interrupted `grow_cache` or `move_audio` leaves it."""
    rest, rest_of_copy = (
        {key: value for key, value in found.record.items() if key not in ("spec", "sets", "fingerprint", "audio_path")}
        for found in (cache, copy)
    )
    return (
        rest == rest_of_copy
        and copy.layer_sets[: len(cache.layer_sets)] == cache.layer_sets
        and not cache.spec.differences(copy.spec)
        and cache.spec.grown(copy.spec) == copy.spec
    )


def _check(store: Store, check: Callable[[], None]) -> None:
    """Apply the limits with which `Cache.open` and `Cache.plan` read what is about to be written."""
    try:
        check()
    except ValueError as error:
        raise CacheError(f"the cache at {store.location} can't be created: {error}") from error


def _write_state(store: Store, layer_set: int, state: Mapping[str, Tensor]) -> str | None:
    if not state:
        return None
    data = safetensors.torch.save({key: value.cpu().contiguous() for key, value in state.items()})
    for name in (state_name(layer_set), f"{COPIES}/{state_name(layer_set)}"):
        store.write(name, data)
    return hashlib.sha256(data).hexdigest()


def _write_record(store: Store, spec: CacheSpec, sets: tuple[LayerSet, ...], record: dict[str, Any]) -> Cache:
    record = record | {
        "spec": spec.model_dump(mode="json"),
        "sets": [layer_set.model_dump(mode="json") for layer_set in sets],
        "fingerprint": fingerprint(spec, sets),
    }
    _check(store, lambda: check_identity(spec, sets, record))
    # The copy comes first. See `is_growth`.
    for name in (f"{COPIES}/{CACHE_JSON}", CACHE_JSON):
        store.write(name, encode_record(record))
    return Cache.open(store)


def remove_unused_states(cache: Cache) -> None:
    """Remove codec states of builds that were killed before they wrote ``cache.json``."""
    known = {state_name(number) for number, chosen in enumerate(cache.layer_sets) if chosen.state is not None}
    for name in (*cache.store.names("codec"), *cache.store.names(f"{COPIES}/codec")):
        if name.removeprefix(f"{COPIES}/") not in known and Path(name).name.startswith("set="):
            cache.store.remove(name)
