"""The student: model, loss, checkpoints. Training (`student.training`, `student.ray_training`) is imported by name."""

from student.checkpoints import load_student, save_student
from student.config import StudentConfig
from student.loss import DistillationLoss, distillation_loss
from student.model import Student, StudentOutput

__all__ = [
    "DistillationLoss",
    "Student",
    "StudentConfig",
    "StudentOutput",
    "distillation_loss",
    "load_student",
    "save_student",
]
