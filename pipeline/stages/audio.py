"""The audio to which the caches of a run refer: an audio store, which is built once, a cache that holds the audio, or the corpus."""

from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.ray_session import counted, init_ray, quiet_ray
from ray_distill.pipeline.stages.run import Run
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.build.build_cache import Progress
from ray_distill.teacher_cache.build.shard_workers import Workers
from ray_distill.teacher_cache.frames import shown_audio
from ray_distill.teacher_cache.maintenance.verify import Problem, verify_audio
from ray_distill.teacher_cache.reading.audio_place import holder_of
from ray_distill.teacher_cache.reading.source_rows import SOUGHT_FILES, missing_sources
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.store import Store


def audio_places(run: Run) -> list[str]:
    """Return the places of the audio to which the caches of a run refer, each once."""
    places = [part.config.cache.audio_location for part in run.parts]
    return list(dict.fromkeys(place for place in places if place is not None))


def store_audio(run: Run) -> None:
    """Build the audio stores that the caches of a run refer to, or finish interrupted ones.

    Raises:
        ConfigError: The cache refers to audio elsewhere.
        CacheError: Something else is at the place of the audio, or it can't be built.
    """
    for place in audio_places(run):
        _store_audio(run, place)


def _store_audio(run: Run, place: str) -> None:
    store = Store(place)
    if not Cache.exists(store):
        for part in run.parts:
            refuse_other_place(part, place)
    elif not (found := Cache.open(store)).spec.is_audio_store or not found.missing():
        return
    elif found.spec.corpus != run.corpus.fingerprint:
        raise CacheError(
            f"the audio store at {place} is not finished, and is that of another corpus; set cache.audio_path to another place, or "
            "run the command that began it again"
        )
    (part, *_) = [part for part in run.parts if part.config.cache.audio_location == place]
    spec = part.audio_spec
    assert spec is not None
    with quiet_ray(run.folder.ray_log), run.progress("cache", "utterances") as update:
        init_ray()

        def show(progress: Progress) -> None:
            note = (
                f"audio, {shown_audio(progress.seconds_done)} of {shown_audio(progress.seconds)}, "
                f"{shown_audio(60 * progress.audio_per_second)} of audio/min"
            )
            update(progress.utterances_done, progress.utterances, note)

        report = build_audio_store(
            place,
            spec,
            plan_audio(run.utterances, spec.shard_seconds),
            workers=Workers(),
            max_failed=part.config.cache.max_failed,
            on_progress=show,
        )
    size = cache_bytes(Cache.open(store))
    reused = f", {report.reused} reused" if report.reused else ""
    run.say(
        f"cache   audio: {counted(report.written, 'shard')} written in {report.elapsed:.0f} s{reused}: {size / 1e6:.1f} MB, "
        f"{size / run.seconds / 1e3:.1f} kB per second of audio, at {place}"
    )


def refuse_other_place(part: Run, place: str) -> None:
    """Raise ConfigError if a part's cache refers to audio that is still at another place than the configured one."""
    if part.config.cache.audio_location != place or not Cache.exists(part.cache):
        return
    cache = Cache.open(part.cache)
    if not cache.spec.refers_to_store:
        return
    try:
        holder = holder_of(cache)
    except CacheError:  # It is lost there too, so it is stored again.
        return
    raise ConfigError(
        f"cache.audio_path: there is no audio at {place}, but the cache at {part.cache.location} refers to that at "
        f"{holder.store.location}; set cache.audio_path={holder.store.location}"
    )


def check_audio(run: Run) -> list[Problem]:
    """Return the problems of the audio to which the caches of a run refer, each place checked once.

    Of a corpus only some files are looked for, since the index stage has looked at all of them.
    """
    problems: list[Problem] = []
    checked: set[str] = set()
    for part in run.parts:
        cache, place, new = Cache.open(part.cache), part.audio, part.audio not in checked
        if cache.spec.audio == "source":
            lost = missing_sources(cache, place, most=SOUGHT_FILES) if new else None
            problems += [Problem("audio", lost, "audio")] if lost else []
        else:  # The fingerprint is compared for each cache, the files are read once.
            problems += verify_audio(cache, place, checksums=part.config.cache.verify and new)
        checked |= {place} if place else set()
    return problems
