"""The student: model, loss, checkpoints. Training (`training.training_loop`, `training.ray_training`) is imported by name."""

from ray_distill.student.checkpoints import load_student, save_student
from ray_distill.student.model.student import Student, StudentOutput
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.layer_loss import DistillationLoss, distillation_loss

__all__ = [
    "DistillationLoss",
    "Student",
    "StudentConfig",
    "StudentOutput",
    "distillation_loss",
    "load_student",
    "save_student",
]
