"""HuBERT and wav2vec 2.0 checkpoints of fairseq, and DistilHuBERT's of S3PRL, which have fairseq's modules. Neither is needed."""

import ast
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.teachers.architecture import HUBERT_CONVOLUTIONS, Architecture, build_model
from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.wav2vec2 import NORMALIZE_EPS, Wav2Vec2Teacher
from ray_distill.teacher_cache.teachers.weights import checked_mask_embedding, load_model, without_wrappers
from ray_distill.teacher_cache.untrusted import plain

_PRETRAINED = ("hubert", "wav2vec2")
_MAX_CONVOLUTIONS = 32

# Weights for pre-training only. No layer output depends on them.
_PRETRAINING_WEIGHTS = re.compile(r"(final_proj|quantizer|project_q|target_glu)\.|label_embs_concat$")

# Supported values of settings. With other values, fairseq's models have another architecture.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu",),
    "layer_type": ("transformer",),
    "pos_conv_depth": (1,),
    "conv_pos_batch_norm": (False,),
    "quantize_input": (False,),
    "crop_seq_to_multiple": (1,),
    "extractor_mode": ("default", "layer_norm"),
}

# The same for S3PRL's DistilHuBERT; the first value is the default. Other kinds change the input of the encoder.
_DISTILLER_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "task_emb_type": ("expand-last", "concat-last", "self-hidden", "none"),
    "attention_type": ("original",),
}
_DISTILLER_HEADS = ("output_layer.", "task_embedding.")

# Names in fairseq's and WavLM's checkpoints, and torchaudio's names. The first pattern that matches the whole name applies.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight|bias)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.0\.2\.(weight|bias)", r"feature_extractor.conv_layers.0.layer_norm.\1"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(weight|bias)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"layer_norm\.(weight|bias)", r"encoder.feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(weight|bias)", r"encoder.feature_projection.projection.\1"),
    (r"encoder\.pos_conv\.0\.weight_g", "encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", "encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original1"),
    (
        r"encoder\.pos_conv\.0\.(bias|parametrizations\.weight\.original[01])",
        r"encoder.transformer.pos_conv_embed.conv.\1",
    ),
    (r"encoder\.layer_norm\.(weight|bias)", r"encoder.transformer.layer_norm.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.+)", r"encoder.transformer.layers.\1.layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(.+)", r"encoder.transformer.layers.\1.final_layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(.+)", r"encoder.transformer.layers.\1.feed_forward.intermediate_dense.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(.+)", r"encoder.transformer.layers.\1.feed_forward.output_dense.\2"),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight",
        r"encoder.transformer.layers.\1.attention.rel_attn_embed.weight",
    ),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.grep_linear\.(.+)",
        r"encoder.transformer.layers.\1.attention.gru_rel_pos_linear.\2",
    ),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_a", r"encoder.transformer.layers.\1.attention.gru_rel_pos_const"),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.([kvq]_proj|out_proj)\.(.+)",
        r"encoder.transformer.layers.\1.attention.\2.\3",
    ),
)
_PATTERNS = tuple((re.compile(pattern), replacement) for pattern, replacement in _NAMES)


def load_fairseq(checkpoint: Mapping[str, Any], name: str, device: str | torch.device) -> Wav2Vec2Teacher:
    """Build a pre-trained HuBERT or wav2vec 2.0 from the dictionary of a fairseq checkpoint.

    Args:
        checkpoint: Result of `load_untrusted`, with ``cfg`` (``args`` before 2021) and ``model``.
        name: Name of the file, for messages.
        device: Device on which the teacher computes.

    Raises:
        TeacherError: If the model is fine-tuned or of another kind, or its weights don't fit its configuration.
    """
    model_cfg, task_cfg = _configuration(checkpoint, name)
    kind = model_cfg.get("_name") or model_cfg.get("arch")
    if kind not in _PRETRAINED:
        raise TeacherError(
            f"{name} has a model of kind {kind!r}; it must be a pre-trained model, not a fine-tuned one, of kind "
            f"{' or '.join(_PRETRAINED)}"
        )
    sample_rate = task_cfg.get("sample_rate", SAMPLE_RATE)
    if sample_rate != SAMPLE_RATE:
        raise TeacherError(f"{name} was trained on audio at {sample_rate} Hz, but teachers must take {SAMPLE_RATE} Hz")
    architecture = fairseq_architecture(model_cfg, name)
    weights, mask_embedding = torchaudio_weights(checkpoint.get("model", checkpoint.get("model_weight")), name)
    model = load_model(lambda: build_model(architecture, name), weights, architecture.modules, name)
    return Wav2Vec2Teacher(
        model,
        checked_mask_embedding(mask_embedding, architecture.dim, name),
        name=name,
        normalize_eps=NORMALIZE_EPS if task_cfg.get("normalize") else None,
        device=device,
    )


def is_distiller(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is of S3PRL's DistilHuBERT."""
    return "Distiller" in checkpoint and "Config" in checkpoint


def load_distiller(checkpoint: Mapping[str, Any], name: str, device: str | torch.device) -> Wav2Vec2Teacher:
    """Build a DistilHuBERT, without its prediction heads, from the dictionary of its checkpoint. It has no mask embedding.

    Args:
        checkpoint: Result of `load_untrusted`, with ``Config`` and ``Distiller``.
        name: Name of the file, for messages.
        device: Device on which the teacher computes.

    Raises:
        TeacherError: If a setting is not supported, or the weights don't fit the configuration.
    """
    config = plain(checkpoint["Config"])
    cfg = config.get("distiller") if isinstance(config, dict) else None
    if not isinstance(cfg, dict):
        raise TeacherError(
            f"{name} has no section 'distiller' in its configuration, where S3PRL has that of DistilHuBERT"
        )
    for key, allowed in _DISTILLER_SUPPORTED.items():
        if cfg.get(key, allowed[0]) not in allowed:
            raise TeacherError(
                f"{name} has {key} = {cfg[key]!r}, but only {' or '.join(map(repr, allowed))} is supported"
            )
    renamed = {"encoder_layers": 1} | cfg | {"conv_feature_layers": cfg.get("extractor_conv_feature_layers")}
    architecture = dataclasses.replace(fairseq_architecture(renamed, name), feature_norm=False)
    state = checkpoint["Distiller"]
    if isinstance(state, dict):
        state = {key: value for key, value in state.items() if not str(key).startswith(_DISTILLER_HEADS)}
    weights, _ = torchaudio_weights(state, name)
    model = load_model(lambda: build_model(architecture, name), weights, architecture.modules, name)
    return Wav2Vec2Teacher(model, None, name=name, device=device)


def fairseq_architecture(cfg: Mapping[str, Any], name: str) -> Architecture:
    """Return the architecture of a fairseq configuration. Missing settings have fairseq's defaults, the Base models'.

    Raises:
        TeacherError: If a setting is not supported or has a value of the wrong kind.
    """
    for key, allowed in _SUPPORTED.items():
        if key in cfg and cfg[key] not in allowed:
            raise TeacherError(
                f"{name} has {key} = {cfg[key]!r}, but only {' or '.join(map(repr, allowed))} is supported"
            )
    dim = _integer(cfg, "encoder_embed_dim", 768, name)
    convolutions = cfg.get("conv_feature_layers")
    conv_layers = HUBERT_CONVOLUTIONS if convolutions is None else parse_conv_layers(convolutions, name)
    return Architecture(
        conv_layers=conv_layers,
        conv_bias=bool(cfg.get("conv_bias", False)),
        conv_layer_norm=cfg.get("extractor_mode", "default") == "layer_norm",
        dim=dim,
        ffn_dim=_integer(cfg, "encoder_ffn_embed_dim", 3072, name),
        heads=_integer(cfg, "encoder_attention_heads", 12, name),
        layers=_integer(cfg, "encoder_layers", 12, name),
        layer_norm_first=bool(cfg.get("layer_norm_first", False)),
        pos_kernel=_integer(cfg, "conv_pos", 128, name),
        pos_groups=_integer(cfg, "conv_pos_groups", 16, name),
        projected=conv_layers[-1][0] != dim,
    )


def parse_conv_layers(text: Any, name: str) -> list[tuple[int, int, int]]:
    """Parse convolutions such as ``"[(512,10,5)] + [(512,3,2)] * 4"``, a string that fairseq evaluates as Python.

    Only lists of integer triples, ``+`` and ``*`` are allowed. No code is evaluated.

    Raises:
        TeacherError: If the text is anything else.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Tuple(elts=elements):
                return tuple(value(element) for element in elements)
            case ast.List(elts=elements):
                return [value(element) for element in elements]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                first, second = value(left), value(right)
                if isinstance(first, list) and isinstance(second, list):
                    return first + second
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                layers, times = value(left), value(right)
                if isinstance(layers, list) and isinstance(times, int) and len(layers) * times <= _MAX_CONVOLUTIONS:
                    return layers * times
        raise ValueError

    try:
        layers = value(ast.parse(text, mode="eval").body) if isinstance(text, str) else text
        parsed = [(int(channels), int(kernel), int(stride)) for channels, kernel, stride in layers]
        if not 0 < len(parsed) <= _MAX_CONVOLUTIONS or min(min(layer) for layer in parsed) < 1:
            raise ValueError
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        raise TeacherError(
            f"{name} has conv_feature_layers = {str(text)[:100]!r}, which is not a list of (channels, kernel, stride)"
        ) from None
    return parsed


def torchaudio_weights(state: Any, name: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the weights under torchaudio's names and the mask embedding from the state dict of fairseq or WavLM.

    Raises:
        TeacherError: If it is not a state dict or a weight has an unknown name.
    """
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise TeacherError(f"{name} has no weights under the key 'model', where fairseq's checkpoints have them")
    mask_embedding: Tensor | None = None
    weights: dict[str, Tensor] = {}
    for key, value in without_wrappers(state, name).items():
        if key == "mask_emb":
            mask_embedding = value
        elif not _PRETRAINING_WEIGHTS.match(key):
            weights[_torchaudio_name(key, name)] = value
    return weights, mask_embedding


def _torchaudio_name(key: str, name: str) -> str:
    for pattern, replacement in _PATTERNS:
        match = pattern.fullmatch(key)
        if match:
            return match.expand(replacement)
    raise TeacherError(f"{name} has a weight {key!r}, which no pre-trained HuBERT, WavLM or wav2vec 2.0 has")


def _configuration(checkpoint: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of the model and of its task. Before 2021 fairseq had both in one ``args`` namespace.

    S3PRL converts checkpoints of fairseq to files with ``model_cfg``, ``task_cfg`` and ``model_weight``.
    """
    cfg, args = plain(checkpoint.get("cfg")), plain(checkpoint.get("args"))
    if "model_cfg" in checkpoint:
        cfg = {"model": plain(checkpoint["model_cfg"]), "task": plain(checkpoint.get("task_cfg"))}
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        task = cfg.get("task")
        return cfg["model"], task if isinstance(task, dict) else {}
    if isinstance(args, dict):
        return args, args
    if "dims" in checkpoint and "model_state_dict" in checkpoint:
        raise TeacherError(
            f"{name} is OpenAI's own checkpoint of Whisper; give the model of the Hugging Face Hub, such as openai/whisper-small, or "
            "its folder"
        )
    raise TeacherError(
        f"{name} has neither 'cfg' nor 'args', so it is not a checkpoint of fairseq or WavLM; weights alone are not enough, so give "
        "the model's Hugging Face folder, or its name on the hub"
    )


def _integer(cfg: Mapping[str, Any], key: str, default: int, name: str) -> int:
    value = cfg.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise TeacherError(f"{name} has {key} = {value!r}, which is not a positive integer")
    return value
