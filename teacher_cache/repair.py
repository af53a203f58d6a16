"""Bringing a damaged cache back: only what is missing or damaged is made again, to the same bytes."""

from pathlib import Path

from teacher_cache.build import write_missing
from teacher_cache.building import building
from teacher_cache.layout import CACHE_JSON, COPIES, Cache
from teacher_cache.spec import CacheError
from teacher_cache.store import Store
from teacher_cache.teachers import load_teacher
from teacher_cache.verify import verify_cache

SET_ASIDE = "set-aside"


def repair_cache(location: str | Path, teacher_spec: str | None = None, device: str = "cpu") -> list[str]:
    """Repairs a cache in this process; a build that was never finished is finished too.

    Records are restored from their copies. Damaged shard files are computed again, from the audio embedded in the cache where
    it is sound, else from the corpus. Files that do not belong to the cache are moved to ``set-aside/``.

    Args:
        location: of the cache.
        teacher_spec: for `load_teacher`; default the one in ``cache.json``. Only loaded where shards are damaged.
        device: where the teacher computes.

    Returns:
        One sentence for each thing done; empty where nothing was wrong.

    Raises:
        CacheError: both copies of a record are gone, the teacher is another, or the audio can't be had.
    """
    store = Store(location)
    if not Cache.exists(store) and store.size(f"{COPIES}/{CACHE_JSON}") is None:
        raise CacheError(f"there is no teacher cache at {store.location} (no {CACHE_JSON}, and no copy of it)")
    done: list[str] = []
    with building(store):
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
                store.move(problem.name, f"{SET_ASIDE}/{problem.name}")
                done.append(f"{store.at(problem.name)} moved to {SET_ASIDE}/")
        damaged = [problem for problem in problems if problem.file is not None]
        if damaged:
            for problem in damaged:
                assert problem.file is not None
                # The commit first: a kill in between leaves an unfinished file, not a trusted damaged one.
                store.remove(problem.file.commit)
                store.remove(problem.file.name)
            cache = Cache.open(store)
            write_missing(cache, load_teacher(teacher_spec or cache.record["teacher_spec"], device), None)
            done += [f"{store.at(problem.file.name)} made again" for problem in damaged if problem.file]
    return done
