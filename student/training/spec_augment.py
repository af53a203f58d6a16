"""SpecAugment (Park et al. 2019) on the student's features: time warping, and masks over frequency (feature dimensions) and time.

The published configuration has it, with these defaults, but the published forward pass never applies it. Here it is applied
in training to the projected features of the front end, before masked frames are replaced by the mask embedding. The published
code fills masks with the mean of a padded batch; here each utterance has its own mean.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor


class SpecAugment(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """SpecAugment policy, drawn anew each time an utterance is used. 0 masks or a window of 0 disables a part."""

    time_warp_window: int = pydantic.Field(default=0, ge=0)
    """Largest shift, in frames, of a random point in time; the frames around it are stretched. 0 disables time warping."""
    frequency_masks: int = pydantic.Field(default=2, ge=0)
    """Number of masked bands of feature dimensions."""
    frequency_mask_width: int = pydantic.Field(default=27, ge=1)
    """Upper bound, exclusive, on the width of a band in dimensions."""
    time_masks: int = pydantic.Field(default=2, ge=0)
    """Number of masked spans of frames."""
    time_mask_width: int = pydantic.Field(default=100, ge=1)
    """Upper bound, exclusive, on the length of a span in frames."""
    time_mask_share: float = pydantic.Field(default=1.0, gt=0, le=1)
    """Upper bound on the length of a span as a share of the utterance's frames, which protects short utterances (the
    adaptive policy of Park et al. 2020). The default 1, as published, sets no such bound."""
    fill: Literal["mean", "zero"] = "mean"
    """Value of masked entries: the ``mean`` of the utterance's features, or ``zero``."""


def spec_augment(x: Tensor, num_frames: Tensor, policy: SpecAugment) -> Tensor:
    """Return augmented features. Gradients flow through; random numbers come from PyTorch's default CPU generator.

    Args:
        x: (B, T, d) float.
        num_frames: (B,) integer on the host, real frames of each row, at least 1; padded frames are unchanged.
        policy: SpecAugment policy.

    Returns:
        (B, T, d) float.
    """
    rows = []
    for row, frames in zip(x, num_frames.tolist(), strict=True):
        real = _warp_time(row[:frames], policy.time_warp_window)
        keep = torch.ones(frames, 1, dtype=torch.bool), torch.ones(1, x.shape[2], dtype=torch.bool)
        longest = min(policy.time_mask_width, int(policy.time_mask_share * frames) + 1)
        for axis, count, width in (
            (0, policy.time_masks, longest),
            (1, policy.frequency_masks, policy.frequency_mask_width),
        ):
            line = keep[axis].view(-1)
            for _ in range(count):
                size = min(_random_integer(0, width), len(line))
                first = _random_integer(0, len(line) - size + 1)
                line[first : first + size] = False
        filling = real.mean() if policy.fill == "mean" else real.new_zeros(())
        real = torch.where((keep[0] & keep[1]).to(x.device, non_blocking=True), real, filling)
        rows.append(torch.cat([real, row[frames:]]))
    return torch.stack(rows)


def augmentation(policy: SpecAugment | None, training: bool) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the ``augment`` argument of `Student.layer_outputs`: None without a policy or outside training."""
    return partial(spec_augment, policy=policy) if policy is not None and training else None


def _warp_time(x: Tensor, window: int) -> Tensor:
    """Stretch x (T, d) so that a random frame moves by up to ``window`` frames."""
    frames = len(x)
    if window == 0 or frames <= 2 * window:
        return x
    centre = _random_integer(window, frames - window)
    moved = _random_integer(centre - window, centre + window) + 1
    parts = (x[:centre], moved), (x[centre:], frames - moved)
    return torch.cat([_resample(part, size) for part, size in parts])


def _resample(x: Tensor, frames: int) -> Tensor:
    """Resample (T, d) to (frames, d), linearly: SpecAugment's bicubic image warp is meant for spectrograms."""
    if frames == 0:
        return x[:0]
    return F.interpolate(x.t()[None], frames, mode="linear", align_corners=False)[0].t()


def _random_integer(low: int, high: int) -> int:
    """Draw an integer from low to high, exclusive; low if the range is empty."""
    return int(torch.randint(low, max(high, low + 1), ()))
