"""Fitting a codec to the teacher's outputs on a fixed sample of the corpus, before a cache is built."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import State, fit_codec, sample_frames
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.failed_utterances import (
    DEFAULT_MAX_FAILED,
    allowed_failures,
    reason_of,
    too_many_error,
)
from ray_distill.teacher_cache.storage.shard_assignment import hash_order
from ray_distill.teacher_cache.storage.shard_plan import Utterance, Utterances
from ray_distill.teacher_cache.targets.frame_rate import teacher_mask
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher

HELD_OUT = 0.1
"""Held-out frames per fitted frame; the codec's error is measured on the held-out frames."""


def fit_codec_to_corpus(
    spec: CacheSpec, layers: Sequence[int], plan: pa.Table, teacher: Teacher, max_failed: float = DEFAULT_MAX_FAILED
) -> State:
    """Fit ``spec.codec`` for some layers to utterances of the training split, chosen by the hash of their ids.

    The frames come from the clean pass and, if masks are drawn, from the unmasked frames of draw 0's masked pass, because both
    passes are encoded. Utterances that can't be read or have hidden states that are not finite are left out.

    Raises:
        ValueError: If more utterances are left out than `allowed_failures` allows.
    """
    utterances = Utterances(plan).of_split("train")
    fitted: list[Tensor] = []
    held_out: list[Tensor] = []
    num_fitted = num_held_out = 0
    wanted = sample_frames(spec.codec, len(layers), spec.dim)
    failed: dict[str, str] = {}
    for number, utterance in enumerate(sample_order(utterances)):
        # The last utterance of a small corpus is held out too, so that there is always one.
        hold_out = num_held_out < HELD_OUT * num_fitted or number == len(utterances) - 1
        try:
            frames = _frames(spec, layers, utterance, teacher)
        except (_UnusableError, OSError) as error:
            failed[utterance.id] = reason_of(error)
            if len(failed) > allowed_failures(max_failed, plan.num_rows) or len(failed) == len(utterances):
                raise too_many_error(failed, max_failed, plan.num_rows) from error
            continue
        (held_out if hold_out else fitted).append(frames)
        if hold_out:
            num_held_out += len(frames)
        else:
            num_fitted += len(frames)
        if num_fitted >= wanted:
            break
    sample = torch.cat(fitted or held_out)
    state = fit_codec(spec.codec, sample, torch.cat(held_out or fitted))
    return {key: value.cpu() for key, value in state.items()}


def sample_order(utterances: Utterances) -> Iterator[Utterance]:
    """Yield utterances in the order in which a codec's sample takes them, which is that of the hashes of their ids."""
    for position in hash_order(utterances.texts("id"), "codec/").tolist():
        yield utterances[position]


class _UnusableError(ValueError):
    """An utterance that the codec can't be fitted to."""


def _frames(spec: CacheSpec, layers: Sequence[int], utterance: Utterance, teacher: Teacher) -> Tensor:
    """Return the (N, L, D) float32 frames of one utterance on the teacher's device. _UnusableError if it can't be used."""
    try:
        waveform = load_waveform(utterance)
    except ValueError as error:
        raise _UnusableError(str(error)) from error
    padded, lengths = (tensor.to(teacher.device) for tensor in pad_waveforms([waveform]))
    frames = teacher(padded, lengths, layers=layers, precision=spec.precision)[0].transpose(0, 1)
    if not spec.masks.draws or spec.targets == "clean_only":
        return _finite(frames, layers)
    mask = teacher_mask(spec.masks, spec.rate, 0, [utterance.id], [len(waveform)], [len(frames)]).to(teacher.device)
    masked = teacher(padded, lengths, mask, layers, precision=spec.precision)[0].transpose(0, 1)
    kept = masked if spec.targets == "masked_everywhere" else masked[~mask[0]]
    return _finite(torch.cat([frames, kept]), layers)


def _finite(frames: Tensor, layers: Sequence[int]) -> Tensor:
    finite = frames.isfinite().all(2).all(0).tolist()
    wrong = [layer for layer, good in zip(layers, finite, strict=True) if not good]
    if wrong:
        raise _UnusableError(f"a hidden state of layer {wrong[0]} is not finite")
    return frames
