"""The ARMHuBERT student: convolutional front end, Transformer with attention-map reuse, one head per layer.

Shape suffixes: B batch, S samples, C channels, T frames, L layers, d student width, D teacher width, H heads.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.config import StudentConfig
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
    """One unpadded convolution, its normalisation if any, GELU."""

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, bias: bool, norm: str | None) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: nn.Module | None = None
        if norm == "group_norm":
            self.norm = nn.GroupNorm(channels, channels)
        elif norm == "layer_norm":
            self.norm = nn.LayerNorm(channels)

    def forward(self, x_BCS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, S), (B,) → (B, C', S'), (B,)."""
        x = self.conv(x_BCS)
        lengths = conv_output_length(lengths_B, [(self.kernel, self.stride)])
        if isinstance(self.norm, nn.GroupNorm):
            x = group_norm_over_real(x, lengths, self.norm.weight, self.norm.bias, self.norm.eps)
        elif self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(x), lengths


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


class AttentionMap(NamedTuple):
    """What decides a softmaxed attention map, without the (T, T) map itself: queries and keys, each (B, H, T, d/H)."""

    queries: Tensor
    keys: Tensor


class Attention(nn.Module):
    """Self-attention that computes its own map, or applies an earlier layer's to its own values.

    A reused map is softmax(QK^T) of an earlier layer, so calling attention again with that layer's Q and K and this
    layer's V gives the same numbers. Dropout applies only where the map is computed.
    """

    def __init__(self, config: StudentConfig, reuses: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.heads = config.encoder_attention_heads
        self.reuses = reuses
        self.second_softmax = config.reuse_behaviour == "released"
        self.dropout = config.attention_dropout
        if not reuses:
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def _split(self, x_BTd: Tensor) -> Tensor:
        return x_BTd.view(*x_BTd.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(
        self, x_BTd: Tensor, attended: Tensor | None, shared: AttentionMap | None
    ) -> tuple[Tensor, AttentionMap]:
        """``attended``: (B, 1, 1, T) bool, False at padding, or None. Returns (B, T, d) and the map for later layers."""
        if not self.reuses:
            shared = AttentionMap(self._split(self.query(x_BTd)), self._split(self.key(x_BTd)))
        assert shared is not None
        values = self._split(self.value(x_BTd))
        if self.reuses and self.second_softmax:
            scores = shared.queries @ shared.keys.transpose(-1, -2) / math.sqrt(shared.keys.shape[-1])
            for _ in range(2):
                if attended is not None:
                    scores = scores.masked_fill(~attended, float("-inf"))
                scores = scores.softmax(-1)
            mixed = scores @ values
        else:
            rate = self.dropout if self.training and not self.reuses else 0.0
            mixed = F.scaled_dot_product_attention(shared.queries, shared.keys, values, attended, rate)
        return self.out(mixed.transpose(1, 2).flatten(2)), shared


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
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

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
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder_embed_dim
        blocks = []
        inputs = 1
        for number, (channels, kernel, stride) in enumerate(config.conv_layers):
            norm = config.conv_norm if config.conv_norm == "layer_norm" or number == 0 else None
            blocks.append(ConvBlock(inputs, channels, kernel, stride, config.conv_bias, norm))
            inputs = channels
        self.conv_blocks = nn.ModuleList(blocks)
        self.feature_norm = nn.LayerNorm(inputs)
        self.projection = nn.Linear(inputs, width) if inputs != width else nn.Identity()
        self.input_dropout = nn.Dropout(config.dropout_input)
        self.mask_embedding = nn.Parameter(torch.empty(width).uniform_())
        self.position = PositionConv(width, config.conv_pos, config.conv_pos_groups)
        self.encoder_norm = nn.LayerNorm(width)
        self.encoder_dropout = nn.Dropout(config.dropout)
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
        layers, heads, num_frames = self._encode(waveforms, lengths, frame_mask)
        projections = torch.stack([head(x) for head, x in zip(self.heads, heads, strict=True)], dim=1)
        return StudentOutput(torch.stack(layers, dim=1), projections, num_frames)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, T, d) and num_frames (B,), without the heads: what the service needs."""
        layers, _, num_frames = self._encode(waveforms, lengths, None)
        return torch.stack(layers, dim=1), num_frames

    def _encode(
        self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Each layer's output, the same as the heads see it (gradient scaling), and real frames."""
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
        x, real = waveforms[:, None], lengths
        for block in self.conv_blocks:
            x, real = block(x, real)
        x = self.input_dropout(self.projection(self.feature_norm(x.transpose(1, 2))))
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
