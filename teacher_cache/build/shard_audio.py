"""Audio of a shard: decoded from the corpus, or taken from the cache that embeds it."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.teacher_cache.embedded_audio import DECODERS, ENCODERS
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile, damage_error
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError
from ray_distill.teacher_cache.storage.shard_plan import Shard


@dataclass(frozen=True)
class ShardAudio:
    """Decoded audio of a shard.

    Attributes:
        waveforms: One (S,) float32 waveform in [-1, 1] per utterance, in the shard's order.
        embedded: Values of the ``audio`` column: FLAC or little-endian 16-bit PCM.
        failures: One sentence per utterance that could not be read. If there are any, the other fields are incomplete.
    """

    waveforms: list[np.ndarray]
    embedded: list[bytes]
    failures: list[str]


def load_shard_audio(cache: Cache, shard: Shard) -> ShardAudio:
    """Return a shard's audio from its finished clean file if there is one, otherwise from the corpus."""
    audio_file = cache.files(shard)[0]
    if cache.store.size(audio_file.commit) is not None:
        return _from_cache(cache, audio_file)
    return audio_from_corpus(cache, shard)


def audio_from_corpus(cache: Cache, shard: Shard) -> ShardAudio:
    """Decode a shard's audio from the corpus."""
    encode = ENCODERS[cache.spec.audio]
    waveforms, embedded, failures = [], [], []
    for utterance in shard.utterances:
        try:
            waveform = load_waveform(utterance)
        except (ValueError, OSError) as error:
            failures.append(str(error))
            continue
        waveforms.append(waveform)
        embedded.append(encode(waveform))
    return ShardAudio(waveforms, embedded, failures)


def audio_from_damaged_file(cache: Cache, shard: Shard) -> ShardAudio | None:
    """Return a shard's audio from its damaged clean file, or None if any utterance differs from the corpus index."""
    decode, encode = DECODERS[cache.spec.audio], ENCODERS[cache.spec.audio]
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
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, pa.ArrowException):
        return None
    return ShardAudio(waveforms, embedded, [])


def _from_cache(cache: Cache, audio_file: ShardFile) -> ShardAudio:
    decode = DECODERS[cache.spec.audio]
    try:
        with pq.ParquetFile(cache.store.open(audio_file.name), page_checksum_verification=True) as file:
            embedded = file.read(columns=["audio"], use_threads=False)["audio"].to_pylist()
        return ShardAudio([decode(value) for value in embedded], embedded, [])
    except CacheAccessError as error:
        return ShardAudio([], [], [str(error)])
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, pa.ArrowException) as error:
        return ShardAudio([], [], [str(damage_error(cache.store, audio_file.name, f"is damaged ({error})"))])
