"""Audio of a shard: decoded from the corpus, or taken from the cache that embeds it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_distill.teacher_cache.embedded_audio import DECODERS, ENCODERS
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache import Cache, ShardFile, check_content, damage_error
from ray_distill.teacher_cache.storage.cache_spec import CacheAccessError
from ray_distill.teacher_cache.storage.failed_utterances import check_failed, reason_of
from ray_distill.teacher_cache.storage.shard_plan import Shard


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


def load_shard_audio(cache: Cache, shard: Shard) -> ShardAudio:
    """Return a shard's audio from its finished clean file if there is one, otherwise from the corpus."""
    audio_file = cache.files(shard)[0]
    if cache.store.size(audio_file.commit) is not None:
        return _from_cache(cache, shard, audio_file)
    return audio_from_corpus(cache, shard)


def audio_from_corpus(cache: Cache, shard: Shard, *, exact: bool = False) -> ShardAudio:
    """Decode a shard's audio from the corpus; ``exact`` as for `load_waveform`."""
    encode = ENCODERS[cache.spec.audio]
    waveforms: list[np.ndarray] = []
    embedded: list[bytes] = []
    failed = {}
    for utterance in shard.utterances:
        try:
            waveform = load_waveform(utterance, exact=exact)
            data = encode(waveform)
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
        with pq.ParquetFile(cache.store.open(audio_file.name), page_checksum_verification=True) as file:
            check_content(file.metadata.metadata, audio_file)
            table = file.read(columns=["id", "audio"], use_threads=False)
        if table["id"].to_pylist() != [name for name in ids if name not in failed]:
            raise ValueError("its utterances are not those of the plan")
        stored = dict(zip(table["id"].to_pylist(), table["audio"].to_pylist(), strict=True))
        waveforms = [np.zeros(0, np.float32) if name in failed else decode(stored[name]) for name in ids]
        return ShardAudio(waveforms, [stored.get(name, b"") for name in ids], dict(failed))
    except CacheAccessError as error:
        return ShardAudio([], [], {}, str(error))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, pa.ArrowException) as error:
        return ShardAudio([], [], {}, str(damage_error(cache.store, audio_file.name, f"is damaged ({error})")))
