"""The released ARMHuBERT and MaskHuBERT checkpoints: Lightning ``.ckpt`` with the yaml that S3PRL is given."""

import ast
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from student.checkpoints import fill
from student.config import StudentConfig
from student.model import Student
from teacher_cache.untrusted import load_untrusted

_KEYS = (
    (r"mask_emb", r"mask_embedding"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight|bias)", r"conv_blocks.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(weight|bias)", r"conv_blocks.\1.norm.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(weight|bias)", r"conv_blocks.\1.norm.\2"),
    (r"layer_norm\.(weight|bias)", r"feature_norm.\1"),
    (r"post_extract_proj\.(weight|bias)", r"projection.\1"),
    (r"encoder\.pos_conv\.0\.bias", r"position.conv.bias"),
    (r"encoder\.pos_conv\.0\.weight_g", r"position.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", r"position.conv.parametrizations.weight.original1"),
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
)

_ONLY = {
    "layer_type": "transformer",
    "layer_norm_first": False,
    "enable_tr_layer": False,
    "layerwise_proj": True,
    "pos_conv_depth": 1,
    "activation_fn": "gelu",
    "crop_seq_to_multiple": 1,
}
"""Options of the published yaml whose other values this student does not have."""

_MOST_LAYERS = 1000


def load_published(checkpoint: Path, config: Path) -> Student:
    """Loads a published checkpoint, in eval mode, with the released reuse behaviour (second softmax, batch order right).

    Raises:
        ValueError: a yaml or checkpoint that can't be read, or that uses an option this student does not have.
    """
    student = Student(published_config(config))
    loaded = load_untrusted(checkpoint)
    if not isinstance(loaded.get("state_dict"), dict):
        raise ValueError(f"{checkpoint} is not a Lightning checkpoint: it has no state_dict")
    prefix = "student_model."
    tensors = {name[len(prefix) :]: t for name, t in loaded["state_dict"].items() if name.startswith(prefix)}
    if not tensors:
        raise ValueError(f"{checkpoint} holds no student: none of its tensors' names starts with {prefix!r}")
    fill(student, {_rename(name, checkpoint): tensor for name, tensor in tensors.items()}, checkpoint)
    return student.eval()


def _rename(name: str, origin: Path) -> str:
    for pattern, ours in _KEYS:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise ValueError(f"{origin} has a tensor that no student has: {name!r}")


def published_config(path: Path) -> StudentConfig:
    """The student that a published yaml describes in its ``distiller`` section; ValueError where it can't be read."""
    if not path.is_file():
        raise ValueError(f"there is no yaml at {path}")
    try:
        tree = yaml.safe_load(path.read_text())
        options: dict[str, Any] = tree["distiller"]
        if not isinstance(options, dict):
            raise TypeError("distiller is not a mapping")
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a published configuration: it has no readable 'distiller' section") from error
    for key, value in _ONLY.items():
        if options.get(key, value) != value:
            raise ValueError(f"{path}: distiller.{key} is {options[key]!r}; only {value!r} is supported")
    try:
        layers = int(options["encoder_layers"])
        pattern = options.get("reuse_pattern")  # MaskHuBERT's yaml has none: every layer computes its map.
        computes = [True] * layers if pattern in (None, "None") else _literal(pattern)
        norms: dict[str, Literal["group_norm", "layer_norm"]] = {"default": "group_norm", "layer_norm": "layer_norm"}
        return StudentConfig(
            conv_layers=tuple(tuple(layer) for layer in _literal(options["conv_feature_layers"])),
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


def _literal(text: Any) -> list[Any]:
    """The value of a list expression such as ``[(128, 10, 5)] + [(256, 3, 2)] * 4``, without eval.

    Raises:
        TypeError: anything but lists of literals, added, or repeated up to a small total length.
    """
    return list(_list(ast.parse(text, mode="eval").body, text)) if isinstance(text, str) else list(text)


def _list(node: ast.expr, text: str) -> list[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _list(node.left, text) + _list(node.right, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Constant):
        items, times = _list(node.left, text), node.right.value
        # The bound keeps a hostile yaml from filling the memory.
        if not isinstance(times, int) or len(items) * times > _MOST_LAYERS:
            raise TypeError(f"{text!r} repeats a list by something else than a small number")
        return items * times
    if not isinstance(node, ast.List):
        raise TypeError(f"{text!r} is not a sum of lists")
    return [ast.literal_eval(item) for item in node.elts]
