"""Targets of several teachers as one: the average of their layers, or their layers side by side (EKD, arXiv 2302.12757)."""

from collections.abc import Sequence

import numpy as np

from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.targets.several_caches import SeveralCaches
from ray_distill.teacher_cache.targets.student_frames import SplitReader
from ray_distill.teacher_cache.targets.target_batch import Batch, CombinedTargets, SeveralTargets


class CombinedCaches(SeveralCaches):
    """A `TargetReader` of the caches of several teachers that gives one target for all of them.

    Layer l of the target is made from the l-th layer that is read of each teacher. Utterances that a teacher lacks are left out.

    Args:
        readers: Reader of the split in each teacher's cache, by the teacher's name.
        weights: Weight of each teacher in a weighted mean, which needs equal widths. None puts the teachers' channels side by side.

    Attributes:
        layers: Layers of the first teacher, by which those of the target are named.
        dim: Width of the target.

    Raises:
        CacheError: The teachers' layers can't be combined, no utterance has all teachers, or as for `SeveralCaches`.
    """

    def __init__(self, readers: dict[str, SplitReader], weights: Sequence[float] | None) -> None:
        super().__init__(readers)
        first, *others = self.teachers
        for other in others:
            if len(other.layers) != len(first.layers):
                raise CacheError(
                    f"{len(first.layers)} and {len(other.layers)} layers of the teachers {first.name} and {other.name} "
                    "can't be combined; choose as many of each with the key layers"
                )
            if weights is not None and other.dim != first.dim:
                raise CacheError(
                    f"the teachers {first.name} and {other.name} have widths {first.dim} and {other.dim}, so their layers have no "
                    "average; set train.aggregate to concatenate or heads"
                )
        self._weights = None if weights is None else tuple(float(weight) / sum(weights) for weight in weights)
        self.layers = first.layers
        self.dim = first.dim if weights is not None else sum(teacher.dim for teacher in self.teachers)
        complete = np.flatnonzero((self._rows >= 0).all(1))
        if not len(complete):
            raise CacheError(f"no utterance is in all caches of the teachers {', '.join(readers)}")
        self.ids = self.ids.take(complete)
        self._rows, self.shards = self._rows[complete], self.shards[complete]
        self.num_samples, self.num_frames = self.num_samples[complete], self.num_frames[complete]
        self.teachers = ()  # To the training they are one.

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See `TargetReader.read`."""
        batch = super().read(indices, draw)
        assert isinstance(batch.coded, SeveralTargets)
        combined = CombinedTargets(batch.coded.parts, self._weights)
        return Batch(batch.ids, batch.waveforms, batch.lengths, batch.num_frames, combined, batch.frame_mask)
