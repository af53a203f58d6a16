"""Hugging Face folders of models built like wav2vec 2.0."""

import re
from typing import Any

import torch
from torch import Tensor

from ray_distill.teacher_cache.teachers.architecture import Architecture, build_model
from ray_distill.teacher_cache.teachers.huggingface_folder import Folder
from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher
from ray_distill.teacher_cache.teachers.wavlm import join_attention_projections
from ray_distill.teacher_cache.teachers.weights import checked_mask_embedding, load_weights

KINDS = ("hubert", "wavlm", "wav2vec2", "unispeech", "unispeech-sat", "data2vec-audio")
"""``model_type`` of each."""
# Added to the variance by transformers' Wav2Vec2FeatureExtractor; fairseq adds 1e-5.
_NORMALIZE_EPS = 1e-7

# Of pre-training only; no layer output depends on them.
_HEADS = re.compile(
    r"(quantizer|project_hid|project_q|ctc_proj|speaker_proj|layer_norm_for_extract)\.|label_embeddings_concat$"
)

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


def load_huggingface(folder: Folder, device: str | torch.device) -> Wav2Vec2Teacher:
    """A pre-trained model of one of KINDS.

    Args:
        folder: with ``preprocessor_config.json`` where it matters whether waveforms are normalised.
        device: where the teacher computes.

    Raises:
        TeacherError: settings of another architecture, or weights that don't fit.
    """
    config, kind = folder.config, folder.kind
    # A folder without one: transformers normalises by default, as the models with layer norm were trained.
    normalize = kind == "data2vec-audio" or config.get("feat_extract_norm", "group") == "layer"
    if folder.preprocessor is not None:
        normalize = bool(folder.preprocessor.get("do_normalize", True))
    folder.require(_ONLY)
    architecture = _architecture(config, kind, folder.name)
    weights, mask_embedding = _weights(folder)
    model = build_model(architecture, folder.name)
    load_weights(model, join_attention_projections(weights) if kind == "wavlm" else weights, folder.name)
    return Wav2Vec2Teacher(
        model,
        checked_mask_embedding(mask_embedding, architecture.dim, folder.name),
        name=folder.name,
        normalize_eps=_NORMALIZE_EPS if normalize else None,
        device=device,
    )


def _architecture(config: dict[str, Any], kind: str, name: str) -> Architecture:
    """Defaults are those of transformers' configuration classes, the Base models'."""
    # data2vec has a stack of position convolutions, whose number is what others call their kernel.
    stacked = kind == "data2vec-audio"
    try:
        channels = config.get("conv_dim", [512] * 7)
        kernels = config.get("conv_kernel", [10, 3, 3, 3, 3, 2, 2])
        strides = config.get("conv_stride", [5, 2, 2, 2, 2, 2, 2])
        relative = int(config.get("num_buckets", 320)), int(config.get("max_bucket_distance", 800))
        return Architecture(
            conv_layers=[(int(c), int(k), int(s)) for c, k, s in zip(channels, kernels, strides, strict=True)],
            conv_bias=bool(config.get("conv_bias", False)),
            conv_layer_norm=stacked or config.get("feat_extract_norm", "group") == "layer",
            dim=int(config.get("hidden_size", 768)),
            ffn_dim=int(config.get("intermediate_size", 3072)),
            heads=int(config.get("num_attention_heads", 12)),
            layers=int(config.get("num_hidden_layers", 12)),
            layer_norm_first=bool(config.get("do_stable_layer_norm", False)),
            pos_kernel=int(
                config.get("conv_pos_kernel_size", 19) if stacked else config.get("num_conv_pos_embeddings", 128)
            ),
            pos_groups=int(config.get("num_conv_pos_embedding_groups", 16)),
            relative_positions=relative if kind == "wavlm" else None,
            pos_depth=int(config.get("num_conv_pos_embeddings", 5)) if stacked else None,
        )
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{name} has a config.json with a value of the wrong kind: {error}") from error


def _weights(folder: Folder) -> tuple[dict[str, Tensor], Tensor | None]:
    mask_embedding: Tensor | None = None
    weights: dict[str, Tensor] = {}
    for full_key, value in folder.weights().items():
        key = full_key.removeprefix(f"{folder.kind.replace('-', '_')}.")
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
    key = re.sub(r"pos_conv_embed\.layers\.(\d+)\.conv\.", r"pos_conv_embed.convolutions.\1.", key)
    key = key.replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
    return key.replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1")
