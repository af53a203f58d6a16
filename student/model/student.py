"""The student network (ARMHuBERT): convolutional front end, encoder with attention-map reuse, prediction heads.

Shape suffixes: B batch, S samples, C channels, T frames, L layers, P predictions, d student width, D teacher width.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_distill.student.model.attention import AttentionMap
from ray_distill.student.model.conformer import ConformerLayer
from ray_distill.student.model.convolution import ConvBlock
from ray_distill.student.model.dropout import Dropout
from ray_distill.student.model.patch_embedding import PatchEmbedding
from ray_distill.student.model.position_encoding import DeepPositionConv, PositionConv
from ray_distill.student.model.scaled_gradient import scale_gradient
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.model.time_reduction import TimeReduction, Upsampler, repeat_frames
from ray_distill.student.model.transformer import TransformerLayer
from ray_distill.teacher_cache.frames import padding_mask

Lengths = Tensor | Sequence[int]
"""Numbers of samples (B,): an integer tensor, or integers on the host."""
HEAD_WEIGHTS = ("split.", "inner_heads.", "heads.", "upsamplers.")
"""Prefixes of the names of the heads' weights."""


class StudentOutput(NamedTuple):
    """Output of a student for a batch. Values at padded frames are finite and meaningless.

    Attributes:
        hidden_states: (B, L, T, d) float, output of each encoder layer; `layer` selects one. After a time reduction, each
            reduced frame is repeated for all the frames it was made from.
        projections: (B, P, T, D) float, output of each head: its prediction of a teacher layer. P is L with one head per
            layer, and 0 without heads.
        num_frames: (B,) int64, real frames.
    """

    hidden_states: Tensor
    projections: Tensor
    num_frames: Tensor

    def layer(self, number: int) -> Tensor:
        """Return the output (B, T, d) of encoder layer ``number``, from 1 to L.

        Layers are numbered everywhere as in the teacher and in Hugging Face's ``hidden_states``: k is the output of layer k
        and 0 the encoder's input, which only exported students return. Layer k has index k - 1 in ``hidden_states`` here.

        Raises:
            ValueError: no such layer.
        """
        if not 1 <= number <= self.hidden_states.shape[1]:
            raise ValueError(f"the student has layers 1 to {self.hidden_states.shape[1]}, not {number}")
        return self.hidden_states[:, number - 1]


class Student(nn.Module):
    """The student network.

    Weights are initialised as published: convolutions Kaiming normal; position convolution normal with standard deviation
    sqrt(4 / (kernel * width)); linear layers inside the encoder normal(0, 0.02) with zero bias; projection and heads by
    PyTorch's default; mask embedding uniform(0, 1).

    Args:
        config: Architecture.

    Attributes:
        config: Architecture.
        compile_layers: Whether training compiles the encoder layers. One program serves all layers of a kind (those that compute an
            attention map, and those that reuse one) and all sizes of batches; the weights keep their names. Default False.
        checkpoint_activations: Whether training recomputes each encoder layer in the backward pass instead of storing its
            activations, which takes less memory and more time. Default False.

    Example:
        >>> student = Student(StudentConfig())
        >>> out = student(torch.randn(2, 16_000), torch.tensor([16_000, 12_000]))
        >>> out.hidden_states.shape, out.projections.shape
        (torch.Size([2, 12, 49, 432]), torch.Size([2, 12, 49, 768]))
        >>> out.layer(9).shape
        torch.Size([2, 49, 432])
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = self.compile_layers = False
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
        self.feature_norm = nn.LayerNorm(inputs) if config.feature_norm else nn.Identity()
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
        self.layers = nn.ModuleList(
            ConformerLayer(config, reuses)
            if config.layer_type == "conformer"
            else TransformerLayer(config, reuses, heads, ffn_dim)
            for reuses, heads, ffn_dim in zip(
                config.reuses, config.heads_of_layers, config.ffn_dims_of_layers, strict=True
            )
        )
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
        self.inner_heads = nn.ModuleList()
        if config.head_dim is not None:
            inner = config.head_dim
            self.inner_heads.extend(nn.Linear(width, inner) for _ in range(count))
        self.heads = nn.ModuleList(
            nn.Linear(inner, config.target_dim)
            if self.split is not None or config.head_dim is not None or inner != config.target_dim
            else nn.Identity()
            for _ in range(count)
        )
        self.reduction: TimeReduction | None = None
        self.upsamplers = nn.ModuleDict()
        if config.time_reduction is not None:
            self.reduction = TimeReduction(width, config.time_reduction, config.time_reduction_factor)
            # One for each layer that a head uses, by its index.
            for layer in config.layers_with_heads:
                if layer > config.time_reduction_index:
                    self.upsamplers[str(layer - 1)] = Upsampler(width, config.time_reduction_factor)

    def without_heads(self) -> "Student":
        """Return a copy without heads, for inference (published ``delete_projections``)."""
        student = Student(self.config.without_heads())
        names = student.state_dict().keys()
        student.load_state_dict({name: tensor for name, tensor in self.state_dict().items() if name in names})
        return student.train(self.training)

    def extra_repr(self) -> str:
        config = self.config
        front_end = "patches" if config.patches is not None else f"{len(config.conv_layers)} convolutions"
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"{front_end}, {config.encoder_layers} {config.layer_type} layers of width {config.encoder_embed_dim} "
            f"({sum(config.reuses)} reuse attention maps), {len(self.heads)} heads of width {config.target_dim}, "
            f"{parameters:,} parameters"
        )

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Return the number of real frames of waveforms of these lengths; same shape, at least 0."""
        return self.config.num_frames(lengths)

    def forward(
        self, waveforms: Tensor, lengths: Lengths | None = None, frame_mask: Tensor | None = None
    ) -> StudentOutput:
        """Return the hidden states and the heads' projections of a padded batch.

        Args:
            waveforms: (B, S) float, 16 kHz, in [-1, 1]; padding may hold any finite values.
            lengths: (B,) integer, real samples of each row: a tensor on any device, or numbers on the host, with which the host
                does not wait for a GPU. Default None: S for all rows.
            frame_mask: (B, T) bool, True where a frame is replaced by the mask embedding. Default None: no masking.

        Returns:
            Hidden states (B, L, T, d), projections (B, P, T, D) and the number of real frames (B,); see `StudentOutput`.

        Raises:
            ValueError: a shape or dtype that does not fit, or a waveform too short for one frame.
        """
        layers, head_inputs, num_frames = self.layer_outputs(waveforms, lengths, frame_mask)
        return StudentOutput(torch.stack(layers, dim=1), self.project(head_inputs, layers[0]), num_frames)

    def project(self, head_inputs: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return the projections (B, P, T, D) of the heads' inputs, (B, T, .) each.

        Without heads P is 0, and batch size, number of frames and dtype are those of ``like``, (B, T, .).
        """
        if not self.heads:
            return like.new_empty(len(like), 0, like.shape[1], self.config.target_dim)
        return torch.stack([head(x) for head, x in zip(self.heads, head_inputs, strict=True)], dim=1)

    def encode(
        self, waveforms: Tensor, lengths: Lengths | None = None, num_layers: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states (B, L, T, d) and num_frames (B,), without computing projections; see `forward`.

        With ``num_layers``, L is that number, and higher layers are not computed; see `layer_outputs`.
        """
        layers, _, num_frames = self.layer_outputs(waveforms, lengths, num_layers=num_layers)
        return torch.stack(layers, dim=1), num_frames

    def layer_outputs(
        self,
        waveforms: Tensor,
        lengths: Lengths | None = None,
        frame_mask: Tensor | None = None,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        num_layers: int | None = None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return each layer's output (B, T, d), each head's input (B, T, .), and the number of real frames (B,).

        The input of a head on a layer is the layer's output with a scaled gradient (``layer_grad_scale``); after a
        time reduction, its T frames also come from an `Upsampler`. Without heads it is the layer's output.

        Args:
            waveforms, lengths, frame_mask: As for `forward`.
            augment: Function of the projected features (B, T, d) and the number of real frames (B,), on the host, that returns
                augmented features; applied before masking. Default None: no augmentation.
            num_layers: Number of layers to compute, from the first. The result holds the same values as that of all layers; with
                fewer than all, there are inputs of heads only for heads on layers. Default None: all.

        Raises:
            ValueError: as for `forward`, or there are not so many layers.
        """
        if num_layers is not None and not 1 <= num_layers <= self.config.encoder_layers:
            raise ValueError(f"num_layers must be from 1 to {self.config.encoder_layers}, not {num_layers}")
        if not isinstance(waveforms, Tensor):
            raise ValueError(
                f"waveforms must be a float tensor (B, S), not of the type {type(waveforms).__name__}; "
                "torch.from_numpy makes one of an array"
            )
        given = None if lengths is None else tuple(lengths.shape) if isinstance(lengths, Tensor) else (len(lengths),)
        if waveforms.ndim != 2 or given not in (None, tuple(waveforms.shape[:1])):
            raise ValueError(f"waveforms must be (B, S) and lengths (B,), not {tuple(waveforms.shape)} and {given}")
        if not waveforms.is_floating_point() or (isinstance(lengths, Tensor) and lengths.is_floating_point()):
            kind = lengths.dtype if isinstance(lengths, Tensor) else "int"
            raise ValueError(f"waveforms must be float and lengths integer, not {waveforms.dtype} and {kind}")
        if isinstance(lengths, Tensor):
            samples = lengths.tolist()  # For the checks. With lengths on a GPU, the host waits for it here.
            lengths = lengths.to(waveforms.device)
        else:
            samples = [waveforms.shape[1]] * len(waveforms) if lengths is None else list(lengths)
            lengths = torch.tensor(samples, dtype=torch.int64).to(waveforms.device, non_blocking=True)
        if not samples:
            raise ValueError("the batch has no waveforms; give at least one")
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
            x = augment(x, self.num_frames(torch.tensor(samples)))
        if frame_mask is not None:
            if frame_mask.shape != x.shape[:2] or frame_mask.dtype != torch.bool:
                raise ValueError(
                    f"frame_mask must be bool of shape {tuple(x.shape[:2])}, not {frame_mask.dtype} of {tuple(frame_mask.shape)}"
                )
            x = torch.where(frame_mask[..., None], self.mask_embedding.to(x.dtype), x)
        if self.patches is not None:
            x = self.patches.add_row_embedding(x)
        padded = None
        if min(samples) < waveforms.shape[1]:
            padded = padding_mask(num_frames, x.shape[1])[..., None]
            x = x.masked_fill(padded, 0)
        if self.position is not None:
            x = x + self.position(x, padded)
        x = self.encoder_dropout(x if self.config.layer_norm_first else self.encoder_norm(x))
        layers, head_inputs = self._encode(x, padded, num_frames, num_layers)
        return layers, head_inputs, num_frames

    def _encode(
        self, x: Tensor, padded: Tensor | None, num_frames: Tensor, num_layers: int | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the layers' outputs and the heads' inputs.

        Args:
            x: (B, T, d) float, input of the encoder.
            padded: (B, T, 1) bool, True at padding; None if nothing is padded.
            num_frames: (B,) integer, real frames.
            num_layers: Number of layers to compute; None for all.
        """
        config, count, frames = self.config, self.config.encoder_layers, x.shape[1]
        attention_mask = _attention_mask(padded)
        layers, head_inputs = [], []
        previous_map: AttentionMap | None = None
        run = compiled_layer() if self.compile_layers and self.training else _run_layer
        for number, layer in enumerate(self.layers[:num_layers]):
            if self.reduction is not None and number == config.time_reduction_index:
                x = self.reduction(x, padded)
                if padded is not None:
                    reduced_frames = self.reduction.num_frames(num_frames)
                    attention_mask = _attention_mask(padding_mask(reduced_frames, x.shape[1])[..., None])
            layer_input = x
            reused = previous_map if config.reuses[number] else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, previous_map = checkpoint(run, layer, x, attention_mask, reused, use_reentrant=False)
            else:
                x, previous_map = run(layer, x, attention_mask, reused)
            if config.layer_drop and self.training:
                # The layer is always computed: DDP needs all parameters in the graph, and later layers may reuse its map.
                x = torch.where(torch.rand((), device=x.device) < config.layer_drop, layer_input, x)
            if config.layer_norm_first and number == count - 1:
                x = self.encoder_norm(x)
            head_input = x
            if config.layer_grad_scale:
                # Published: the gradient of layer i of N is scaled by g, and the head's part of it by a further 1 - g.
                scale = (count - number) / (count - number + 1)
                x = scale_gradient(x, scale)
                head_input = scale_gradient(x, 1 - scale)
            reduced = self.reduction is not None and number >= config.time_reduction_index
            layers.append(repeat_frames(x, config.time_reduction_factor, frames) if reduced else x)
            if str(number) in self.upsamplers:
                head_input = self.upsamplers[str(number)](head_input, frames)
            elif reduced:
                head_input = repeat_frames(head_input, config.time_reduction_factor, frames)
            head_inputs.append(head_input)
        if self.split is not None:
            is_last = len(layers) == count
            head_inputs = list(F.gelu(self.split(head_inputs[-1])).chunk(config.split_heads, -1)) if is_last else []
        elif config.head_layers is not None:
            head_inputs = [head_inputs[layer - 1] for layer in config.head_layers if layer <= len(layers)]
        if self.inner_heads:
            activation = getattr(F, config.head_activation)
            head_inputs = [activation(inner(x)) for inner, x in zip(self.inner_heads, head_inputs)]  # noqa: B905 (fewer layers)
        return layers, head_inputs


def _run_layer(
    layer: nn.Module, x: Tensor, attention_mask: Tensor | None, previous_map: AttentionMap | None
) -> tuple[Tensor, AttentionMap | None]:
    result: tuple[Tensor, AttentionMap | None] = layer(x, attention_mask, previous_map)
    return result


@cache
def compiled_layer() -> Callable[..., tuple[Tensor, AttentionMap | None]]:
    """Return the compiled form of a layer's forward pass, with the layer as its first argument."""
    # The layers of a pruned student differ in their widths, and each width needs a program. PyTorch's own limit is 8.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 128)
    return torch.compile(_run_layer, dynamic=True)


def _attention_mask(padded: Tensor | None) -> Tensor | None:
    """Turn padding (B, T, 1) bool, True at padding, into an attention mask (B, 1, 1, T) bool, False at padding."""
    return None if padded is None else ~padded[:, None, None, :, 0]
