"""Audio of a corpus, checked against its index."""

from pathlib import Path

import numpy as np

from ray_distill.teacher_cache.audio import load_identified_audio
from ray_distill.teacher_cache.embedded_audio import quantize
from ray_distill.teacher_cache.storage.shard_plan import Utterance, is_earlier_hash


def load_waveform(utterance: Utterance) -> np.ndarray:
    """Return the (S,) float32 waveform of an utterance, as teachers and students receive it.

    The samples of resampled or lossy audio may differ in their last bit between machines. A cache stores the samples that its teacher
    received, and students get those.

    Raises:
        ValueError: If the file can't be decoded or has changed since the corpus was indexed. Of audio that an earlier version indexed
            after resampling or lossy decoding, only the length is compared, since its hash depends on that machine's rounding.
    """
    waveform, identity = load_identified_audio(Path(utterance.path))
    same = identity == utterance.sha256 or is_earlier_hash(utterance.sha256, identity)
    if not same or len(waveform) != utterance.num_samples:
        raise ValueError(
            f"{utterance.path} has changed since the corpus was indexed; run the index stage again (if it says that the index is "
            "reused, remove the folder corpus in the run's folder first)"
        )
    return quantize(waveform)
