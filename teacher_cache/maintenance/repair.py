"""Repair of a cache: missing and damaged files are rebuilt, and all others are kept."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_distill.teacher_cache.build.audio_store import write_audio
from ray_distill.teacher_cache.build.build_cache import raise_failures
from ray_distill.teacher_cache.build.shard_audio import (
    ReferredAudio,
    ShardAudio,
    audio_from_corpus,
    audio_from_damaged_file,
    load_shard_audio,
)
from ray_distill.teacher_cache.build.shard_writer import open_writer
from ray_distill.teacher_cache.maintenance.cache_teacher import chosen_teacher
from ray_distill.teacher_cache.maintenance.verify import Problem, verify_audio, verify_cache
from ray_distill.teacher_cache.reading.audio_place import holder_of, recorded_place
from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST, take_manifest, update_manifest
from ray_distill.teacher_cache.reading.source_rows import with_places
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.storage.cache import CACHE_JSON, COPIES, Cache, ShardFile
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError
from ray_distill.teacher_cache.storage.create import move_audio, refuse_derived
from ray_distill.teacher_cache.storage.lock import cache_lock, disk_full_error
from ray_distill.teacher_cache.storage.shard_plan import PLAN_SCHEMA, Shard, Shards, plain_rows, with_sources
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import load_teacher

SET_ASIDE = "set-aside"


def repair_cache(
    location: str | Path,
    teacher_spec: str | None = None,
    device: str = "cpu",
    corpus_moved: tuple[str, str] | None = None,
    audio: str | None = None,
) -> list[str]:
    """Repair a cache in this process. An interrupted build is finished too.

    Records are restored from their copies. Missing and damaged shard files are computed again, from the audio embedded in the
    cache if that is intact, otherwise from the corpus, otherwise from the readable part of the damaged file. In the last case
    each utterance must match the corpus index, which is only possible for 16-bit mono audio at 16 kHz, because other audio
    is indexed before it is resampled or rounded. No utterance is left out but those that failed when the file was built. A
    damaged file stays until its replacement is complete. Files that do not belong to the cache are moved to ``set-aside/``.
    Audio to which the cache refers is repaired by itself, with the location of its store.

    Args:
        location: Location of the cache.
        teacher_spec: Specification of the teacher for `load_teacher`. Default the one in ``cache.json``, if that is safe; see
            `chosen_teacher`. The teacher is only loaded if shards are damaged.
        device: Device of the teacher. Default the CPU.
        corpus_moved: Old and new path of a folder above the corpus, if it was moved since the cache was created. Not for a cache with
            ``audio`` ``source``.
        audio: New place of the audio that the cache refers to, which is recorded. Default: the recorded place. For a cache with
            ``audio`` ``source`` the path of an index of the corpus, as for `CacheReader`, which is used this time.

    Returns:
        One sentence per repair. Empty for an intact cache.

    Raises:
        CacheError: If both copies of a record are missing or damaged, ``cache.json`` and its copy are intact but describe
            different caches, anything in the cache is a link, the folder can't be written to, the teacher is not the cache's or
            must be named, shard files of a derived cache are damaged, no audio file was below the old path, or audio can't be read
            or the audio to which the cache refers is missing or damaged (everything else is repaired first).
    """
    store = Store(location)
    if not Cache.exists(store) and store.size(f"{COPIES}/{CACHE_JSON}") is None:
        raise CacheError(f"there is no teacher cache at {store.location} (no {CACHE_JSON} and no copy of it)")
    done: list[str] = []
    with cache_lock(store) as check_lock:
        store.remove_leftovers()
        problems = verify_cache(store)
        for problem in problems:
            if problem.kind == "conflict":
                raise CacheError(problem.text)
        done += _set_aside(store, problems)
        records = [problem.name for problem in problems if problem.kind == "identity"]
        for name in records:
            copy = name.removeprefix(f"{COPIES}/") if name.startswith(COPIES) else f"{COPIES}/{name}"
            if copy in records or store.size(copy) is None:
                raise CacheError(
                    f"{store.at(name)} and its copy {copy} are both missing or damaged; restore one of them from a backup"
                )
            store.write(name, store.read(copy))
            done.append(f"{store.at(name)} restored from its copy")
        if records:
            problems = verify_cache(store)
            done += _set_aside(store, problems)
        from_corpus = Cache.open(store).spec.audio == "source"
        if from_corpus and corpus_moved is not None:
            raise CacheError(
                f"the cache at {store.location} reads its audio from the corpus (cache.audio=source); if that has moved, give its "
                "index as --audio, which is corpus/index.parquet in the folder of a run with the new path"
            )
        if audio is not None and not from_corpus:
            done += _move_audio(Cache.open(store), audio)
        damaged = [problem.file for problem in problems if problem.file is not None]
        if damaged:
            take_manifest(store)  # What repair itself makes old is no repair.
            cache = Cache.open(store)
            if cache.spec.derived_from is not None:
                for file in damaged:
                    store.remove(file.commit)
                refuse_derived(cache)
            shards = cache.shards if corpus_moved is None else _with_moved_corpus(cache, *map(Path, corpus_moved))
            if from_corpus:
                shards = Shards(with_places(cache, cache.plan, audio))
            # A stranger's plan must not fetch other files of the same length.
            exact = not from_corpus or audio is None
            done += _rebuild(cache, shards, damaged, teacher_spec, device, check_lock, audio, exact=exact)
        old = store.size(MANIFEST) is not None
        if update_manifest(Cache.open(store)) and old:
            done.append(f"{store.at(MANIFEST)} written again from the commit records")
    lacking = verify_audio(Cache.open(store), audio, checksums=False)
    raise_failures([problem.text for problem in lacking], "while repairing:")
    return done


def _move_audio(cache: Cache, audio: str) -> list[str]:
    """Record the new place of the audio that a cache refers to. Return one sentence if it is new."""
    place = recorded_place(cache.store, holder_of(cache, audio).store)
    if place == cache.record.get("audio_path"):
        return []
    move_audio(cache, place)
    return [f"{cache.store.at(CACHE_JSON)} now names {audio} as the place of the audio"]


def _set_aside(store: Store, problems: list[Problem]) -> list[str]:
    """Move what does not belong to the cache to ``set-aside/``, folders as a whole, and return one sentence for each."""
    moved: list[str] = []
    for name in sorted({problem.name for problem in problems if problem.kind == "foreign"}):
        if not any(name.startswith(f"{folder}/") for folder in moved):
            store.move(name, _unused_name(store, f"{SET_ASIDE}/{name}"))
            moved.append(name)
    return [f"{store.at(name)} moved to {SET_ASIDE}/" for name in moved]


def _unused_name(store: Store, name: str) -> str:
    """Return the name, followed by a number if a file or folder has this name already."""
    number, unused = 1, name
    if (obstacle := store.obstacle(name)) not in (None, name):
        raise CacheError(f"{store.at(str(obstacle))} is not a folder, but repair sets files aside there; rename it")
    while store.size(unused) is not None or store.obstacle(unused) == unused:
        number, unused = number + 1, f"{name}.{number + 1}"
    return unused


def _with_moved_corpus(cache: Cache, old: Path, new: Path) -> Shards:
    moved: list[pa.Table] = []
    for rows in plain_rows(cache.plan):
        addresses = [AudioAddress.parse(path) for path in rows["path"].to_pylist()]
        below = [Path(address.file).is_relative_to(old) for address in addresses]
        paths = [
            address.with_file(new.absolute() / Path(address.file).relative_to(old)).encode()
            for address in itertools.compress(addresses, below)
        ]
        members = rows.filter(pa.array(below, pa.bool_()))
        moved.append(members.set_column(rows.schema.get_field_index("path"), "path", pa.array(paths, pa.string())))
    sources = pa.concat_tables([*moved, PLAN_SCHEMA.empty_table()])
    if not sources.num_rows:
        first = AudioAddress.parse(cache.plan["path"][0].as_py()).file
        raise CacheError(
            f"no audio file of the cache was below {old}; the first utterance was at {first}: give a folder above it as the old path"
        )
    return Shards(with_sources(cache.plan, sources))


def _recorded_audio(
    cache: Cache, shard: Shard, damaged: list[ShardFile], *, exact: bool
) -> tuple[ShardAudio, list[str]]:
    """Return the audio of a shard for its damaged files, from the corpus or else from a damaged file with audio.

    It lacks no utterance but those that failed when the file was built. The reasons of further ones are returned too.
    """
    first = cache.files(shard)[0]
    known = _known_failures(cache, shard) or {}
    audio = audio_from_corpus(cache, shard, exact=exact)
    lost = [reason for name, reason in audio.failed.items() if name not in known]
    if lost and cache.spec.embeds_audio and (rest := audio_from_damaged_file(cache, shard, known)) is not None:
        return rest, []
    audio = replace(audio, failed={name: known.get(name, reason) for name, reason in audio.failed.items()})
    return audio.without(shard, known) if first.part.leads and first not in damaged else audio, lost


def _referred_audio(cache: Cache, shard: Shard, referred: ReferredAudio) -> tuple[ShardAudio, list[str]]:
    """Return the audio for a damaged file without audio, and the reasons for utterances that the file held and the audio lacks."""
    audio, known = referred.load(shard), _known_failures(cache, shard)
    if known is None:  # Then what failed there has failed here too.
        return audio, []
    return audio, [f"utterance {name}: {reason}" for name, reason in audio.failed.items() if name not in known]


def _known_failures(cache: Cache, shard: Shard) -> dict[str, str] | None:
    """Return the utterances that failed when the first file of a shard was built. None if its record is missing or damaged."""
    try:
        record = cache.commit_of(cache.files(shard)[0])
    except CacheAccessError:
        raise
    except CacheError:
        return None
    return None if record is None else record.get("failed", {})


def _rebuild(
    cache: Cache,
    shards: Shards,
    damaged: list[ShardFile],
    teacher_spec: str | None,
    device: str,
    check_lock: Callable[[], None],
    audio_place: str | None,
    *,
    exact: bool,
) -> list[str]:
    done: list[str] = []
    failures: list[str] = []
    referred = ReferredAudio(cache, audio_place) if cache.spec.refers_to_store else None
    with ExitStack() as stack:
        write: Callable[[Shard, ShardAudio], dict[str, Any]] = partial(write_audio, cache)
        if not cache.spec.is_audio_store:
            teacher = load_teacher(chosen_teacher(cache, teacher_spec), device)
            write = stack.enter_context(open_writer(cache, teacher, device)).write
        for shard in shards:
            files = [file for file in damaged if file.shard == shard.number]
            if not files:
                continue
            check_lock()
            lost: list[str] = []
            # A damaged file may still have its commit record, so load_shard_audio must not read it.
            if cache.files(shard)[0] not in files and cache.spec.audio != "source":
                audio = load_shard_audio(cache, shard, referred)
            elif referred is not None:
                audio, lost = _referred_audio(cache, shard, referred)
            else:
                audio, lost = _recorded_audio(cache, shard, files, exact=exact)
            if lost or audio.problem:
                failures += lost or [audio.problem]
                continue
            for file in files:
                cache.store.remove(file.commit)
            record = write(shard, audio)
            if record["full"]:
                raise disk_full_error(cache.store, record["failures"][-1])
            failures += record["failures"]
            done += [f"{cache.store.at(file.name)} rebuilt" for file in files]
    raise_failures(failures)
    return done
