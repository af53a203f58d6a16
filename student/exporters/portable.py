"""Conversion of a student into the plain PyTorch model from which all exports are made, checked against the student."""

from typing import Any, Literal

import torch
from torch import Tensor

from ray_distill.student.exporters.portable_model import PortableStudent
from ray_distill.student.model.position_encoding import PositionConv
from ray_distill.student.model.student import HEAD_WEIGHTS, Student
from ray_distill.student.model.student_config import StudentConfig

_COPIED_FIELDS = (
    "conv_layers",
    "conv_bias",
    "feature_norm",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
    "layer_heads",
    "layer_ffn_dims",
    "layer_norm_first",
    "conv_pos",
    "conv_pos_groups",
    "conv_pos_depth",
    "time_reduction",
    "time_reduction_factor",
    "time_reduction_index",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout_input",
)
_SUPPORTED_VALUES = {
    "conv_norm": ("group_norm", "layer_norm"),
    "reuse_behaviour": ("paper", "released"),
    "position": ("convolution", "rotary"),
}
# Fields of the heads, which are exported with them only.
_HEAD_FIELDS = ("heads", "split_heads", "split_dim", "target_dim")
# Fields of training, which are not exported, or that `StudentConfig.reuses` replaces.
_OMITTED_FIELDS = (
    "encoder_layers",
    "attention_reuse",
    "layer_grad_scale",
    "layer_drop",
    "depthwise_kernel",
    "feature_grad_mult",
    "head_layers",
    "head_dim",
    "head_activation",
)
_TOLERANCE = 1e-4

SOURCES = ("portable_model.py", "portable_attention.py")
"""Files beside this one with the code of `PortableStudent`, which self-contained exports copy."""

Features = Literal["heads", "layers"]
"""Features that an export returns: the heads' predictions of the teacher's layers, or the encoder's input and layers."""


def default_features(config: StudentConfig) -> Features:
    """Return the features that the authors of a student's method evaluate on SUPERB.

    These are the heads' predictions for ARMHuBERT and MaskHuBERT, whose students have a linear head on each layer and no time
    reduction, and the encoder's layers for all others: FitHuBERT, DistilHuBERT, STaR, pruned students (DPHuBERT), and students
    without heads.
    """
    pruned = config.layer_heads is not None or config.layer_ffn_dims is not None
    return "heads" if config.has_plain_heads and not pruned else "layers"


def portable_config(config: StudentConfig, features: Features = "layers") -> dict[str, Any]:
    """Return the architecture as `PortableStudent` takes it.

    Args:
        config: Architecture of the student.
        features: Features to export. Default ``layers``.

    Raises:
        ValueError: the student uses an option that exports do not support, or has no heads to export.
    """
    if features == "heads" and config.heads == "none":
        raise ValueError("the student has no heads, so features heads can't be exported; choose features layers")
    if features == "heads" and (config.head_layers is not None or config.head_dim is not None):
        raise ValueError(
            "the student has head_layers or head_dim, and exports support one linear head on each layer; choose features layers"
        )
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        known = name in (*_COPIED_FIELDS, *_HEAD_FIELDS, *_OMITTED_FIELDS) or value in _SUPPORTED_VALUES.get(
            name, (field.get_default(),)
        )
        if not known:
            raise ValueError(
                f"the student has {name}={value!r}, which exports do not support; it can only be used from its checkpoint"
            )
    tree = config.model_dump(mode="json")
    exported = (*_COPIED_FIELDS, *_SUPPORTED_VALUES, *(_HEAD_FIELDS if features == "heads" else ()))
    return {name: tree[name] for name in exported} | {"reuses": list(config.reuses), "features": features}


def portable_student(student: Student, features: Features = "layers") -> PortableStudent:
    """Return the student's encoder without mask embedding, in eval mode, on the CPU, in float32.

    Args:
        student: The student; it is moved to the CPU and to float32, and set to eval mode.
        features: Features that the model returns; its heads are kept for ``heads`` only. Default ``layers``.

    Raises:
        ValueError: the student has options or weights that exports do not support, or the features differ.
    """
    student = student.eval().cpu().float()
    model = PortableStudent(portable_config(student.config, features)).eval()
    left_out: tuple[str, ...] = ("mask_embedding", "position.conv.parametrizations.")
    if features == "layers":
        left_out += HEAD_WEIGHTS
    weights = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(left_out)}
    if isinstance(student.position, PositionConv):
        weights["position.conv.weight"] = student.position.conv.weight
    try:
        model.load_state_dict({name: tensor.detach().clone().contiguous() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(
            f"the student has weights that exports do not support ({' '.join(str(error).split())})"
        ) from error
    difference = largest_difference(student, model)
    if not difference < _TOLERANCE:
        raise ValueError(
            f"the features of the exported model differ from the student's by {difference:.1e} (relative), so the student has "
            "an option that exports do not support; nothing was written"
        )
    return model


@torch.no_grad()
def largest_difference(student: Student, model: PortableStudent) -> float:
    """Return the largest relative difference of the features on a padded batch of noise."""
    field = student.config.receptive_field
    lengths = torch.tensor([16_000 + field, 8_000 + field])
    waveforms = torch.randn(2, int(lengths[0]), generator=torch.Generator().manual_seed(0)) * 0.1
    found = student(waveforms, lengths)
    features, frames = model(waveforms, lengths), found.num_frames
    heads = model.config["features"] == "heads"
    ours = found.projections if heads else found.hidden_states
    theirs = torch.stack(features if heads else features[1:], 1)  # State 0 is the encoder's input.
    if ours.shape != theirs.shape:
        return float("inf")
    rows = [(ours[row, :, :count], theirs[row, :, :count]) for row, count in enumerate(frames.tolist())]
    return max(float((a - b).norm() / a.norm()) for a, b in rows)


def named_weights(model: PortableStudent) -> dict[str, Tensor]:
    """Return the tensors of the model by name."""
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
