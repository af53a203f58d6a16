"""A linear layer whose inputs and output can be multiplied by gates, for pruning."""

import torch.nn.functional as F
from torch import Tensor, nn


class GatedLinear(nn.Linear):
    """`torch.nn.Linear`, with gates while a student is pruned. The gates scale the weights, which takes no memory for activations.

    Attributes:
        input_gate: (inputs,) float, factor of each input; None without pruning.
        output_gate: () float, factor of the bias; None without pruning.
    """

    input_gate: Tensor | None = None
    output_gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if self.input_gate is None or self.output_gate is None:
            return super().forward(x)
        return F.linear(x, self.weight * self.input_gate, self.bias * self.output_gate)
