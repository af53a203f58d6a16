"""Students: model, objectives, training, checkpoints and exporters.

The names below are imported on first use, so that importing this package does not import PyTorch.

Example:
    >>> from ray_distill.student import load_student
    >>> student = load_student("runs/demo")
    >>> hidden_states = student(torch.randn(1, 16_000)).hidden_states
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_distill.student.checkpoints import load_student, save_student
    from ray_distill.student.model.student import Student, StudentOutput
    from ray_distill.student.model.student_config import StudentConfig
    from ray_distill.student.objectives.layer_loss import distillation_loss
    from ray_distill.student.objectives.objective import DistillationLoss
    from ray_distill.student.training.spec_augment import SpecAugment
    from ray_distill.student.training.train_settings import TrainSettings

_MODULES = {
    "DistillationLoss": "objectives.objective",
    "SpecAugment": "training.spec_augment",
    "Student": "model.student",
    "StudentConfig": "model.student_config",
    "StudentOutput": "model.student",
    "TrainSettings": "training.train_settings",
    "distillation_loss": "objectives.layer_loss",
    "load_student": "checkpoints",
    "save_student": "checkpoints",
}

__all__ = [
    "DistillationLoss",
    "SpecAugment",
    "Student",
    "StudentConfig",
    "StudentOutput",
    "TrainSettings",
    "distillation_loss",
    "load_student",
    "save_student",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
