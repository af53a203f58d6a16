"""Prediction heads of one more teacher, of the same kind as the student's own."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.model.scaled_gradient import scale_gradient
from ray_distill.student.model.student_config import StudentConfig


class TeacherHeads(nn.Module):
    """Linear heads that predict the layers of a teacher beside the one that the student's own heads predict.

    Initial values are PyTorch's default, as those of the student's heads.

    Args:
        config: Architecture of the student, with ``layerwise`` or ``split`` heads.
        layers: Number of the teacher's layers.
        dim: Width D of the teacher.
    """

    def __init__(self, config: StudentConfig, layers: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        width = inner = config.encoder_embed_dim
        self.split: nn.Linear | None = None
        if config.heads == "split":
            inner = config.split_dim or width
            self.split = nn.Linear(width, inner * layers)
        self.heads = nn.ModuleList(nn.Linear(inner, dim) for _ in range(layers))
        self._scales_gradient = config.layer_grad_scale

    def inputs(self, head_inputs: Sequence[Tensor], last: Tensor) -> list[Tensor]:
        """Return each head's input.

        Args:
            head_inputs: Inputs (B, T, .) of the student's own heads; with one head for each layer, those of these heads too.
            last: (B, T, d) float, output of the last layer.
        """
        if self.split is None:
            return list(head_inputs)
        # The gradient of the last layer of N is scaled as for the student's own heads: by 1 - 1/2.
        x = scale_gradient(last, 0.5) if self._scales_gradient else last
        return list(F.gelu(self.split(x)).chunk(len(self.heads), -1))
