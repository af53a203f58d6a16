"""Audio of a corpus, checked against its index."""

import hashlib

import numpy as np

from ray_distill.teacher_cache.audio import load_identified_audio
from ray_distill.teacher_cache.embedded_audio import quantize
from ray_distill.teacher_cache.storage.shard_plan import Utterance, is_earlier_hash


class ChangedAudioError(ValueError):
    """Audio that is not what was indexed, or may not be fetched.

    Attributes:
        what: What is wrong, without what to do.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


def load_waveform(utterance: Utterance, *, exact: bool = False) -> np.ndarray:
    """Return the (S,) float32 waveform of an utterance, as teachers and students receive it.

    The samples of resampled or lossy audio may differ in their last bit between machines. A cache stores the samples that its
    teacher received, and students get those, unless the cache reads its audio from the corpus.

    Args:
        utterance: The utterance.
        exact: Whether to refuse a URL, and a file that is only known by its length, since a cache may come from a stranger.
            Default False: if an earlier version indexed resampled or lossy audio, its hash depends on that machine's rounding, and a
            file of the same length is taken for the same.

    Raises:
        ChangedAudioError: If the file has changed since the corpus was indexed, or is a URL that is refused.
        ValueError: If the file can't be decoded.
    """
    address = utterance.address
    if exact and address.is_remote:
        raise ChangedAudioError(
            f"{address} is not fetched unasked, because a cache may come from a stranger",
            "give the index of a run with this corpus as --audio, or run its cache stage",
        )
    waveform, identity = load_identified_audio(address)
    same = identity == utterance.sha256
    if not same and is_earlier_hash(utterance.sha256, identity):
        same = not exact or hashlib.sha256(waveform.tobytes()).hexdigest() == utterance.sha256
        if not same:
            raise ChangedAudioError(
                f"{address} has changed, or an earlier version indexed it on a machine that rounds differently",
                "repair the cache there, or remove the commit record of the shard and run the cache stage of a run again",
            )
    if not same or len(waveform) != utterance.num_samples:
        raise ChangedAudioError(
            f"{address} has changed since the corpus was indexed",
            "run the index stage again (if the index stays the same, remove the folder corpus of this run, and of the runs beside it "
            "whose results it takes)",
        )
    return quantize(waveform)
