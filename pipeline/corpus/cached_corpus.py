"""The corpus of a cache, compared with an index that another version of this program may have made."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_distill.pipeline.corpus.index import CorpusIndex
from ray_distill.teacher_cache.build.shard_audio import ReferredAudio, load_shard_audio
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.shard_plan import Utterances, is_earlier_hash

_COMPARED = 8
"""Maximum number of utterances whose audio is compared."""
_TOLERANCE = 2 / 32768
"""Largest difference of samples that is rounding: of the resampling or decoding, and then to 16 bits."""


def known_fingerprint(cache: Cache, index: CorpusIndex, audio: str | None = None) -> str:
    """Return the fingerprint under which a cache knows the corpus of an index.

    It is the index's own, unless an earlier version made the cache or the index: the hashes of resampled or lossy audio that it
    wrote, and so its fingerprint, depend on the machine. Then the corpus is the same if ids, splits, lengths and the hashes of
    all other audio are equal, and up to 8 utterances have the audio that the cache stores, up to rounding.

    Args:
        cache: The cache.
        index: The index.
        audio: Where the audio is that the cache refers to. Default: the recorded place.
    """
    if cache.spec.corpus == index.fingerprint or cache.record["utterances"] != len(index.utterances):
        return index.fingerprint
    mine, theirs = (_by_id(table) for table in (index.utterances.table, cache.plan))
    if any(not mine[name].equals(theirs[name]) for name in ("id", "split", "num_samples")):
        return index.fingerprint
    doubtful = pc.filter(mine["id"], different := pc.not_equal(mine["sha256"], theirs["sha256"]))
    identities = (pc.filter(table["sha256"], different).to_pylist() for table in (mine, theirs))
    if not all(is_earlier_hash(one, two) or is_earlier_hash(two, one) for one, two in zip(*identities, strict=True)):
        return index.fingerprint
    return cache.spec.corpus if _sounds_equal(cache, index.utterances, doubtful, audio) else index.fingerprint


def _by_id(table: pa.Table) -> pa.Table:
    columns = {name: table[name].cast(pa.large_string()) for name in ("id", "split", "sha256")}
    plain = pa.table(columns | {"num_samples": table["num_samples"]}).combine_chunks()
    return plain.take(pc.sort_indices(plain["id"]))


def _sounds_equal(cache: Cache, utterances: Utterances, doubtful: pa.ChunkedArray, place: str | None) -> bool:
    """Compare the corpus with the audio of some doubtful utterances in a finished shard, without files that can't be read."""
    if cache.spec.audio == "source":
        return False  # The corpus would be compared with itself.
    referred = ReferredAudio(cache, place) if cache.spec.refers_to_store else None
    for shard in cache.shards:
        if cache.store.size(cache.files(shard)[0].commit) is None:
            continue
        ids = shard.utterances.texts("id")
        members = pc.filter(ids, pc.is_in(ids, value_set=doubtful))
        if not len(members):
            continue
        audio = load_shard_audio(cache, shard, referred)
        stored = dict(zip(ids.to_pylist(), audio.waveforms, strict=False))
        compared = 0
        for name in sorted(set(members.to_pylist()) & stored.keys() - audio.failed.keys())[:_COMPARED]:
            try:
                waveform = load_waveform(utterances[int(pc.index(utterances.table["id"], name).as_py())])
            except ValueError:
                continue  # The build leaves it out and counts it.
            if len(stored[name]) != len(waveform) or float(np.abs(stored[name] - waveform).max()) > _TOLERANCE:
                return False
            compared += 1
        if compared:
            return True
    return True
