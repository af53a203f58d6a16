"""Frames of 20 ms of students and masks against those of teachers with another frame rate.

Frame i of a teacher with R frames per second stands for the time from i / R to (i + 1) / R, and frame j of a student for the
time from j x 20 ms to (j + 1) x 20 ms. R / 50 = p / q in lowest terms. A student's frame consists of p parts of equal length,
each of which lies in one frame of the teacher:

- ``average``: the mean of the teacher's frames over the parts. A teacher with 100 frames per second is averaged over pairs, one
  with 25 is repeated, and of one with 75 a student's frame is two thirds of a frame and one third of the next, or one third and
  two thirds.
- ``nearest``: the teacher's frame at the middle of the student's; the later of two if the middle lies between them.

Where the teacher has no frame any more, its last one is used. Masks are drawn in frames of 20 ms. If R is a multiple of 50, each
frame of the teacher lies in one student's frame and has its mask. With other rates a teacher's frame may lie in a masked and in
an unmasked frame, so there are no exact masked targets, and they are refused.

Shapes: B utterances, L layers, T student's frames, U teacher's frames, K parts of a student's frame, D width.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ray_distill.teacher_cache.frames import FRAME_RATE, SAMPLE_RATE, num_frames
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.storage.cache_spec import CacheError

FrameRule = Literal["average", "nearest"]
"""How frames of a teacher become frames of a student."""

MAX_PARTS = 16
"""Maximum number of parts of a student's frame that are averaged. Each costs the bytes of a frame on the way to the device."""


def check_rule(rate: Fraction, rule: FrameRule | None, *, discrete: bool) -> FrameRule:
    """Return the rule for targets of a frame rate: by default ``average``, or ``nearest`` for discrete targets.

    Args:
        rate: The teacher's frames per second.
        rule: Rule that was asked for, or None for the default.
        discrete: Whether the targets are symbols.

    Raises:
        ValueError: Symbols, or as many parts, can't be averaged.
    """
    chosen: FrameRule = rule or ("nearest" if discrete else "average")
    if chosen == "average" and discrete and rate != FRAME_RATE:
        raise ValueError(
            f"frames average: the targets are symbols of {float(rate):g} frames per second, which have no mean; set it to nearest"
        )
    parts = (rate / FRAME_RATE).numerator
    if chosen == "average" and parts > MAX_PARTS:
        raise ValueError(
            f"frames average: with {float(rate):g} frames per second a frame of 20 ms has {parts} parts, but at most {MAX_PARTS} are "
            "averaged; set it to nearest"
        )
    return chosen


def check_masked(name: str, rate: Fraction) -> None:
    """Raise CacheError if a teacher can't have exact targets under masks of 20 ms frames.

    Args:
        name: The teacher.
        rate: Its frames per second.
    """
    if (rate / FRAME_RATE).denominator != 1:
        raise CacheError(
            f"{name} has {float(rate):g} frames per second, no multiple of {FRAME_RATE}, so some of them lie in masked and in "
            "unmasked frames of the student, and there are no exact masked targets; set masks.draws=0 (with "
            "train.masks=fresh for a masked student), or cache.targets=clean_only"
        )


def teacher_positions(rate: Fraction, rule: FrameRule, frames: int, available: int) -> np.ndarray:
    """Return the (T, K) int64 teacher's frames whose mean is each frame of a student. K is 1 for ``nearest``.

    Args:
        rate: The teacher's frames per second.
        rule: Rule.
        frames: Number T of the student's frames.
        available: Number U of the teacher's frames, at least 1.
    """
    p, q = (rate / FRAME_RATE).as_integer_ratio()
    student = np.arange(frames)[:, None]
    found = (student * p + np.arange(p)) // q if rule == "average" else (2 * student + 1) * p // (2 * q)
    return np.minimum(found, available - 1)


def check_counts(rate: Fraction, num_samples: np.ndarray, num_teacher_frames: np.ndarray) -> None:
    """Raise ValueError if an utterance has another number of frames than its length and the frame rate imply.

    The edges of the first and last frames may make a difference of one student's frame and one of the teacher.

    Args:
        rate: The teacher's frames per second.
        num_samples: (N,) integer lengths of the utterances.
        num_teacher_frames: (N,) integer numbers of the teacher's frames.
    """
    ratio = float(rate / FRAME_RATE)
    expected = num_frames(torch.as_tensor(num_samples)).numpy() * ratio
    off = np.abs(num_teacher_frames - expected) > ratio + 1
    if (wrong := np.flatnonzero(off | (num_teacher_frames < 1))).size:
        first = wrong[0]
        raise ValueError(
            f"an utterance of {num_samples[first] / SAMPLE_RATE:.2f} s has {num_teacher_frames[first]} frames, but at "
            f"{float(rate):g} frames per second it would have about {expected[first]:.0f}"
        )


def map_frames(x_LUD: Tensor, rate: Fraction, rule: FrameRule, frames: int) -> Tensor:
    """Return the (L, T, D) float values at a student's frames of an utterance's (L, U, D) at the teacher's."""
    positions = torch.from_numpy(teacher_positions(rate, rule, frames, x_LUD.shape[1])).to(x_LUD.device)
    return x_LUD[:, positions].mean(2)


def teacher_mask(
    masks: MaskDraws,
    rate: Fraction,
    draw: int,
    ids: Sequence[str],
    num_samples: Sequence[int],
    num_teacher_frames: Sequence[int],
) -> Tensor:
    """Return the (B, U) bool masks of a padded batch in the teacher's frames, False at padding.

    Args:
        masks: Masks in frames of 20 ms.
        rate: The teacher's frames per second, a multiple of 50.
        draw: Number of the draw, 0-based.
        ids: B utterance ids.
        num_samples: Length of each utterance.
        num_teacher_frames: Number of the teacher's frames of each utterance.
    """
    if rate == FRAME_RATE:
        return masks.frame_mask(draw, ids, num_teacher_frames)
    counts = [num_frames(int(samples)) for samples in num_samples]
    return spread_mask(masks.frame_mask(draw, ids, counts), rate, counts, num_teacher_frames)


def spread_mask(
    mask_BT: Tensor, rate: Fraction, num_frames: Sequence[int], num_teacher_frames: Sequence[int]
) -> Tensor:
    """Return masks in the teacher's frames, (B, U) bool, from those in the student's; see `teacher_mask`.

    Frames of the teacher after the student's last one are masked as that is. No target has a part of them.
    """
    ratio = rate / FRAME_RATE
    assert ratio.denominator == 1, "`check_masked` refuses such masks"
    spread = torch.zeros(len(mask_BT), max(num_teacher_frames), dtype=torch.bool)
    for row, mask, frames, count in zip(spread, mask_BT, num_frames, num_teacher_frames, strict=True):
        row[:count] = mask[(torch.arange(count) // ratio.numerator).clamp(max=frames - 1)]
    return spread
