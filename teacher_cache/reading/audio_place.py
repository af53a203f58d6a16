"""Where the audio of a cache is: in the cache, or in an audio store or another cache to which it refers.

``cache.json`` records the place relative to the cache, so that both can be moved together, and the fingerprint of the audio, by which
a reader knows it again wherever it is.
"""

import posixpath

import pyarrow.compute as pc

from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterances
from ray_distill.teacher_cache.storage.store import Store

AUDIO_ONLY = CacheSpec.of_audio("", 1.0)
"""The need of the audio alone, for `Cache.missing` and `verify_cache`, whatever else a cache holds."""
_GIVE_PLACE = "give its place as cache.audio_path, or to commands as --audio"


def recorded_place(cache: Store, audio: Store) -> str:
    """Return the place of the audio as a cache records it: relative if both are on local disks or in one bucket, or else whole."""
    (scheme, one, options), (other_scheme, other, other_options) = _parts(cache.location), _parts(audio.location)
    if (scheme, options) != (other_scheme, other_options):
        return audio.location
    return posixpath.relpath(other, one)


def holder_of(cache: Cache, location: str | None = None) -> Cache:
    """Open the audio store or the cache that holds the audio of a cache.

    Args:
        cache: The cache.
        location: Where the audio is now. Default None: the recorded place. Only places relative to the cache are opened unasked,
            since a cache may come from a stranger.

    Returns:
        The cache itself if it embeds its audio.

    Raises:
        CacheError: If there is no such audio, or it is not the audio that the cache refers to, or a place is given for a cache that
            refers to none.
    """
    if not cache.spec.refers_to_store:
        refuse_place(cache.store, cache.spec, location)
        assert cache.spec.embeds_audio
        return cache
    refers = f"the cache at {cache.store.location} refers to audio"
    store = Store(location) if location is not None else _recorded_store(cache)
    if not Cache.exists(store):
        raise CacheError(f"{refers} at {store.location}, but there is none; {_GIVE_PLACE}")
    holder = open_holder(store)
    wanted, found = cache.spec.audio_fingerprint, holder.spec.audio_fingerprint
    if wanted != found:
        raise CacheError(
            f"{refers} with the fingerprint {wanted[:12]}..., but that at {store.location} has {found[:12]}...; {_GIVE_PLACE}"
        )
    return holder


def refuse_place(cache: Store, spec: CacheSpec, location: str | None) -> None:
    """Raise CacheError if a place of the audio is given for a cache that refers to none."""
    if location is not None:
        how = "holds its audio itself" if spec.embeds_audio else "reads its audio from the corpus (cache.audio=source)"
        raise CacheError(
            f"the cache at {cache.location} {how}, so the place {location} of its audio does nothing; leave it out"
        )


def refuse_audio_store(cache: Cache, advice: str) -> None:
    """Raise CacheError if a cache is an audio store, which can't be the cache of a teacher. ``advice`` says what would be right."""
    if cache.spec.is_audio_store:
        raise CacheError(f"the cache at {cache.store.location} is an audio store, which has no targets; {advice}")


def open_holder(location: str | Store) -> Cache:
    """Open an audio store, or a cache that embeds its audio. CacheError if there is none, or the cache refers to audio elsewhere."""
    holder = Cache.open(location)
    if not holder.spec.embeds_audio:
        raise CacheError(
            f"the cache at {holder.store.location} refers to audio elsewhere itself; give the place of the audio store or the cache "
            "that holds it"
        )
    return holder


def _recorded_store(cache: Cache) -> Store:
    """Return the store at the recorded place. CacheError if it is not relative to the cache."""
    place = cache.record.get("audio_path", "")
    scheme, path, options = _parts(cache.store.location)
    # The options of a URI may name another server.
    has_options = scheme and any(mark in place for mark in ("?", "#", "::"))
    if not place or "://" in place or place.startswith("/") or has_options:
        raise CacheError(
            f"the cache at {cache.store.location} names the place {place!r} of its audio, which is not opened unasked because a cache "
            "may come from a stranger; if you trust it, give the place as cache.audio_path, or to commands as --audio"
        )
    return Store(scheme + posixpath.normpath(posixpath.join(path, place)) + options)


def check_holds(holder: Cache, utterances: Utterances, place: str) -> None:
    """Check that an audio store or a cache holds the audio of some utterances.

    Args:
        holder: The audio store, or a cache that embeds its audio.
        utterances: The utterances.
        place: Location of the cache that shall refer to it, for the message.

    Raises:
        CacheError: If an utterance is missing there, or has another split or other audio.
    """
    stored = Utterances(holder.plan)
    rows = pc.index_in(utterances.texts("id"), value_set=stored.texts("id"))
    for name, what in (("id", "no utterance"), ("split", "another split for"), ("sha256", "other audio for utterance")):
        theirs = stored.texts(name).take(rows)
        same = pc.fill_null(pc.equal(utterances.texts(name), theirs), False)
        if not pc.all(same).as_py():
            first = utterances[int(pc.index(same, False).as_py())].id
            raise CacheError(
                f"the cache at {place} can't refer to the audio at {holder.store.location}, which has {what} {first}; set "
                "cache.audio_path to another place, where the audio of this corpus is stored"
            )


def _parts(location: str) -> tuple[str, str, str]:
    """Return the scheme with the bucket, the path in it, which begins with a slash, and the options from the question mark on.

    Scheme and options of a local path are empty.
    """
    if "://" not in location:
        return "", location, ""
    scheme, _, rest = location.partition("://")
    rest, mark, options = rest.partition("?")
    bucket, _, path = rest.partition("/")
    return f"{scheme}://{bucket}", f"/{path}", mark + options
