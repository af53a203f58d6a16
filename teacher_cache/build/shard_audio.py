"""Audio of a shard: decoded from the corpus, or taken from the cache or the audio store that holds it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_distill.teacher_cache.embedded_audio import DECODERS, ENCODERS
from ray_distill.teacher_cache.reading.audio_place import holder_of
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile, check_content
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError, CacheError, content_key, parts_of
from ray_distill.teacher_cache.storage.failed_utterances import check_failed, reason_of
from ray_distill.teacher_cache.storage.read_error import read_error
from ray_distill.teacher_cache.storage.shard_plan import Shard, Utterances


@dataclass(frozen=True)
class ShardAudio:
    """Decoded audio of a shard.

    Attributes:
        waveforms: One (S,) float32 waveform in [-1, 1] per utterance, in the shard's order; empty for a failed one.
        embedded: Values of the ``audio`` column: FLAC or little-endian 16-bit PCM; empty for a failed one.
        failed: Reasons by id for the utterances that could not be read.
        problem: A sentence that says why the shard has no audio at all. The other fields are then empty. Default: none.
    """

    waveforms: list[np.ndarray]
    embedded: list[bytes]
    failed: dict[str, str]
    problem: str = ""

    def without(self, shard: Shard, failed: Mapping[str, str]) -> "ShardAudio":
        """Return the audio without utterances that have failed, given the reasons by id."""
        if self.problem or not failed:
            return self
        gone = [utterance.id in failed for utterance in shard.utterances]
        waveforms = [np.zeros(0, np.float32) if out else w for out, w in zip(gone, self.waveforms, strict=True)]
        embedded = [b"" if out else data for out, data in zip(gone, self.embedded, strict=True)]
        return ShardAudio(waveforms, embedded, {**failed, **self.failed})


def load_shard_audio(cache: Cache, shard: Shard, referred: "ReferredAudio | None" = None) -> ShardAudio:
    """Return a shard's audio from where the cache refers to, or from its finished file with audio if any, or else from the corpus.

    Args:
        cache: The cache.
        shard: A shard of its plan.
        referred: What a cache without audio refers to. Default: the audio at the recorded place.
    """
    first = cache.files(shard)[0]
    if not cache.spec.embeds_audio:
        stored = cache.spec.refers_to_store
        audio = (referred or ReferredAudio(cache)).load(shard) if stored else audio_from_corpus(cache, shard)
        if not first.part.leads or cache.store.size(first.commit) is None:
            return audio
        try:
            failed = check_failed(_commit_of(cache, first), [utterance.id for utterance in shard.utterances])
        except ValueError as error:
            return ShardAudio([], [], {}, str(error))
        return audio.without(shard, failed)
    if cache.store.size(first.commit) is not None:
        return _from_cache(cache, shard, first)
    return audio_from_corpus(cache, shard)


class ReferredAudio:
    """The audio to which a cache refers, by shards of the cache, whose utterances may be in several shards there.

    Args:
        cache: A cache that embeds no audio.
        location: Where the audio is now. Default: the recorded place.
        numbers: What `numbers` returns for some shards, by their numbers. For others it reads the whole plan there. Default: none.

    Attributes:
        location: Where the audio is.

    Raises:
        CacheError: If there is no such audio; see `holder_of`.
    """

    def __init__(
        self, cache: Cache, location: str | None = None, numbers: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self._holder = holder_of(cache, location)
        self._known = numbers or {}
        self.location = self._holder.store.location

    @cached_property
    def _plan(self) -> tuple[pa.LargeStringArray, np.ndarray]:
        plan = self._holder.plan
        return Utterances(plan).texts("id"), plan["shard"].to_numpy()

    def numbers(self, shard: Shard) -> Sequence[int]:
        """Return the numbers of the shards there that hold a shard's utterances."""
        if shard.number in self._known:
            return self._known[shard.number]
        ids, shards = self._plan
        rows = pc.index_in(shard.utterances.texts("id"), value_set=ids).drop_null()
        return [int(number) for number in np.unique(shards[rows.to_numpy()])]

    def load(self, shard: Shard) -> ShardAudio:
        """Return a shard's audio. An utterance that is missing there has failed, with the reason that is recorded there."""
        holder = self._holder
        stored: dict[str, bytes] = {}
        failed: dict[str, str] = {}
        wanted = shard.utterances.texts("id")
        for number in self.numbers(shard):
            file = _file_with_audio(holder, number, shard.split)
            try:
                failed |= _commit_of(holder, file).get("failed", {})
                stored |= _read(holder, file, wanted)
            except CacheAccessError as error:
                return ShardAudio([], [], {}, str(error))
            except (OSError, ValueError, LookupError, TypeError, RuntimeError, pa.ArrowException) as error:
                known = isinstance(error, CacheError)
                return ShardAudio([], [], {}, str(error if known else read_error(holder.store, file.name, error)))
        decode = DECODERS[holder.spec.audio]
        absent = f"the audio at {holder.store.location} lacks it"
        lacking = {u.id: failed.get(u.id, absent) for u in shard.utterances if u.id not in stored}
        try:
            waveforms = [decode(stored[u.id]) if u.id in stored else np.zeros(0, np.float32) for u in shard.utterances]
        except ValueError as error:
            return ShardAudio([], [], {}, str(read_error(holder.store, file.name, error)))
        return ShardAudio(waveforms, [b""] * len(waveforms), lacking)


def _file_with_audio(holder: Cache, number: int, split: str) -> ShardFile:
    """Return the file of a shard that holds the audio, without reading the plan."""
    part = parts_of(holder.spec, len(holder.layer_sets), split)[0]
    return ShardFile(number, part, content_key(holder.spec, holder.layer_sets[0], part, number, split))


def _commit_of(cache: Cache, file: ShardFile) -> dict[str, Any]:
    record = cache.commit_of(file)
    if record is None:
        raise CacheError(f"{cache.store.at(file.name)} is not finished; run the cache stage again")
    return record


def audio_from_corpus(cache: Cache, shard: Shard, *, exact: bool = False) -> ShardAudio:
    """Decode a shard's audio from the corpus; ``exact`` as for `load_waveform`. Nothing is encoded if the cache embeds none."""
    encode = ENCODERS.get(cache.spec.audio)
    waveforms: list[np.ndarray] = []
    embedded: list[bytes] = []
    failed = {}
    for utterance in shard.utterances:
        try:
            waveform = load_waveform(utterance, exact=exact)
            data = b"" if encode is None else encode(waveform)
        except (ValueError, OSError) as error:
            failed[utterance.id] = reason_of(error)
            waveform, data = np.zeros(0, np.float32), b""
        waveforms.append(waveform)
        embedded.append(data)
    return ShardAudio(waveforms, embedded, failed)


def audio_from_damaged_file(cache: Cache, shard: Shard, failed: Mapping[str, str]) -> ShardAudio | None:
    """Return a shard's audio from its damaged clean file, or None if any utterance differs from the corpus index.

    Args:
        cache: The cache.
        shard: A shard of its plan.
        failed: Reasons by id for the utterances that the file lacks.
    """
    decode, encode = DECODERS[cache.spec.audio], ENCODERS[cache.spec.audio]
    waveforms: list[np.ndarray] = []
    embedded: list[bytes] = []
    row = 0
    try:
        with pq.ParquetFile(cache.store.open(cache.files(shard)[0].name), page_checksum_verification=True) as file:
            for utterance in shard.utterances:
                if utterance.id in failed:
                    waveforms.append(np.zeros(0, np.float32))
                    embedded.append(b"")
                    continue
                table = file.read_row_group(row, columns=["audio"], use_threads=False)
                row += 1
                waveform = decode(table["audio"][0].as_py())
                if hashlib.sha256(waveform.tobytes()).hexdigest() != utterance.sha256:
                    return None
                waveforms.append(waveform)
                embedded.append(encode(waveform))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, pa.ArrowException):
        return None
    return ShardAudio(waveforms, embedded, dict(failed))


def _from_cache(cache: Cache, shard: Shard, audio_file: ShardFile) -> ShardAudio:
    decode = DECODERS[cache.spec.audio]
    ids = [utterance.id for utterance in shard.utterances]
    try:
        failed = check_failed(cache.commit_of(audio_file) or {"rows": len(ids)}, ids)
        stored = _read(cache, audio_file)
        if list(stored) != [name for name in ids if name not in failed]:
            raise ValueError("its utterances are not those of the plan")
        waveforms = [np.zeros(0, np.float32) if name in failed else decode(stored[name]) for name in ids]
        return ShardAudio(waveforms, [stored.get(name, b"") for name in ids], dict(failed))
    except CacheAccessError as error:
        return ShardAudio([], [], {}, str(error))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, pa.ArrowException) as error:
        return ShardAudio([], [], {}, str(read_error(cache.store, audio_file.name, error)))


def _read(cache: Cache, file: ShardFile, wanted: pa.LargeStringArray | None = None) -> dict[str, bytes]:
    """Return the stored audio of a shard file by utterance id in the order of rows, or only that of some utterances."""
    with pq.ParquetFile(cache.store.open(file.name), page_checksum_verification=True) as parquet:
        check_content(parquet.metadata.metadata, file)
        table = parquet.read(columns=["id", "audio"], use_threads=False)
    if wanted is not None:
        table = table.filter(pc.is_in(table["id"].cast(pa.large_string()), value_set=wanted))
    return dict(zip(table["id"].to_pylist(), table["audio"].to_pylist(), strict=True))
