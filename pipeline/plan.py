"""What a cache will cost, before it is made."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.codecs import get_codec
from teacher_cache.frames import SAMPLE_RATE, num_frames
from teacher_cache.layout import CacheSpec, SourceUtterance
from teacher_cache.reader import masks_of

_FLAC_BYTES_PER_SECOND = 18_000
"""Speech in 16-bit FLAC at 16 kHz, roughly; exact sizes are known only afterwards."""

_SAMPLED = 200


@dataclass(frozen=True)
class CostPlan:
    """Expected cost of a cache.

    Attributes:
        hours: of audio.
        utterances: number of them.
        frames: of 20 ms.
        masked_fraction: share of masked frames, from a sample of real draws; 0 without draws.
        feature_bytes: of all layers and passes (exact but for the masked fraction).
        total_bytes: with the embedded audio (estimated).
        bytes_per_second: total, per second of audio.
        free_bytes: on the cache's disk.
    """

    hours: float
    utterances: int
    frames: int
    masked_fraction: float
    feature_bytes: int
    total_bytes: int
    bytes_per_second: float
    free_bytes: int


def plan_cost(utterances: Sequence[SourceUtterance], spec: CacheSpec, cache: Path) -> CostPlan:
    """Works out the cost of caching these utterances under a spec; draws real masks of a few to know the masked share."""
    frames = [num_frames(u.num_samples) for u in utterances]
    seconds = sum(u.num_samples for u in utterances) / SAMPLE_RATE
    masked = 0.0
    if spec.masks.draws:
        step = max(1, len(utterances) // _SAMPLED)
        chosen, counts = utterances[::step], frames[::step]
        masked = float(masks_of(spec.masks, 0, [u.id for u in chosen], counts).sum()) / sum(counts)
    per_frame = len(spec.layers) * get_codec(spec.codec).bytes_per_frame(spec.dim)
    features = int(sum(frames) * per_frame * (1 + spec.masks.draws * (1 - masked)))
    total = features + int(seconds * _FLAC_BYTES_PER_SECOND)
    existing = next(folder for folder in [cache, *cache.parents] if folder.exists())
    return CostPlan(
        seconds / 3600,
        len(utterances),
        sum(frames),
        masked,
        features,
        total,
        total / seconds,
        shutil.disk_usage(existing).free,
    )
