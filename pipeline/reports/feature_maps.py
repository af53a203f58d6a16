"""Teacher and student features of one utterance, for a report."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ray_distill.student import Student
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.targets.target_batch import TargetReader

_CHANNELS = 64
_SECONDS = 6.0


@dataclass(frozen=True)
class LayerMap:
    """Features of one layer for one utterance.

    Attributes:
        layer: Number of the teacher's layer, from 1.
        teacher, student: (T, C) features of the C channels with the largest variance in the teacher, standardised with the
            teacher's mean and standard deviation.
        cosine: Cosine similarity of the complete, unscaled features, averaged over frames.
    """

    layer: int
    teacher: np.ndarray
    student: np.ndarray
    cosine: float


@dataclass(frozen=True)
class FeatureMaps:
    """Teacher and student features of one utterance.

    Attributes:
        utterance: Id of the utterance.
        seconds: Duration in seconds.
        layers: Some of the layers the student learns from.
        phones: Phone of each frame; empty if they are not known.
    """

    utterance: str
    seconds: float
    layers: Sequence[LayerMap]
    phones: Sequence[str] = ()


@torch.inference_mode()
def feature_maps(student: Student, reader: TargetReader) -> FeatureMaps:
    """Return the first, middle and last layer of the utterance whose duration is closest to 6 s, without masks."""
    index = int(np.abs(reader.num_samples - _SECONDS * SAMPLE_RATE).argmin())
    batch = reader.read([index], None).to("cpu")
    projections = student.eval()(batch.waveforms, batch.lengths).projections[0]
    layers = []
    for position in sorted({0, len(reader.layers) // 2, len(reader.layers) - 1}):
        teacher = batch.targets[0, position]
        deviation, mean = torch.std_mean(teacher, 0)
        channels = deviation.topk(min(_CHANNELS, len(deviation))).indices.sort().values
        shown, predicted = (
            ((x - mean) / deviation.clamp(min=1e-12))[:, channels].numpy() for x in (teacher, projections[position])
        )
        cosine = torch.nn.functional.cosine_similarity(teacher, projections[position], dim=-1).mean()
        layers.append(LayerMap(reader.layers[position], shown, predicted, float(cosine)))
    return FeatureMaps(batch.ids[0], float(reader.num_samples[index]) / SAMPLE_RATE, layers)
