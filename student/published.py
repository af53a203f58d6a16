"""The released ARMHuBERT and MaskHuBERT checkpoints: a Lightning ``.ckpt`` with the yaml that S3PRL uses."""

import ast
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import MAX_MODULES, StudentConfig
from ray_distill.student.weights import student_with_weights
from ray_distill.teacher_cache.untrusted import load_untrusted

_NAME_PATTERNS = (
    (r"mask_emb", r"mask_embedding"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight|bias)", r"conv_blocks.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(weight|bias)", r"conv_blocks.\1.norm.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(weight|bias)", r"conv_blocks.\1.norm.\2"),
    (r"layer_norm\.(weight|bias)", r"feature_norm.\1"),
    (r"post_extract_proj\.(weight|bias)", r"projection.\1"),
    (r"encoder\.pos_conv\.0\.bias", r"position.conv.bias"),
    (r"encoder\.pos_conv\.0\.weight_g", r"position.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", r"position.conv.parametrizations.weight.original1"),
    (r"encoder\.pos_conv\.(\d+)\.0\.(weight|bias)", r"position.convs.\1.\2"),
    (r"encoder\.layer_norm\.(weight|bias)", r"encoder_norm.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.k_proj\.(weight|bias)", r"layers.\1.attention.key.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", r"layers.\1.attention.query.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.v_proj\.(weight|bias)", r"layers.\1.attention.value.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"layers.\1.attention.out.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(weight|bias)", r"layers.\1.up.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(weight|bias)", r"layers.\1.down.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(weight|bias)", r"layers.\1.final_norm.\2"),
    (r"proj_head\.(\d+)\.lin_proj\.(weight|bias)", r"heads.\1.\2"),
    (r"proj_head\.(\d+)\.upsampler\.(weight|bias)", r"upsamplers.\1.expand.\2"),
)
_SPLIT_NAME_PATTERNS = (
    (r"proj_head\.0\.(weight|bias)", r"split.\1"),
    (r"proj_head\.2\.layer\.(weight|bias)", r"heads.0.\1"),
)

_SUPPORTED_VALUES = {"activation_fn": "gelu", "crop_seq_to_multiple": 1}
"""Options of the published yaml of which only one value is supported."""

_MAX_LIST_LENGTH = 1000


def load_published(checkpoint: Path, config: Path) -> Student:
    """Load a published checkpoint in eval mode, with the released reuse behaviour (second softmax, correct batch order).

    Args:
        checkpoint: The Lightning ``.ckpt``.
        config: Its yaml.

    Raises:
        ValueError: the yaml or the checkpoint can't be read, or uses an option that this student does not support.
    """
    student_config = published_config(config)
    for unsupported, why in (
        (
            student_config.layer_type == "conformer",
            "the published code can neither build Conformer layers with reuse nor run them without reuse",
        ),
        (student_config.layer_norm_first, "the published layer_norm_first does not normalise the last layer's output"),
        (student_config.time_reduction == "fc2", "the published forward pass does not run fc2"),
        (
            student_config.time_reduction_index > 0,
            "with tr_layer_index above 0 the published heads return frames of two lengths",
        ),
    ):
        if unsupported:
            raise ValueError(f"{config}: the checkpoint can't be loaded, because {why}")
    loaded = load_untrusted(checkpoint)
    if not isinstance(loaded.get("state_dict"), dict):
        raise ValueError(f"{checkpoint} is not a Lightning checkpoint: it has no state_dict")
    prefix = "student_model."
    tensors = {name[len(prefix) :]: t for name, t in loaded["state_dict"].items() if name.startswith(prefix)}
    if not tensors:
        raise ValueError(f"{checkpoint} holds no student: no tensor has a name that starts with {prefix!r}")
    converted = _convert_tensors(tensors, student_config, checkpoint)
    return student_with_weights(student_config, converted, checkpoint).eval()


def _convert_tensors(tensors: dict[str, Any], config: StudentConfig, origin: Path) -> dict[str, Any]:
    """Return the tensors by our names."""
    last = config.encoder_layers - 1
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"upsampler\.(weight|bias)", name):
            if config.heads == "split":  # Layer-wise heads have their own upsamplers; this one is unused.
                found[f"upsamplers.{last}.expand.{match[1]}"] = tensor
        elif name == "proj_head.2.weight" and isinstance(tensor, Tensor) and tensor.ndim == 3:
            found |= {f"heads.{number}.weight": part.t() for number, part in enumerate(tensor)}
        elif name == "proj_head.2.bias" and isinstance(tensor, Tensor) and tensor.ndim == 4:
            found |= {f"heads.{number}.bias": part for number, part in enumerate(tensor[0, 0])}
        else:
            found[_convert_name(name, config, origin)] = tensor
    return found


def _convert_name(name: str, config: StudentConfig, origin: Path) -> str:
    if config.time_reduction is not None and (match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)):
        # The published reduction is one of the layers, and is counted among them.
        number = int(match[1])
        if number == config.time_reduction_index:
            return f"reduction.reduce.{match[2]}"
        name = f"encoder.layers.{number - (number > config.time_reduction_index)}.{match[2]}"
    for pattern, ours in (*_NAME_PATTERNS, *(_SPLIT_NAME_PATTERNS if config.heads == "split" else ())):
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise ValueError(f"{origin} has a tensor that no student has: {name!r}")


def published_config(path: Path) -> StudentConfig:
    """Return the architecture that a published yaml describes in its ``distiller`` section.

    Raises:
        ValueError: the yaml is missing, can't be read, or describes a student that is not supported.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of the yaml that belongs to the checkpoint")
    try:
        tree = yaml.safe_load(path.read_text())
        options: dict[str, Any] = tree["distiller"]
        if not isinstance(options, dict):
            raise TypeError("distiller is not a mapping")
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a published configuration: it has no readable 'distiller' section") from error
    for key, value in _SUPPORTED_VALUES.items():
        if options.get(key, value) != value:
            raise ValueError(f"{path}: distiller.{key} is {options[key]!r}; only {value!r} is supported")
    try:
        if (layers := int(options["encoder_layers"])) > MAX_MODULES:
            raise ValueError(f"encoder_layers is {layers:,}, but at most {MAX_MODULES:,} are allowed")
        pattern = options.get("reuse_pattern")  # MaskHuBERT's yaml has none: every layer computes its map.
        computes = [True] * layers if pattern in (None, "None") else literal_list(pattern)
        norms: dict[str, Literal["group_norm", "layer_norm"]] = {"default": "group_norm", "layer_norm": "layer_norm"}
        positions: dict[str, Literal["convolution", "relative", "rotary"]] = {
            "abs": "convolution",
            "rel_pos": "relative",
            "rope": "rotary",
        }
        if options.get("layer_type", "transformer") == "transformer":
            positions = dict.fromkeys(positions, "convolution")  # The key only applies to Conformer layers.
        return StudentConfig(
            conv_layers=tuple(tuple(layer) for layer in literal_list(options["conv_feature_layers"])),
            conv_norm=norms[options.get("extractor_mode", "default")],
            conv_bias=options.get("conv_bias", False),
            encoder_layers=layers,
            encoder_embed_dim=options["encoder_embed_dim"],
            encoder_ffn_embed_dim=options["encoder_ffn_embed_dim"],
            encoder_attention_heads=options["encoder_attention_heads"],
            # Published: True computes a map. Ours: True reuses one.
            attention_reuse=tuple(not own for own in computes),
            reuse_behaviour="released",
            layer_grad_scale=options.get("layer_grad_scale", False),
            layer_type=options.get("layer_type", "transformer"),
            layer_norm_first=options.get("layer_norm_first", False),
            layer_drop=options.get("encoder_layerdrop", 0.0),
            depthwise_kernel=options.get("depthwise_conv_kernel_size", 31),
            position=positions[options.get("pos_enc_type", "abs")],
            conv_pos_depth=options.get("pos_conv_depth", 1),
            feature_grad_mult=options.get("feature_grad_mult", 1.0),
            **_reduction(options),
            **_heads(options),
            conv_pos=options.get("conv_pos", 128),
            conv_pos_groups=options.get("conv_pos_groups", 16),
            target_dim=options.get("pred_head_final_dim", 768),
            dropout=options.get("dropout", 0.1),
            attention_dropout=options.get("attention_dropout", 0.1),
            activation_dropout=options.get("activation_dropout", 0.0),
            dropout_input=options.get("dropout_input", 0.0),
        )
    except (KeyError, TypeError, ValueError, SyntaxError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a student ({' '.join(str(error).split())})") from error


def _reduction(options: dict[str, Any]) -> dict[str, Any]:
    if not options.get("enable_tr_layer", True):
        return {}
    return {
        "time_reduction": options.get("tr_layer_type", "conv1d"),
        "time_reduction_factor": options.get("tr_reduce_factor", 2),
        "time_reduction_index": options.get("tr_layer_index", 0),
    }


def _heads(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("layerwise_proj", False):
        return {}
    return {
        "heads": "split",
        "split_heads": len(literal_list(options.get("pred_layer_id", "[3, 7, 11]"))),
        "split_dim": options.get("pred_head_inter_dim") or None,
    }


def literal_list(text: Any) -> list[Any]:
    """Return the value of a list expression such as ``[(128, 10, 5)] + [(256, 3, 2)] * 4``, without eval.

    Args:
        text: The expression, or a sequence, which is returned as a list.

    Raises:
        TypeError: the expression is not a sum of lists of literals, repeated up to a small total length.
    """
    return list(_evaluate(ast.parse(text, mode="eval").body, text)) if isinstance(text, str) else list(text)


def _evaluate(node: ast.expr, text: str) -> list[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left, text) + _evaluate(node.right, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Constant):
        items, times = _evaluate(node.left, text), node.right.value
        # Without a bound, a hostile yaml could fill the memory.
        if not isinstance(times, int) or len(items) * times > _MAX_LIST_LENGTH:
            raise TypeError(f"{text!r} does not repeat a list by a small number")
        return items * times
    if not isinstance(node, ast.List):
        raise TypeError(f"{text!r} is not a sum of lists")
    return [ast.literal_eval(item) for item in node.elts]
