"""Hugging Face folders (config.json and model.safetensors) of HuBERT, WavLM and wav2vec 2.0, without transformers."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from teacher_cache.teachers.architecture import Architecture, build_model
from teacher_cache.teachers.model import Teacher, TeacherError, checked_mask_embedding, load_weights
from teacher_cache.teachers.wavlm import join_attention_projections

_KINDS = ("hubert", "wavlm", "wav2vec2")
# Added to the variance by transformers' Wav2Vec2FeatureExtractor; fairseq adds 1e-5.
_NORMALIZE_EPS = 1e-7

# Of pre-training only; no layer output depends on them.
_HEADS = re.compile(r"(quantizer|project_hid|project_q)\.")

# Settings under which transformers' models are another architecture, with the values that are not.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "feat_extract_activation": ("gelu",),
    "feat_extract_norm": ("group", "layer"),
    "feat_proj_layer_norm": (True,),
    "conv_pos_batch_norm": (False,),
    "layer_norm_eps": (1e-5,),
    "add_adapter": (False,),
    "adapter_attn_dim": (None,),
}


def load_huggingface(folder: Path, device: str | torch.device) -> Teacher:
    """A pre-trained model from a folder that transformers' ``save_pretrained`` wrote.

    Args:
        folder: with ``config.json``, ``model.safetensors`` and, where waveforms are normalised,
            ``preprocessor_config.json``.
        device: where the teacher computes.

    Raises:
        TeacherError: a file is missing or damaged, it is a model of another kind, or its weights don't fit.
    """
    name = folder.name
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise TeacherError(f"{folder} holds a model of type {kind!r}, but one of {', '.join(_KINDS)} is needed")
    preprocessor = folder / "preprocessor_config.json"
    # A folder without one: transformers normalises by default, as the models with layer norm were trained.
    normalize = config.get("feat_extract_norm", "group") == "layer"
    if preprocessor.exists():
        normalize = bool(_read_json(preprocessor).get("do_normalize", True))
    architecture = _architecture(config, kind, name)
    weights, mask_embedding = _weights(folder / "model.safetensors", kind)
    model = build_model(architecture, name)
    load_weights(model, join_attention_projections(weights) if kind == "wavlm" else weights, name)
    return Teacher(
        model,
        checked_mask_embedding(mask_embedding, architecture.dim, name),
        name=name,
        normalize_eps=_NORMALIZE_EPS if normalize else None,
        device=device,
    )


def _architecture(config: dict[str, Any], kind: str, name: str) -> Architecture:
    """Defaults are those of transformers' configuration classes, the Base models'."""
    for key, allowed in _ONLY.items():
        if key in config and config[key] not in allowed:
            raise TeacherError(
                f"{name} has {key} = {config[key]!r}, but only {' or '.join(map(repr, allowed))} is supported"
            )
    try:
        channels = config.get("conv_dim", [512] * 7)
        kernels = config.get("conv_kernel", [10, 3, 3, 3, 3, 2, 2])
        strides = config.get("conv_stride", [5, 2, 2, 2, 2, 2, 2])
        relative = int(config.get("num_buckets", 320)), int(config.get("max_bucket_distance", 800))
        return Architecture(
            conv_layers=[(int(c), int(k), int(s)) for c, k, s in zip(channels, kernels, strides, strict=True)],
            conv_bias=bool(config.get("conv_bias", False)),
            conv_layer_norm=config.get("feat_extract_norm", "group") == "layer",
            dim=int(config.get("hidden_size", 768)),
            ffn_dim=int(config.get("intermediate_size", 3072)),
            heads=int(config.get("num_attention_heads", 12)),
            layers=int(config.get("num_hidden_layers", 12)),
            layer_norm_first=bool(config.get("do_stable_layer_norm", False)),
            pos_kernel=int(config.get("num_conv_pos_embeddings", 128)),
            pos_groups=int(config.get("num_conv_pos_embedding_groups", 16)),
            relative_positions=relative if kind == "wavlm" else None,
        )
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{name} has a config.json with a value of the wrong kind: {error}") from error


def _weights(path: Path, kind: str) -> tuple[dict[str, Tensor], Tensor | None]:
    if not path.is_file():
        raise TeacherError(f"{path} is missing; a Hugging Face folder must hold its weights in this one file")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TeacherError(f"{path} is not a readable safetensors file: {error}") from error
    mask_embedding: Tensor | None = None
    weights: dict[str, Tensor] = {}
    for full_key, value in state.items():
        key = full_key.removeprefix(f"{kind}.")
        if key == "masked_spec_embed":
            mask_embedding = value
        elif not _HEADS.match(key):
            weights[_torchaudio_name(key)] = value
    return weights, mask_embedding


def _torchaudio_name(key: str) -> str:
    """torchaudio's names are transformers', but for where the encoder's parts sit and the newer weight norm."""
    if key.startswith("feature_projection."):
        return f"encoder.{key}"
    if not key.startswith("encoder."):
        return key
    key = key.replace("encoder.", "encoder.transformer.", 1)
    key = key.replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
    return key.replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherError(f"{path} is missing; a Hugging Face folder must hold it") from None
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise TeacherError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
