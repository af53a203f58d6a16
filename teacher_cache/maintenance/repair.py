"""Bringing a damaged cache back: only what is missing or damaged is made again, to the same bytes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.teacher_cache.build.build_cache import refuse_failures, writer_here
from ray_distill.teacher_cache.build.shard_writer import ShardAudio, corpus_audio, decode_shard
from ray_distill.teacher_cache.embedded_audio import from_flac, from_pcm, to_flac, to_pcm
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.storage.cache import CACHE_JSON, COPIES, Cache, ShardFile
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.lock import building, full_disk
from ray_distill.teacher_cache.storage.shard_plan import Shard, moved
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import load_teacher

SET_ASIDE = "set-aside"


def repair_cache(
    location: str | Path,
    teacher_spec: str | None = None,
    device: str = "cpu",
    corpus_moved: tuple[str, str] | None = None,
) -> list[str]:
    """Repairs a cache in this process; a build that was never finished is finished too.

    Records are restored from their copies. Damaged shard files are computed again, from the audio embedded in the cache where
    it is sound, else from the corpus, else from what can still be read of the damaged file (each utterance is checked against
    the corpus index, which only audio of 16 bits, 16 kHz and one channel can pass: other audio was indexed before it was
    resampled and rounded). A damaged file stays until its successor is ready. Files that do not belong to the cache are moved to
    ``set-aside/``.

    Args:
        location: of the cache.
        teacher_spec: for `load_teacher`; default the one in ``cache.json``. Only loaded where shards are damaged.
        device: where the teacher computes.
        corpus_moved: the folder below which the corpus lay when the cache was begun, and where that folder is now.
            Default it is where it was.

    Returns:
        One sentence for each thing done; empty where nothing was wrong.

    Raises:
        CacheError: both copies of a record are gone, the teacher is another, no audio of the cache lay in the folder that
            moved, or the audio can't be had (all else is repaired first).
    """
    store = Store(location)
    if not Cache.exists(store) and store.size(f"{COPIES}/{CACHE_JSON}") is None:
        raise CacheError(f"there is no teacher cache at {store.location} (no {CACHE_JSON}, and no copy of it)")
    done: list[str] = []
    with building(store) as check:
        store.remove_leftovers()
        problems = verify_cache(store)
        records = [problem.name for problem in problems if problem.kind == "identity"]
        for name in records:
            copy = name.removeprefix(f"{COPIES}/") if name.startswith(COPIES) else f"{COPIES}/{name}"
            if copy in records or store.size(copy) is None:
                raise CacheError(
                    f"{store.at(name)} and its copy {copy} are both lost; bring one of them back from a backup"
                )
            store.write(name, store.read(copy))
            done.append(f"{store.at(name)} restored from its copy")
        if records:
            problems = verify_cache(store)
        for problem in problems:
            if problem.kind == "stranger":
                store.move(problem.name, _free_name(store, f"{SET_ASIDE}/{problem.name}"))
                done.append(f"{store.at(problem.name)} moved to {SET_ASIDE}/")
        damaged = [problem.file for problem in problems if problem.file is not None]
        if damaged:
            cache = Cache.open(store)
            shards = cache.shards if corpus_moved is None else _moved(cache, *map(Path, corpus_moved))
            done += _make_again(cache, shards, damaged, teacher_spec, device, check)
    return done


def _free_name(store: Store, name: str) -> str:
    """The name, or with a number where something was set aside under it before."""
    number, free = 1, name
    while store.size(free) is not None:
        number, free = number + 1, f"{name}.{number + 1}"
    return free


def _moved(cache: Cache, old: Path, new: Path) -> list[Shard]:
    utterances = [utterance for shard in cache.shards for utterance in shard.utterances]
    paths = {
        utterance.id: str(new.absolute() / Path(utterance.path).relative_to(old))
        for utterance in utterances
        if Path(utterance.path).is_relative_to(old)
    }
    if not paths:
        raise CacheError(f"no audio of the cache lay below {old}; the first utterance was at {utterances[0].path}")
    return moved(cache.shards, paths)


def _make_again(
    cache: Cache,
    shards: list[Shard],
    damaged: list[ShardFile],
    teacher_spec: str | None,
    device: str,
    check: Callable[[], None],
) -> list[str]:
    done: list[str] = []
    failures: list[str] = []
    teacher = load_teacher(teacher_spec or cache.record["teacher_spec"], device)
    with writer_here(cache, teacher, device) as writer:
        for shard in shards:
            files = [file for file in damaged if file.shard == shard.number]
            if not files:
                continue
            check()
            # Damage must not pass for sound audio, where its commit is still there.
            audio = corpus_audio(cache, shard) if cache.files(shard)[0] in files else decode_shard(cache, shard)
            if audio.failures:
                audio = _salvaged(cache, shard) or audio
            if audio.failures:
                failures += audio.failures
                continue
            for file in files:
                cache.store.remove(file.commit)
            record = writer.write(shard, audio)
            if record["full"]:
                raise full_disk(cache.store, record["failures"][-1])
            failures += record["failures"]
            done += [f"{cache.store.at(file.name)} made again" for file in files]
    refuse_failures(failures)
    return done


def _salvaged(cache: Cache, shard: Shard) -> ShardAudio | None:
    """A shard's audio from what can be read of its damaged file; None where any utterance is not as it was indexed."""
    decode, encode = (from_flac, to_flac) if cache.spec.audio == "flac" else (from_pcm, to_pcm)
    waveforms, embedded = [], []
    try:
        with pq.ParquetFile(cache.store.open(cache.files(shard)[0].name), page_checksum_verification=True) as file:
            for row, utterance in enumerate(shard.utterances):
                table = file.read_row_group(row, columns=["audio"], use_threads=False)
                waveform = decode(table["audio"][0].as_py())
                if hashlib.sha256(waveform.tobytes()).hexdigest() != utterance.sha256:
                    return None
                waveforms.append(waveform)
                embedded.append(encode(waveform))
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, pa.ArrowException):
        return None
    return ShardAudio(waveforms, embedded, [])
