"""The student computed in the straightforward way, in the style of fairseq, for comparison in `student_step.py`.

It runs with the parameters of a `Student`, so both are the same network. It has a time-major Transformer, explicit (T, T) attention
maps that are kept for reuse, and a loss over stacked projections. Batches must be unpadded, since padding changes the outputs of the
published code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.student import Student
from ray_distill.student.model.scaled_gradient import scale_gradient


class PublishedStudent(nn.Module):
    """A wrapper of a student with behaviour ``paper`` and ``group_norm``, with dropout where the published code applies it.

    Args:
        student: Student that holds the parameters. Its ``training`` flag enables dropout.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        assert student.config.reuse_behaviour == "paper" and student.config.conv_norm == "group_norm"
        self.student = student

    def forward(self, waveforms: Tensor, frame_mask: Tensor) -> Tensor:
        """Return the projections (B, L, T, D) of waveforms (B, S) with a frame mask (B, T)."""
        student, config = self.student, self.student.config
        rate = config.dropout if self.training else 0.0
        x = waveforms[:, None]
        for block in student.conv_blocks:
            x = block.conv(x)
            if block.norm is not None:  # fairseq's Fp32GroupNorm
                x = F.group_norm(x.float(), x.shape[1], block.norm.weight, block.norm.bias, block.norm.eps).type_as(x)
            x = F.gelu(x)
        x = student.input_dropout(student.projection(student.feature_norm(x.transpose(1, 2))))
        x = torch.where(frame_mask[..., None], student.mask_embedding.to(x.dtype), x)
        x = F.dropout(student.encoder_norm(x + student.position(x)), rate, self.training)
        x = x.transpose(0, 1)
        projections, weights = [], None
        for number, layer in enumerate(student.layers):
            mixed, weights = self._attention(layer.attention, x, weights)
            x = layer.attention_norm(x + F.dropout(mixed, rate, self.training))
            inner = F.dropout(F.gelu(layer.up(x)), config.activation_dropout, self.training)
            x = layer.final_norm(x + F.dropout(layer.down(inner), rate, self.training))
            seen = x
            if config.layer_grad_scale:
                scale = (config.encoder_layers - number) / (config.encoder_layers - number + 1)
                x = scale_gradient(x, scale)
                seen = scale_gradient(x, 1 - scale)
            projections.append(student.heads[number](seen).transpose(0, 1))
        return torch.stack(projections, 1)

    def _attention(self, attention: nn.Module, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply attention to (T, B, d). Return (T, B, d) and the attention map (B * heads, T, T) that later layers reuse."""
        frames, batch, width = x.shape
        heads = attention.heads

        def split(y: Tensor) -> Tensor:
            return y.contiguous().view(frames, batch * heads, width // heads).transpose(0, 1)

        values = split(attention.value(x))
        if attention.reuses:
            assert weights is not None
            applied = weights
        else:
            queries = split(attention.query(x) * (width // heads) ** -0.5)
            scores = torch.bmm(queries, split(attention.key(x)).transpose(1, 2))
            weights = F.softmax(scores, -1, dtype=torch.float32).type_as(scores)
            applied = F.dropout(weights, attention.dropout, self.training)
        mixed = torch.bmm(applied, values).transpose(0, 1).reshape(frames, batch, width)
        return attention.out(mixed), weights


def published_loss(projections: Tensor, targets: Tensor) -> Tensor:
    """Return the published loss: squared errors, averaged over D, summed over frames and divided by the number of frames."""
    error = F.mse_loss(projections.float(), targets.float(), reduction="none").mean(-1)
    per_layer = error.sum((0, 2)) / (error.shape[0] * error.shape[2])
    return 0.1 * per_layer[:-1].sum() + per_layer[-1]
