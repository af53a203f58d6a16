"""Hugging Face folders of models with the architecture of wav2vec 2.0."""

import re
from typing import Any

import torch
from torch import Tensor

from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.teachers.architecture import Architecture, build_model
from ray_distill.teacher_cache.teachers.huggingface_folder import HuggingFaceFolder
from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher
from ray_distill.teacher_cache.teachers.wavlm import join_attention_projections
from ray_distill.teacher_cache.teachers.weights import checked_mask_embedding, load_model

INPUT_RATES = (SAMPLE_RATE, 24_000)
"""Sampling rates in Hz that a MERT may take."""
MODEL_TYPES = ("hubert", "wavlm", "wav2vec2", "unispeech", "unispeech-sat", "data2vec-audio", "mert_model")
"""Values of ``model_type`` in config.json."""
# transformers' Wav2Vec2FeatureExtractor adds this to the variance; fairseq adds 1e-5.
_NORMALIZE_EPS = 1e-7

# Weights for pre-training only. No layer output depends on them.
_PRETRAINING_WEIGHTS = re.compile(
    r"(quantizer|project_hid|project_q|ctc_proj|speaker_proj|layer_norm_for_extract|final_proj)\.|label_embeddings_concat$"
)

# Weights of the task heads of fine-tuned models.
_TASK_WEIGHTS = re.compile(
    r"(lm_head|classifier|projector|tdnn|objective|qa_outputs)\.|layer_weights$|feature_extractor\.(weight|bias)$"
)

# Supported values of settings. With other values, transformers' models have another architecture.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "feat_extract_activation": ("gelu",),
    "feat_extract_norm": ("group", "layer"),
    "feat_proj_layer_norm": (True, False),
    "conv_pos_batch_norm": (False,),
    "layer_norm_eps": (1e-5,),
    "add_adapter": (False,),
    "adapter_attn_dim": (None,),
    "deepnorm": (False,),  # Without it, MERT's attention_relax has no effect.
}


def load_huggingface(folder: HuggingFaceFolder, device: str | torch.device) -> Wav2Vec2Teacher:
    """Load a pre-trained model of a type in MODEL_TYPES.

    Args:
        folder: Hugging Face folder. Its feature extractor's settings, if present, say whether waveforms are normalised.
        device: Device on which the teacher computes.

    Raises:
        TeacherError: If a setting is not supported or the weights don't fit.
    """
    config, model_type = folder.config, folder.model_type
    # Models with layer norms were trained on normalised waveforms, which is transformers' default.
    normalize = model_type == "data2vec-audio" or config.get("feat_extract_norm", "group") == "layer"
    if folder.preprocessor is not None:
        normalize = bool(folder.preprocessor.get("do_normalize", True))
    folder.require(_SUPPORTED)
    input_rate = _input_rate(folder)
    architecture = _architecture(config, model_type, folder.name)
    weights, mask_embedding = _weights(folder)
    if model_type == "wavlm":
        weights = join_attention_projections(weights)
    model = load_model(lambda: build_model(architecture, folder.name), weights, architecture.modules, folder.name)
    return Wav2Vec2Teacher(
        model,
        checked_mask_embedding(mask_embedding, architecture.dim, folder.name),
        name=folder.name,
        normalize_eps=_NORMALIZE_EPS if normalize else None,
        input_rate=input_rate,
        device=device,
    )


def _architecture(config: dict[str, Any], model_type: str, name: str) -> Architecture:
    """Return the architecture. Defaults are those of transformers' configuration classes, the Base models'."""
    # data2vec has stacked position convolutions, and num_conv_pos_embeddings is their number instead of a kernel size.
    stacked = model_type == "data2vec-audio"
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
            feature_norm=bool(config.get("feat_proj_layer_norm", True)),
            relative_positions=relative if model_type == "wavlm" else None,
            pos_depth=int(config.get("num_conv_pos_embeddings", 5)) if stacked else None,
        )
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{name} has a config.json with a value of the wrong kind: {error}") from error


def _input_rate(folder: HuggingFaceFolder) -> int:
    """Return the sampling rate in Hz that the model takes: 24,000 for most MERTs, else 16,000.

    Raises:
        TeacherError: If it is another, or the model also reads a constant-Q transform.
    """
    rate = folder.config.get("sample_rate", SAMPLE_RATE)
    if rate not in INPUT_RATES:
        raise TeacherError(
            f"{folder.name} has sample_rate = {rate!r}, but teachers must take {' or '.join(map(str, INPUT_RATES))} Hz"
        )
    if folder.config.get("feature_extractor_cqt"):
        raise TeacherError(
            f"{folder.name} has feature_extractor_cqt = True: it reads a constant-Q transform that only the code in its repository "
            "computes, and code of a checkpoint is never run; use a MERT without it"
        )
    return int(rate)


def _weights(folder: HuggingFaceFolder) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the weights under torchaudio's names, and the mask embedding.

    Raises:
        TeacherError: If the model is fine-tuned.
    """
    mask_embedding: Tensor | None = None
    weights: dict[str, Tensor] = {}
    for full_key, value in folder.weights().items():
        key = full_key.removeprefix(f"{folder.model_type.replace('-', '_')}.")
        if key == "masked_spec_embed":
            mask_embedding = value
        elif _TASK_WEIGHTS.match(key):
            extractor = folder.preprocessor_file
            raise TeacherError(
                f"{folder.name} is a fine-tuned model, since it has the weight {full_key!r} of a task's head; use the pre-trained "
                "model that it was made from, or drop the head with "
                f"transformers.AutoModel.from_pretrained({str(folder.path)!r}).save_pretrained(NEW_FOLDER)"
                f"{f' and copy {extractor} to NEW_FOLDER, which says how audio is normalised' if extractor else ''}"
            )
        elif not _PRETRAINING_WEIGHTS.match(key):
            weights[_torchaudio_name(key)] = value
    return weights, mask_embedding


def _torchaudio_name(key: str) -> str:
    """Return torchaudio's name of a weight. It differs from transformers' in the encoder's prefix and the weight norm."""
    if key.startswith("feature_projection."):
        return f"encoder.{key}"
    if not key.startswith("encoder."):
        return key
    key = key.replace("encoder.", "encoder.transformer.", 1)
    key = re.sub(r"pos_conv_embed\.layers\.(\d+)\.conv\.", r"pos_conv_embed.convolutions.\1.", key)
    key = key.replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
    return key.replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1")
