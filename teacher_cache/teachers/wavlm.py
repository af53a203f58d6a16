"""WavLM checkpoints as published: ``{"cfg", "model"}`` with fairseq's weight names and a flat configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ray_distill.teacher_cache.teachers.architecture import build_model
from ray_distill.teacher_cache.teachers.fairseq import fairseq_architecture, torchaudio_weights
from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.wav2vec2 import NORMALIZE_EPS, Wav2Vec2Teacher
from ray_distill.teacher_cache.teachers.weights import checked_mask_embedding, load_model
from ray_distill.teacher_cache.untrusted import plain


def is_wavlm(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has WavLM's flat configuration instead of fairseq's nested one."""
    cfg = plain(checkpoint.get("cfg"))
    return isinstance(cfg, dict) and "relative_position_embedding" in cfg and "model" not in cfg


def load_wavlm(checkpoint: Mapping[str, Any], name: str, device: str | torch.device) -> Wav2Vec2Teacher:
    """Build a WavLM from the dictionary of its checkpoint.

    Args:
        checkpoint: Result of `load_untrusted`, with ``cfg`` and ``model``.
        name: Name of the file, for messages.
        device: Device on which the teacher computes.

    Raises:
        TeacherError: If the model has no gated relative positions, or its weights don't fit its configuration.
    """
    cfg = plain(checkpoint["cfg"])
    for key in ("relative_position_embedding", "gru_rel_pos"):
        if not cfg.get(key):
            raise TeacherError(
                f"{name} has {key} = {cfg.get(key)!r}, but only WavLM models with {key} = True are supported"
            )
    # Defaults of WavLM's own configuration class.
    buckets, distance = cfg.get("num_buckets", 320), cfg.get("max_distance", 1280)
    architecture = dataclasses.replace(fairseq_architecture(cfg, name), relative_positions=(buckets, distance))
    weights, mask_embedding = torchaudio_weights(checkpoint.get("model"), name)
    joined = join_attention_projections(weights)
    model = load_model(lambda: build_model(architecture, name), joined, architecture.modules, name)
    return Wav2Vec2Teacher(
        model,
        checked_mask_embedding(mask_embedding, architecture.dim, name),
        name=name,
        normalize_eps=NORMALIZE_EPS if cfg.get("normalize") else None,
        device=device,
    )


def join_attention_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the query, key and value projections of each layer joined, as in torchaudio's WavLM."""
    joined = dict(weights)
    for key in weights:
        prefix, separator, kind = key.rpartition(".attention.q_proj.")
        parts = [f"{prefix}.attention.{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj")]
        output = f"{prefix}.attention.out_proj.{kind}"
        if separator and all(part in joined for part in [*parts, output]):
            joined[f"{prefix}.attention.attention.in_proj_{kind}"] = torch.cat([joined.pop(part) for part in parts])
            joined[f"{prefix}.attention.attention.out_proj.{kind}"] = joined.pop(output)
    return joined
