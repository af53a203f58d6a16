"""The first pass of a codec that learns: a seeded sample of the corpus through the teacher."""

import hashlib
from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from ray_distill.teacher_cache.build.shard_writer import hidden_states
from ray_distill.teacher_cache.codecs import State, fit_codec
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, shards_of
from ray_distill.teacher_cache.targets.online_targets import load_source, masks_of
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher

SAMPLE_FRAMES = 20_000
"""Frames to learn from (about 7 minutes of speech); HELD_OUT of them more for the error to expect."""
HELD_OUT = 0.1


def fit_to_teacher(spec: CacheSpec, layers: Sequence[int], plan: pa.Table, teacher: Teacher) -> State:
    """Fits ``spec.codec`` for some layers on utterances of the training split, chosen by hash of their ids.

    Frames come from the clean pass and, where masks are drawn, from unmasked frames of draw 0's masked pass: both are coded.

    Raises:
        ValueError: an utterance can't be read.
    """
    utterances = [u for shard in shards_of(plan) for u in shard.utterances if u.split == "train"]
    utterances.sort(key=lambda u: hashlib.sha256(f"codec/{u.id}".encode()).digest())
    blocks: list[Tensor] = []
    held_out: list[Tensor] = []
    inside = outside = 0
    for number, utterance in enumerate(utterances):
        # The last of a small corpus too, so that there is always something to hold out.
        out = outside < HELD_OUT * inside or number == len(utterances) - 1
        frames = _frames(spec, layers, utterance, teacher)
        (held_out if out else blocks).append(frames)
        if out:
            outside += len(frames)
        else:
            inside += len(frames)
        if inside >= SAMPLE_FRAMES:
            break
    sample = torch.cat(blocks or held_out)
    return {key: value.cpu() for key, value in fit_codec(spec.codec, sample, torch.cat(held_out or blocks)).items()}


def _frames(spec: CacheSpec, layers: Sequence[int], utterance: Utterance, teacher: Teacher) -> Tensor:
    """(N, L, D) float32 of one utterance, on the teacher's device."""
    padded, lengths = (tensor.to(teacher.device) for tensor in pad_waveforms([load_source(utterance)]))
    chosen = [layer - 1 for layer in layers]
    frames = hidden_states(teacher, spec.precision, padded, lengths, None)[0, chosen].transpose(0, 1)
    if not spec.masks.draws or spec.targets == "clean_only":
        return frames
    mask = masks_of(spec.masks, 0, [utterance.id], [len(frames)]).to(teacher.device)
    masked = hidden_states(teacher, spec.precision, padded, lengths, mask)[0, chosen].transpose(0, 1)
    return torch.cat([frames, masked[~mask[0]]])
