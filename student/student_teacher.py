"""A student as the teacher of the next student. `teacher_cache.teachers` imports this module by its name.

Shapes: B utterances, S samples, T frames (20 ms), D width.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
import torch
from torch import Tensor

from ray_distill.student.checkpoints import load_student
from ray_distill.student.model.student import HEAD_WEIGHTS, Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.weights import student_with_weights
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD
from ray_distill.teacher_cache.teachers.huggingface_folder import HuggingFaceFolder
from ray_distill.teacher_cache.teachers.teacher import Teacher, TeacherError
from ray_distill.teacher_cache.untrusted import load_untrusted

# Part of every fingerprint. Increase the number when a change of the arithmetic of students changes results.
_ARITHMETIC = "student-1"

_TRAINING_FIELDS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout_input",
    "layer_drop",
    "layer_grad_scale",
    "feature_grad_mult",
    "target_dim",
    "split_heads",
    "split_dim",
    "heads",
    "head_layers",
    "head_dim",
    "layer_heads",
    "layer_ffn_dims",
)
"""Settings that no output of the encoder's layers depends on, or that the shapes of the weights show."""


class StudentTeacher(Teacher):
    """Outputs of the encoder layers of a student, without its heads. After a time reduction, frames are repeated."""

    def __init__(
        self, student: Student, mask_embedding: Tensor | None, *, name: str, device: str | torch.device = "cpu"
    ) -> None:
        """Wrap a student without heads. Most callers use `load_teacher` instead.

        Args:
            student: Student with its weights.
            mask_embedding: (D,) float, or None if the export has none.
            name: Name for people to read.
            device: Device on which the teacher computes.

        Raises:
            TeacherError: If frames are not those of HuBERT.
        """
        config = student.config
        stride = math.prod(layer[2] for layer in config.conv_layers)
        if config.patches is not None or (stride, config.receptive_field) != (FRAME_SAMPLES, RECEPTIVE_FIELD):
            raise TeacherError(
                f"{name} is a student whose frames are not {RECEPTIVE_FIELD} samples wide and {FRAME_SAMPLES} apart, as in "
                "HuBERT, so it can't teach"
            )
        self._student = student
        # Settings that names and shapes of the weights do not show, and that change an output.
        settings = config.model_dump(mode="json", exclude=set(_TRAINING_FIELDS))
        super().__init__(
            student,
            name=name,
            num_layers=config.encoder_layers,
            dim=config.encoder_embed_dim,
            identity=[_ARITHMETIC, settings | {"attention_reuse": list(config.reuses)}],
            mask_embedding=mask_embedding,
            device=device,
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """See `Teacher.weights`. A mask embedding that the export does not have is left out."""
        weights = super().weights
        return (
            weights if self._mask_embedding is not None else {k: v for k, v in weights.items() if k != "mask_embedding"}
        )

    def layer_outputs(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """See `Teacher.layer_outputs`."""

        def mask(x_BTD: Tensor, frame_counts: Tensor) -> Tensor:
            return self.masked(x_BTD, frame_mask, frame_counts.to(x_BTD.device))

        layers, _, _ = self._student.layer_outputs(waveforms, lengths, augment=mask)
        yield from layers


def load_student_teacher(folder: HuggingFaceFolder, device: str | torch.device) -> StudentTeacher:
    """Load a student from its export, its checkpoint, or an export in the format of Hugging Face or S3PRL.

    Raises:
        ValueError: If the student is damaged, or its configuration or weights don't fit.
    """
    described = folder.config
    with torch.random.fork_rng(devices=[]):
        if "model_type" not in described and "student" in described and folder.is_local:
            student = load_student(folder.path).without_heads()  # Compares checksums.
            return StudentTeacher(student, student.mask_embedding, name=folder.name, device=device)
        portable = "model" in described or "model_type" in described
        tree = described.get("model", described.get("student"))
        if not isinstance(tree, dict):
            raise TeacherError(
                f"{folder.name} does not describe a student: its config.json has no configuration of one"
            )
        try:
            config = _config_of(tree) if portable else StudentConfig.model_validate(tree)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise TeacherError(f"{folder.name} does not describe a student ({first['loc']} {first['msg']})") from error
        except (TypeError, KeyError) as error:
            raise TeacherError(f"{folder.name} does not describe a student ({error!r})") from error
        weights = _weights_of(folder)
        has_mask = "mask_embedding" in weights
        weights.setdefault("mask_embedding", torch.zeros(config.encoder_embed_dim))
        student = student_with_weights(config.without_heads(), weights, folder.path)
    return StudentTeacher(student, student.mask_embedding if has_mask else None, name=folder.name, device=device)


def _config_of(portable: Mapping[str, Any]) -> StudentConfig:
    """Return the configuration of a student whose export has the configuration of a `PortableStudent`."""
    known = {name: value for name, value in portable.items() if name in StudentConfig.model_fields}
    reuses = tuple(bool(reused) for reused in portable["reuses"])
    return StudentConfig.model_validate(
        known | {"encoder_layers": len(reuses), "attention_reuse": reuses, "heads": "none"}
    )


def _weights_of(folder: HuggingFaceFolder) -> dict[str, Tensor]:
    """Return the weights by the names of a student without heads."""
    upstream = folder.path / "weights.pt"
    state = load_untrusted(upstream) if "model" in folder.config and upstream.is_file() else folder.weights()
    weights: dict[str, Tensor] = {}
    for full_key, value in state.items():
        key = full_key.removeprefix("student.")
        if key == "masked_spec_embed":
            key = "mask_embedding"
        if key == "position.conv.weight":  # Exports store the product of the weight norm.
            weights["position.conv.parametrizations.weight.original0"] = value.norm(dim=(0, 1), keepdim=True)
            weights["position.conv.parametrizations.weight.original1"] = value
        elif not key.startswith(HEAD_WEIGHTS):
            weights[key] = value
    return weights
