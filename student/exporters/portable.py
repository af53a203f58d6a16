"""A student becomes its portable form: plain PyTorch that every export starts from, checked against the student itself."""

from typing import Any

import torch
from torch import Tensor

from ray_distill.student.exporters.portable_model import PortableStudent
from ray_distill.student.model.position_encoding import PositionConv
from ray_distill.student.model.student import Student
from ray_distill.student.model.student_config import StudentConfig

_COPIED = (
    "conv_layers",
    "conv_bias",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
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
_CHOICES = {
    "conv_norm": ("group_norm", "layer_norm"),
    "reuse_behaviour": ("paper", "released"),
    "position": ("convolution", "rotary"),
}
# Of the heads and of training, which are not exported, or told by `StudentConfig.reuses`.
_ELSEWHERE = (
    "encoder_layers",
    "attention_reuse",
    "layer_grad_scale",
    "layer_drop",
    "depthwise_kernel",
    "feature_grad_mult",
    "heads",
    "split_heads",
    "split_dim",
    "target_dim",
)
_TOLERANCE = 1e-4


def portable_config(config: StudentConfig) -> dict[str, Any]:
    """What `PortableStudent` is made from.

    Raises:
        ValueError: the student has an option that the exported model doesn't know.
    """
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        known = name in (*_COPIED, *_ELSEWHERE) or value in _CHOICES.get(name, (field.get_default(),))
        if not known:
            raise ValueError(f"the student has {name}={value!r}, which exports don't support; only checkpoints keep it")
    tree = config.model_dump(mode="json")
    return {name: tree[name] for name in (*_COPIED, *_CHOICES)} | {"reuses": list(config.reuses)}


def portable_student(student: Student) -> PortableStudent:
    """The student's encoder without heads and mask embedding, in eval mode, on the CPU, in float32.

    Raises:
        ValueError: it has options or weights that the exported model doesn't know, or gives other features.
    """
    student = student.eval().cpu().float()
    model = PortableStudent(portable_config(student.config)).eval()
    weights = {
        name: tensor
        for name, tensor in student.state_dict().items()
        if not name.startswith(("heads.", "split.", "upsamplers.", "mask_embedding", "position.conv.parametrizations."))
    }
    if isinstance(student.position, PositionConv):
        weights["position.conv.weight"] = student.position.conv.weight
    try:
        model.load_state_dict({name: tensor.detach().clone().contiguous() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(
            f"the student has other weights than exports support ({' '.join(str(error).split())})"
        ) from error
    difference = largest_difference(student, model)
    if not difference < _TOLERANCE:
        raise ValueError(
            f"the exported model's features differ from the student's by {difference:.1e} (relative), so the student has an "
            "option that exports don't support; nothing was written"
        )
    return model


@torch.no_grad()
def largest_difference(student: Student, model: PortableStudent) -> float:
    """Largest relative difference of any layer's output on a padded batch of noise."""
    field = student.config.receptive_field
    lengths = torch.tensor([16_000 + field, 8_000 + field])
    waveforms = torch.randn(2, int(lengths[0]), generator=torch.Generator().manual_seed(0)) * 0.1
    ours, frames = student.encode(waveforms, lengths)
    theirs = torch.stack(model(waveforms, lengths)[1:], 1)
    if ours.shape != theirs.shape:
        return float("inf")
    rows = [(ours[row, :, :count], theirs[row, :, :count]) for row, count in enumerate(frames.tolist())]
    return max(float((a - b).norm() / a.norm()) for a, b in rows)


def weights_of(model: PortableStudent) -> dict[str, Tensor]:
    """Its tensors by name."""
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
