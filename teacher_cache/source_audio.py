"""Audio of a corpus, checked against its index."""

import hashlib
from pathlib import Path

import numpy as np

from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.embedded_audio import quantize
from ray_distill.teacher_cache.storage.shard_plan import Utterance


def load_waveform(utterance: Utterance) -> np.ndarray:
    """Return the (S,) float32 waveform of an utterance, as teachers and students receive it.

    Raises:
        ValueError: If the file can't be decoded or has changed since the corpus was indexed.
    """
    waveform = load_audio(Path(utterance.path))
    if hashlib.sha256(waveform.tobytes()).hexdigest() != utterance.sha256:
        raise ValueError(f"{utterance.path} has changed since the corpus was indexed; run the index stage again")
    return quantize(waveform)
