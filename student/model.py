"""The ARMHuBERT student: convolutional front end, Transformer with attention-map reuse, one head per layer.

Shape suffixes: B batch, S samples, C channels, T frames, L layers, d student width, D teacher width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from student.attention import Attention, AttentionMap
from student.config import StudentConfig
from student.convolution import gelu_convolution
from student.dropout import Dropout
from teacher_cache.frames import conv_output_length, group_norm_over_real, padding_mask


class StudentOutput(NamedTuple):
    """What a student gives for a batch; values at padded frames are finite and mean nothing.

    Attributes:
        hidden_states: (B, L, T, d) float, output of each Transformer layer.
        projections: (B, L, T, D) float, each layer's head: its guess of the teacher's layer.
        num_frames: (B,) int64, real frames.
    """

    hidden_states: Tensor
    projections: Tensor
    num_frames: Tensor


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None  # type: ignore[attr-defined]


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, with the gradient that flows back through it multiplied by ``scale``."""
    scaled: Tensor = _ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return scaled


class ConvBlock(nn.Module):
    """GELU (but for the first block), one unpadded convolution, its normalisation if any.

    The published order is convolution, normalisation, GELU; the last block's GELU is the student's to apply. Shifted so, each
    convolution is one step with the GELU before it, which need not be kept for backward.
    """

    def __init__(
        self, inputs: int, channels: int, kernel: int, stride: int, bias: bool, norm: str | None, first: bool
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.first = kernel, stride, first
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: nn.Module | None = None
        if norm == "group_norm":
            self.norm = nn.GroupNorm(channels, channels)
        elif norm == "layer_norm":
            self.norm = nn.LayerNorm(channels)

    def forward(self, x_BSC: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, C), (B,) → (B, S', C'), (B,)."""
        x = gelu_convolution(x_BSC, self.conv.weight, self.conv.bias, self.stride, gelu=not self.first)
        lengths = conv_output_length(lengths_B, [(self.kernel, self.stride)])
        if isinstance(self.norm, nn.GroupNorm):
            norm = self.norm
            x = group_norm_over_real(x.transpose(1, 2), lengths, norm.weight, norm.bias, norm.eps).transpose(1, 2)
        elif self.norm is not None:
            x = self.norm(x)
        return x, lengths


class PositionConv(nn.Module):
    """Convolutional position embedding with weight normalisation over the kernel, as in wav2vec 2.0."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, mean=0, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)
        self.surplus = 1 - kernel % 2

    def forward(self, x_BTd: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d); padded frames must be zeros."""
        x = self.conv(x_BTd.transpose(1, 2))
        return F.gelu(x[..., : x.shape[-1] - self.surplus]).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Post-norm Transformer layer."""

    def __init__(self, config: StudentConfig, reuses: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.attention = Attention(config, reuses)
        self.attention_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.down = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def forward(
        self, x_BTd: Tensor, attended: Tensor | None, shared: AttentionMap | None
    ) -> tuple[Tensor, AttentionMap]:
        """As `Attention.forward`."""
        mixed, shared = self.attention(x_BTd, attended, shared)
        x = self.attention_norm(x_BTd + self.dropout(mixed))
        inner = self.activation_dropout(F.gelu(self.up(x)))
        return self.final_norm(x + self.dropout(self.down(inner))), shared


class Student(nn.Module):
    """The student network.

    Example:
        >>> student = Student(StudentConfig())
        >>> out = student(torch.randn(2, 16_000), torch.tensor([16_000, 12_000]))
        >>> out.projections.shape
        torch.Size([2, 12, 49, 768])

    Initialisation as published: convolutions Kaiming normal; position convolution normal with standard deviation
    sqrt(4 / (kernel * width)); linear layers inside the encoder normal(0, 0.02) with zero bias; projection and heads
    PyTorch's default; mask embedding uniform(0, 1).

    Attributes:
        config: what it is.
        checkpoint_activations: where gradients are wanted, keep only what each encoder layer gives, and compute the rest
            again in backward: for batches that would not fit. Default False.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        width = config.encoder_embed_dim
        blocks = []
        inputs = 1
        for number, (channels, kernel, stride) in enumerate(config.conv_layers):
            norm = config.conv_norm if config.conv_norm == "layer_norm" or number == 0 else None
            blocks.append(ConvBlock(inputs, channels, kernel, stride, config.conv_bias, norm, number == 0))
            inputs = channels
        self.conv_blocks = nn.ModuleList(blocks)
        self.feature_norm = nn.LayerNorm(inputs)
        self.projection = nn.Linear(inputs, width) if inputs != width else nn.Identity()
        self.input_dropout = Dropout(config.dropout_input)
        self.mask_embedding = nn.Parameter(torch.empty(width).uniform_())
        self.position = PositionConv(width, config.conv_pos, config.conv_pos_groups)
        self.encoder_norm = nn.LayerNorm(width)
        self.encoder_dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList([EncoderLayer(config, reuses) for reuses in config.reuses])
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)
        self.heads = nn.ModuleList(
            nn.Linear(width, config.target_dim) if width != config.target_dim else nn.Identity() for _ in config.reuses
        )

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Real frames of waveforms of these lengths; same shape, at least 0."""
        return conv_output_length(lengths, [(kernel, stride) for _, kernel, stride in self.config.conv_layers])

    def forward(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None = None) -> StudentOutput:
        """Hidden states and the heads' projections of a padded batch.

        Args:
            waveforms: (B, S) float32 at 16 kHz; padding may hold anything finite.
            lengths: (B,) int64, real samples.
            frame_mask: (B, T) bool, True where a frame becomes the mask embedding; None masks nothing.

        Raises:
            ValueError: shapes that don't fit, or a waveform too short for one frame.
        """
        layers, seen, num_frames = self.layer_outputs(waveforms, lengths, frame_mask)
        projections = torch.stack([head(x) for head, x in zip(self.heads, seen, strict=True)], dim=1)
        return StudentOutput(torch.stack(layers, dim=1), projections, num_frames)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, T, d) and num_frames (B,), without the heads: what the service needs."""
        layers, _, num_frames = self.layer_outputs(waveforms, lengths)
        return torch.stack(layers, dim=1), num_frames

    def layer_outputs(
        self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As `forward`, one by one: each layer's output (B, T, d), the same as its head sees it, and real frames (B,).

        What a head sees differs in its gradient only (``layer_grad_scale``).
        """
        if waveforms.ndim != 2 or lengths.shape != waveforms.shape[:1]:
            raise ValueError(
                f"waveforms must be (B, S) and lengths (B,), not {tuple(waveforms.shape)} and {tuple(lengths.shape)}"
            )
        if not waveforms.is_floating_point() or lengths.is_floating_point():
            raise ValueError(f"waveforms must be float and lengths int, not {waveforms.dtype} and {lengths.dtype}")
        samples = lengths.tolist()  # On a GPU, the one wait that the checks and the choice of a padding mask cost.
        if not samples:
            raise ValueError("the batch holds no waveform; give at least one")
        if min(samples) < self.config.receptive_field or max(samples) > waveforms.shape[1]:
            raise ValueError(
                f"lengths must be from {self.config.receptive_field} samples (one frame) to the batch's "
                f"{waveforms.shape[1]}, not {samples}"
            )
        num_frames = self.num_frames(lengths)
        x, real = waveforms[..., None], lengths
        for block in self.conv_blocks:
            x, real = block(x, real)
        x = self.input_dropout(self.projection(self.feature_norm(F.gelu(x))))
        if frame_mask is not None:
            if frame_mask.shape != x.shape[:2] or frame_mask.dtype != torch.bool:
                raise ValueError(
                    f"frame_mask must be bool of shape {tuple(x.shape[:2])}, not {frame_mask.dtype} of {tuple(frame_mask.shape)}"
                )
            x = torch.where(frame_mask[..., None], self.mask_embedding.to(x.dtype), x)
        attended = None
        if min(samples) < waveforms.shape[1]:
            padded = padding_mask(num_frames, x.shape[1])
            x = x.masked_fill(padded[..., None], 0)
            attended = ~padded[:, None, None]
        x = self.encoder_dropout(self.encoder_norm(x + self.position(x)))
        count = self.config.encoder_layers
        layers, heads = [], []
        shared: AttentionMap | None = None
        for number, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, shared = checkpoint(layer, x, attended, shared, use_reentrant=False)
            else:
                x, shared = layer(x, attended, shared)
            seen = x
            if self.config.layer_grad_scale:
                # The published rule: layer i of N passes on g of its gradient, the head's part takes a further 1 - g.
                scale = (count - number) / (count - number + 1)
                x = scale_gradient(x, scale)
                seen = scale_gradient(x, 1 - scale)
            layers.append(x)
            heads.append(seen)
        return layers, heads, num_frames
