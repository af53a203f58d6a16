"""Random span masks: fairseq's four policies, drawn for one utterance at a time from (seed, draw, utterance id)."""

import hashlib
from typing import Literal, Self

import numpy as np
import pydantic

MIN_MASKS = 2
"""Spans at least, as HuBERT and wav2vec 2.0 ask of fairseq's ``compute_mask_indices`` (``min_masks=2``)."""


class MaskPolicy(pydantic.BaseModel, frozen=True, extra="forbid"):
    """How spans are drawn; names follow fairseq's ``mask_*`` options.

    Attributes:
        selection: span lengths: ``static`` (mask_length), ``uniform`` (integers from mask_other to 2 x mask_length, both
            included), ``normal`` (mean mask_length, standard deviation mask_other, at least 1), ``poisson`` (mean
            mask_length). Default ``static``.
        mask_prob: expected number of span frames over frames, before overlaps. Default 0.8.
        mask_length: see selection, in frames of 20 ms. Default 10.
        mask_other: see selection. Default 0.
        no_overlap: whether spans keep apart. Default False.
        min_space: unmasked frames at least between spans, with no_overlap. Default 1.
    """

    selection: Literal["static", "uniform", "normal", "poisson"] = "static"
    mask_prob: float = pydantic.Field(default=0.8, ge=0, le=1, allow_inf_nan=False)
    mask_length: int = pydantic.Field(default=10, ge=1)
    mask_other: float = pydantic.Field(default=0.0, ge=0, allow_inf_nan=False)
    no_overlap: bool = False
    min_space: int = pydantic.Field(default=1, ge=0)

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Self:
        if self.selection == "uniform" and self.mask_other > 2 * self.mask_length:
            raise ValueError(
                f"mask_other {self.mask_other:g} is above 2 x mask_length {2 * self.mask_length}, so no uniform span length "
                "is possible; lower mask_other"
            )
        if self.selection == "uniform" and self.mask_other != int(self.mask_other):
            raise ValueError(
                f"mask_other {self.mask_other:g} is no whole number of frames, as uniform span lengths need"
            )
        return self


def draw_mask(policy: MaskPolicy, seed: int, draw: int, utterance_id: str, num_frames: int) -> np.ndarray:
    """One mask of one utterance; equal arguments give equal masks on every machine, in any order.

    In distribution this is fairseq's ``compute_mask_indices`` for a batch of one with ``min_masks=2``, as HuBERT and wav2vec
    2.0 call it. Where fairseq raises or would mask everything, ours differs: at least one frame stays unmasked (a mask over
    everything loses one frame, chosen at random), a single frame is never masked, and with no_overlap an utterance in which
    no span fits has no mask. A mask_prob of 0 means no mask, as in fairseq's models.

    Args:
        policy: how spans are drawn.
        seed: of the run's masks.
        draw: number of the draw, 0-based.
        utterance_id: the utterance.
        num_frames: T, at least 0.

    Returns:
        (T,) bool, True at masked frames.
    """
    mask = np.zeros(num_frames, dtype=bool)
    if num_frames < 2 or policy.mask_prob == 0:
        return mask
    digest = hashlib.sha256(f"{seed}/{draw}/{utterance_id}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    # Probabilistic rounding, as fairseq's.
    count = max(MIN_MASKS, int(policy.mask_prob * num_frames / policy.mask_length + rng.random()))
    lengths = _span_lengths(policy, count, rng)
    if lengths.sum() == 0:
        lengths[0] = min(policy.mask_length, num_frames - 1)
    place = _place_apart if policy.no_overlap else _place_freely
    for start, length in place(policy, lengths, num_frames, rng):
        mask[start : start + length] = True
    if mask.all():
        mask[rng.integers(num_frames)] = False
    return mask


def _span_lengths(policy: MaskPolicy, count: int, rng: np.random.Generator) -> np.ndarray:
    if policy.selection == "static":
        return np.full(count, policy.mask_length)
    if policy.selection == "uniform":
        return rng.integers(int(policy.mask_other), policy.mask_length * 2 + 1, size=count)
    if policy.selection == "normal":
        lengths = np.rint(rng.normal(policy.mask_length, policy.mask_other, size=count))
        return lengths.clip(min=1).astype(int)
    return rng.poisson(policy.mask_length, size=count)


def _place_freely(
    policy: MaskPolicy, lengths: np.ndarray, num_frames: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Distinct starts, so chosen that the shortest span fits; longer ones are cut at the end."""
    shortest = int(lengths.min())
    if num_frames - shortest <= len(lengths):
        shortest = num_frames - len(lengths) - 1
    room = max(1, num_frames - shortest) if shortest >= 0 else num_frames
    starts = rng.choice(room, min(len(lengths), room), replace=False)
    return [(int(start), int(length)) for start, length in zip(starts, lengths, strict=False)]


def _place_apart(
    policy: MaskPolicy, lengths: np.ndarray, num_frames: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Longest first: each span goes into a free stretch chosen by its size, and splits it."""
    free = [(0, num_frames)]
    spans: list[tuple[int, int]] = []
    shortest = int(lengths.min())
    for length in sorted((int(length) for length in lengths), reverse=True):
        sizes = np.array([end - start if end - start >= length + policy.min_space else 0 for start, end in free])
        # A stretch exactly as long as the span leaves no start to draw from.
        sizes[[end - start <= length for start, end in free]] = 0
        if sizes.sum() == 0:
            break
        start, end = free.pop(int(rng.choice(len(free), p=sizes / sizes.sum())))
        at = int(rng.integers(start, end - length))
        spans.append((at, length))
        if at - start - policy.min_space >= shortest:
            free.append((start, at - policy.min_space + 1))
        if end - at - length - policy.min_space > shortest:
            free.append((at + length + policy.min_space, end))
    return spans
