"""The ARMHuBERT student: convolutional front end, Transformer with attention-map reuse, one head per layer.

Shape suffixes: B batch, S samples, C channels, T frames, L layers, P predictions, d student width, D teacher width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_distill.student.model.attention import Attention, AttentionMap
from ray_distill.student.model.conformer import ConformerLayer
from ray_distill.student.model.convolution import gelu_convolution
from ray_distill.student.model.dropout import Dropout
from ray_distill.student.model.patch_embedding import PatchEmbedding
from ray_distill.student.model.position_encoding import DeepPositionConv, PositionConv
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.model.time_reduction import TimeReduction, Upsampler, repeated
from ray_distill.teacher_cache.frames import conv_output_length, group_norm_over_real, padding_mask


class StudentOutput(NamedTuple):
    """What a student gives for a batch; values at padded frames are finite and mean nothing.

    Attributes:
        hidden_states: (B, L, T, d) float, output of each encoder layer. After a time reduction each reduced frame stands at all
            the frames it was made from.
        projections: (B, P, T, D) float, what each head gives: its guess of a layer of the teacher. P is L with a head for each
            layer, 0 without heads.
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


class EncoderLayer(nn.Module):
    """Transformer layer, normalised after each part, or before it (``layer_norm_first``)."""

    def __init__(self, config: StudentConfig, reuses: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.norm_first = config.layer_norm_first
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
        mixed, shared = self.attention(self.attention_norm(x_BTd) if self.norm_first else x_BTd, attended, shared)
        x = x_BTd + self.dropout(mixed)
        if not self.norm_first:
            x = self.attention_norm(x)
        inner = self.activation_dropout(F.gelu(self.up(self.final_norm(x) if self.norm_first else x)))
        x = x + self.dropout(self.down(inner))
        return x if self.norm_first else self.final_norm(x), shared


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
        self.patches: PatchEmbedding | None = None
        if config.patches is not None:
            self.patches, inputs = PatchEmbedding(config.patches, width), width
        for number, (channels, kernel, stride) in enumerate(() if self.patches is not None else config.conv_layers):
            norm = config.conv_norm if config.conv_norm == "layer_norm" or number == 0 else None
            blocks.append(ConvBlock(inputs, channels, kernel, stride, config.conv_bias, norm, number == 0))
            inputs = channels
        self.conv_blocks = nn.ModuleList(blocks)
        self.feature_norm = nn.LayerNorm(inputs)
        self.projection = nn.Linear(inputs, width) if inputs != width else nn.Identity()
        self.input_dropout = Dropout(config.dropout_input)
        self.mask_embedding = nn.Parameter(torch.empty(width).uniform_())
        self.position: nn.Module | None = None
        if config.position == "convolution" and config.conv_pos_depth > 1:
            self.position = DeepPositionConv(width, config.conv_pos, config.conv_pos_groups, config.conv_pos_depth)
        elif config.position == "convolution":
            self.position = PositionConv(width, config.conv_pos, config.conv_pos_groups)
        self.encoder_norm = nn.LayerNorm(width)
        self.encoder_dropout = Dropout(config.dropout)
        layer_type = ConformerLayer if config.layer_type == "conformer" else EncoderLayer
        self.layers = nn.ModuleList([layer_type(config, reuses) for reuses in config.reuses])
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._add_heads()
        if config.feature_grad_mult == 0:
            (self.conv_blocks if self.patches is None else self.patches).requires_grad_(False)

    def _add_heads(self) -> None:
        config = self.config
        width = inner = config.encoder_embed_dim
        self.split: nn.Module | None = None
        if config.heads == "split":
            inner = config.split_dim or width
            self.split = nn.Linear(width, inner * config.split_heads)
        count = 0 if config.heads == "none" else config.num_predictions
        self.heads = nn.ModuleList(
            nn.Linear(inner, config.target_dim)
            if self.split is not None or inner != config.target_dim
            else nn.Identity()
            for _ in range(count)
        )
        self.reduction: TimeReduction | None = None
        self.upsamplers = nn.ModuleDict()
        if config.time_reduction is not None:
            self.reduction = TimeReduction(width, config.time_reduction, config.time_reduction_factor)
            # By the layer whose output they bring back to 20 ms frames: those that a head sees.
            layers = {
                "layerwise": range(config.time_reduction_index, config.encoder_layers),
                "split": [config.encoder_layers - 1],
                "none": [],
            }[config.heads]
            for layer in layers:
                self.upsamplers[str(layer)] = Upsampler(width, config.time_reduction_factor)

    def without_heads(self) -> "Student":
        """The same student for inference alone: its hidden states, no projections (published ``delete_projections``)."""
        config = self.config.model_copy(update={"heads": "none"})
        student = Student(config)
        kept = student.state_dict().keys()
        student.load_state_dict({name: tensor for name, tensor in self.state_dict().items() if name in kept})
        return student.train(self.training)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Real frames of waveforms of these lengths; same shape, at least 0."""
        return self.config.num_frames(lengths)

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
        return StudentOutput(torch.stack(layers, dim=1), self.project(seen, layers[0]), num_frames)

    def project(self, seen: Sequence[Tensor], like: Tensor) -> Tensor:
        """(B, P, T, D) of what each head sees, (B, T, .); P is 0 without heads, of like's batch, frames and type."""
        if not self.heads:
            return like.new_empty(len(like), 0, like.shape[1], self.config.target_dim)
        return torch.stack([head(x) for head, x in zip(self.heads, seen, strict=True)], dim=1)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, T, d) and num_frames (B,), without the heads: what the service needs."""
        layers, _, num_frames = self.layer_outputs(waveforms, lengths)
        return torch.stack(layers, dim=1), num_frames

    def layer_outputs(
        self,
        waveforms: Tensor,
        lengths: Tensor,
        frame_mask: Tensor | None = None,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As `forward`, one by one: each layer's output (B, T, d), what each head sees (B, T, .), and real frames (B,).

        With a head for each layer, what it sees differs from the layer's output in its gradient only (``layer_grad_scale``), or, after
        a time reduction, in how it is brought back to T frames. Without heads it is the layer's output.

        Args:
            waveforms, lengths, frame_mask: as `forward` takes them.
            augment: changes the projected features (B, T, d), given with the real frames (B,), before masking.
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
        if self.patches is not None:
            x = self.patches(waveforms, lengths)
        else:
            x, real = waveforms[..., None], lengths
            for block in self.conv_blocks:
                x, real = block(x, real)
        x = F.gelu(x)
        if self.config.feature_grad_mult not in (0, 1):
            x = scale_gradient(x, self.config.feature_grad_mult)
        x = self.input_dropout(self.projection(self.feature_norm(x)))
        if augment is not None:
            x = augment(x, num_frames)
        if frame_mask is not None:
            if frame_mask.shape != x.shape[:2] or frame_mask.dtype != torch.bool:
                raise ValueError(
                    f"frame_mask must be bool of shape {tuple(x.shape[:2])}, not {frame_mask.dtype} of {tuple(frame_mask.shape)}"
                )
            x = torch.where(frame_mask[..., None], self.mask_embedding.to(x.dtype), x)
        if self.patches is not None:
            x = self.patches.with_rows(x)
        padded = None
        if min(samples) < waveforms.shape[1]:
            padded = padding_mask(num_frames, x.shape[1])[..., None]
            x = x.masked_fill(padded, 0)
        if self.position is not None:
            x = x + self.position(x, padded)
        x = self.encoder_dropout(x if self.config.layer_norm_first else self.encoder_norm(x))
        layers, seen = self._encoder(x, padded, num_frames)
        return layers, seen, num_frames

    def _encoder(self, x: Tensor, padded: Tensor | None, num_frames: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The layers' outputs, and what heads see; ``padded`` is (B, T, 1) bool or None."""
        config, count, frames = self.config, self.config.encoder_layers, x.shape[1]
        attended = _attended(padded)
        layers, heads = [], []
        shared: AttentionMap | None = None
        for number, layer in enumerate(self.layers):
            if self.reduction is not None and number == config.time_reduction_index:
                x = self.reduction(x, padded)
                if padded is not None:
                    attended = _attended(padding_mask(self.reduction.num_frames(num_frames), x.shape[1])[..., None])
            given = x
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, shared = checkpoint(layer, x, attended, shared, use_reentrant=False)
            else:
                x, shared = layer(x, attended, shared)
            if config.layer_drop and self.training:
                # Every parameter stays in the graph, as distributed training demands; the map is there for later layers.
                x = torch.where(torch.rand((), device=x.device) < config.layer_drop, given, x)
            if config.layer_norm_first and number == count - 1:
                x = self.encoder_norm(x)
            seen = x
            if config.layer_grad_scale:
                # The published rule: layer i of N passes on g of its gradient, the head's part takes a further 1 - g.
                scale = (count - number) / (count - number + 1)
                x = scale_gradient(x, scale)
                seen = scale_gradient(x, 1 - scale)
            reduced = self.reduction is not None and number >= config.time_reduction_index
            layers.append(repeated(x, config.time_reduction_factor, frames) if reduced else x)
            if str(number) in self.upsamplers:
                seen = self.upsamplers[str(number)](seen, frames)
            elif reduced:
                seen = repeated(seen, config.time_reduction_factor, frames)
            heads.append(seen)
        if self.split is not None:
            heads = list(F.gelu(self.split(heads[-1])).chunk(config.split_heads, -1))
        return layers, heads


def _attended(padded: Tensor | None) -> Tensor | None:
    """(B, T, 1) bool, True at padding, to (B, 1, 1, T) bool, False there."""
    return None if padded is None else ~padded[:, None, None, :, 0]
