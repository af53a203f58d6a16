"""The corpus of a cache, compared with an index that another version of this program may have made."""

from collections.abc import Sequence

import numpy as np

from ray_distill.pipeline.corpus.index import CorpusIndex
from ray_distill.teacher_cache.build.shard_audio import load_shard_audio
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.shard_plan import Utterance, is_earlier_hash

_COMPARED = 8
"""Maximum number of utterances whose audio is compared."""
_TOLERANCE = 2 / 32768
"""Largest difference of samples that is rounding: of the resampling or decoding, and then to 16 bits."""


def known_fingerprint(cache: Cache, index: CorpusIndex) -> str:
    """Return the fingerprint under which a cache knows the corpus of an index.

    It is the index's own, unless an earlier version made the cache or the index: the hashes of resampled or lossy audio that it
    wrote, and so its fingerprint, depend on the machine. Then the corpus is the same if ids, splits, lengths and the hashes of
    all other audio are equal, and up to 8 utterances have the audio that the cache stores, up to rounding.
    """
    if cache.spec.corpus == index.fingerprint or cache.record["utterances"] != len(index.utterances):
        return index.fingerprint
    mine = {utterance.id: utterance for utterance in index.utterances}
    theirs = {utterance.id: utterance for shard in cache.shards for utterance in shard.utterances}
    if mine.keys() != theirs.keys() or not all(_may_be_equal(mine[name], theirs[name]) for name in mine):
        return index.fingerprint
    doubtful = [name for name in sorted(mine) if mine[name].sha256 != theirs[name].sha256]
    return cache.spec.corpus if _sounds_equal(cache, mine, doubtful) else index.fingerprint


def _may_be_equal(one: Utterance, other: Utterance) -> bool:
    return (one.split, one.num_samples) == (other.split, other.num_samples) and (
        one.sha256 == other.sha256
        or is_earlier_hash(one.sha256, other.sha256)
        or is_earlier_hash(other.sha256, one.sha256)
    )


def _sounds_equal(cache: Cache, utterances: dict[str, Utterance], doubtful: Sequence[str]) -> bool:
    """Compare the corpus with the audio of some doubtful utterances in a finished shard, without files that can't be read."""
    for shard in cache.shards:
        members = {utterance.id for utterance in shard.utterances} & set(doubtful)
        if not members or cache.store.size(cache.files(shard)[0].commit) is None:
            continue
        audio = load_shard_audio(cache, shard)
        stored = dict(zip((utterance.id for utterance in shard.utterances), audio.waveforms, strict=False))
        compared = 0
        for name in sorted(members & stored.keys() - audio.failed.keys())[:_COMPARED]:
            try:
                waveform = load_waveform(utterances[name])
            except ValueError:
                continue  # The build leaves it out and counts it.
            if len(stored[name]) != len(waveform) or float(np.abs(stored[name] - waveform).max()) > _TOLERANCE:
                return False
            compared += 1
        if compared:
            return True
    return True
