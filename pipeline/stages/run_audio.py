"""Where the audio of a run's cache is, and the shards that follow from it."""

from ray_distill.pipeline.composition.sections import CacheSection
from ray_distill.pipeline.corpus.index import CorpusIndex
from ray_distill.teacher_cache.reading.audio_place import holder_of, open_holder
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import default_shard_seconds
from ray_distill.teacher_cache.storage.store import Store


def audio_spec_of(settings: CacheSection, index: CorpusIndex) -> CacheSpec | None:
    """Return the specification of the audio store or the cache that a cache refers to: of what is there, or of what is to be built.

    Args:
        settings: Settings of the cache.
        index: The whole corpus, also of what a teacher can't take.

    Returns:
        None if the cache holds its audio itself.

    Raises:
        CacheError: The cache there refers to other audio itself, or is damaged.
    """
    if settings.audio_location is None:
        return None
    if Cache.exists(store := Store(settings.audio_location)):
        return open_holder(store).spec
    # If the audio of an existing cache is lost, it nearly always had the shards of the cache.
    seconds = shard_seconds_of(settings, None, index.utterances.seconds)
    return CacheSpec.of_audio(index.fingerprint, seconds)


def check_reference(cache: Cache, settings: CacheSection) -> None:
    """Raise CacheError if a cache refers to other audio than what is at the configured place. Nothing need be there yet."""
    if settings.audio_location is not None and Cache.exists(Store(settings.audio_location)):
        holder_of(cache, settings.audio_location)


def shard_seconds_of(settings: CacheSection, audio: CacheSpec | None, seconds: float) -> float:
    """Return the seconds of audio per shard of a cache.

    They are those of ``shard_minutes``, or of the cache if it exists, or of the audio that it refers to, or the default.

    Args:
        settings: Settings of the cache.
        audio: What `audio_spec_of` returns.
        seconds: Seconds of the whole audio.
    """
    if settings.shard_minutes is not None:
        return settings.shard_minutes * 60
    if Cache.exists(store := Store(settings.location)):
        return Cache.open(store).spec.shard_seconds
    return default_shard_seconds(seconds) if audio is None else audio.shard_seconds
