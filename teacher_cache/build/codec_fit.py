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


class CodecSample:
    """Frames to fit a codec to, and frames of other utterances to measure its error on."""

    def __init__(self) -> None:
        self._fitted: list[Tensor] = []
        self._held_out: list[Tensor] = []
        self.num_fitted = 0
        """Number of frames to fit to."""
        self._num_held_out = 0

    def add(self, frames: Tensor, last: bool) -> None:
        """Add an utterance's (N, L, D) frames. ``last`` says whether it is the last of all, which is held out so that there is one."""
        if last or self._num_held_out < HELD_OUT * self.num_fitted:
            self._held_out.append(frames)
            self._num_held_out += len(frames)
        else:
            self._fitted.append(frames)
            self.num_fitted += len(frames)

    def fit(self, codec: str) -> State:
        """Return the state of a codec; see `fit_codec`. A single utterance is both fitted to and held out."""
        return fit_codec(codec, torch.cat(self._fitted or self._held_out), torch.cat(self._held_out or self._fitted))


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
    sample = CodecSample()
    wanted = sample_frames(spec.codec, len(layers), spec.dim)
    failed: dict[str, str] = {}
    for number, utterance in enumerate(sample_order(utterances)):
        try:
            frames = _frames(spec, layers, utterance, teacher)
        except (_UnusableError, OSError) as error:
            failed[utterance.id] = reason_of(error)
            if len(failed) > allowed_failures(max_failed, plan.num_rows) or len(failed) == len(utterances):
                raise too_many_error(failed, max_failed, plan.num_rows) from error
            continue
        sample.add(frames, last=number == len(utterances) - 1)
        if sample.num_fitted >= wanted:
            break
    return {key: value.cpu() for key, value in sample.fit(spec.codec).items()}


def codec_pass_seconds(spec: CacheSpec, layers: int, train_seconds: float, masked_fraction: float) -> float:
    """Return the seconds of audio, summed over the teacher's passes, that `fit_codec_to_corpus` takes for a number of layers.

    Args:
        spec: Specification of the cache.
        layers: Number of layers that the codec is fitted to.
        train_seconds: Seconds of audio in the training split.
        masked_fraction: Fraction of masked frames.
    """
    frames = sample_frames(spec.codec, layers, spec.dim) * (1 + HELD_OUT)
    if not _has_masked_passes(spec):
        return min(train_seconds, frames / float(spec.rate))
    kept = 1.0 if spec.targets == "masked_everywhere" else 1 - masked_fraction
    return 2 * min(train_seconds, frames / float(spec.rate) / (1 + kept))


def _has_masked_passes(spec: CacheSpec) -> bool:
    return bool(spec.masks.draws) and spec.targets != "clean_only"


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
    if not _has_masked_passes(spec):
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
