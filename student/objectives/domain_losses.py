"""The loss of one teacher by the domain of the utterances, such as speech and audio.

With a weight for each domain, the loss of a teacher is the sum over domains d of ``w_d * loss_d``. ``loss_d`` is the sum over the
frames of the utterances of domain d, divided by all real frames of the optimiser step, whatever their domain. So a domain counts by
its weight and by its share of the frames, and equal weights for all domains are the same as a number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_distill.student.objectives.objective import DistillationLoss, Encoded
from ray_distill.teacher_cache.targets.domains import Weight, counted_domains


def rows_by_domain(weight: Weight, domains: Sequence[str] | None) -> list[tuple[str, float, list[int] | None]]:
    """Return what a teacher's loss of a batch consists of: at least one part.

    Args:
        weight: Weight of the teacher.
        domains: Domain of each utterance of the batch, which weights by domain need.

    Returns:
        For each part the domain, its weight, and the rows of the batch; None stands for all of them, which need no copy. The domain is
        empty if the weight is a number, and for a part that weighs nothing, since the teacher learns from no utterance of the batch.
    """
    if not isinstance(weight, dict):
        return [("", weight, None)]
    assert domains is not None, "the reader gives the domains if a weight depends on them"
    parts: list[tuple[str, float, list[int] | None]] = []
    for domain in counted_domains(weight):
        rows = [row for row, found in enumerate(domains) if found == domain]
        if rows:
            parts.append((domain, weight[domain], None if len(rows) == len(domains) else rows))
    return parts or [("", 0.0, None)]  # DDP waits for the gradients of the teacher's heads.


def chosen_rows(
    rows: list[int] | None, encoded: Encoded, frame_mask: Tensor | None, targets: Tensor
) -> tuple[Encoded, Tensor | None, Tensor]:
    """Return some rows of a batch: the student's outputs, the masks (B, T) and the targets (B, ...); all rows for None."""
    if rows is None:
        return encoded, frame_mask, targets
    index = torch.tensor(rows).to(targets.device, non_blocking=True)
    some = Encoded(
        [x[index] for x in encoded.layers],
        [x[index] for x in encoded.head_inputs],
        encoded.num_frames[index],
        encoded.padded[index],
    )
    return some, None if frame_mask is None else frame_mask[index], targets[index]


def added(losses: Sequence[DistillationLoss]) -> DistillationLoss:
    """Return the sum of the losses of parts of a batch, without the contributions of masked and of unmasked frames."""
    first, *others = losses
    if not others:
        return first

    def total(name: str) -> Tensor:
        values: list[Tensor] = [getattr(loss, name) for loss in losses]
        return torch.stack(values).sum(0)

    return DistillationLoss(
        total("total"),
        total("hint"),
        total("final"),
        total("per_layer"),
        cosines=None if first.cosines is None else total("cosines"),
        accuracies=None if first.accuracies is None else total("accuracies"),
    )
