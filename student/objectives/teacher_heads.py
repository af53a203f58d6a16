"""Prediction heads of one more teacher, of the same kind as the student's own."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student.model.scaled_gradient import scale_gradient
from ray_distill.student.model.student_config import StudentConfig


class TeacherHeads(nn.Module):
    """Heads that predict the layers of a teacher beside the one that the student's own heads predict.

    Initial values are PyTorch's default, as those of the student's heads.

    Args:
        config: Architecture of the student, with ``layerwise`` or ``split`` heads. Only linear ``layerwise`` heads go with a time
            reduction.
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
        self.inner_heads = nn.ModuleList()
        if config.head_dim is not None:
            inner = config.head_dim
            self.inner_heads.extend(nn.Linear(width, inner) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(inner, dim) for _ in range(layers))
        self._activation = getattr(F, config.head_activation)
        self._layers = config.layers_with_heads
        # The gradient of a head on layer n of N is scaled as for the student's own heads.
        count = config.encoder_layers
        self._scales = [1 / (count - layer + 2) if config.layer_grad_scale else 1.0 for layer in self._layers]

    def inputs(self, head_inputs: Sequence[Tensor], layers: Sequence[Tensor]) -> list[Tensor]:
        """Return each head's input.

        Args:
            head_inputs: Inputs (B, T, .) of the student's own heads. Linear heads on layers have the same.
            layers: Outputs (B, T, d) of the student's layers.
        """
        if self.split is None and not self.inner_heads:
            return list(head_inputs)
        read = [layers[layer - 1] for layer in self._layers]
        read = [x if scale == 1 else scale_gradient(x, scale) for x, scale in zip(read, self._scales, strict=True)]
        if self.split is not None:
            return list(F.gelu(self.split(read[0])).chunk(len(self.heads), -1))
        return [self._activation(inner(x)) for inner, x in zip(self.inner_heads, read, strict=True)]
