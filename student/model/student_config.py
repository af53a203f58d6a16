"""Architecture of a student: every choice, with ARMHuBERT-S's value as its default."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import numpy as np
import pydantic
import torch

from ray_distill.teacher_cache.frames import Length, conv_output_length
from ray_distill.teacher_cache.patch_geometry import PatchGeometry

ConvLayers = tuple[tuple[int, int, int], ...]

ARMHUBERT_S_CONV_LAYERS: ConvLayers = (
    (128, 10, 5),
    (256, 1, 1),
    *((256, 3, 2),) * 4,
    (432, 1, 1),
    *((432, 2, 2),) * 2,
)


MAX_PARAMETERS = 10**10
"""Largest number of parameters of a student; larger sizes are mistakes."""
MAX_MODULES = 10_000
"""Largest number of layers and convolutions of a student."""


class StudentConfig(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Architecture of a student. Field names follow fairseq's where it has one."""

    conv_layers: ConvLayers = ARMHUBERT_S_CONV_LAYERS
    """(channels, kernel, stride) of each convolution of the front end. Default ARMHuBERT-S's."""
    patches: PatchGeometry | None = None
    """Patch geometry of a log-mel spectrogram, for teachers that use patches in place of frames (AST); replaces the
    convolutions over the waveform. None for frames. A run takes it from the teacher."""
    conv_norm: Literal["group_norm", "layer_norm"] = "group_norm"
    """Normalisation of the front end: ``group_norm`` after the first convolution (HuBERT Base) or ``layer_norm`` after each
    (HuBERT Large)."""
    conv_bias: bool = False
    """Whether the convolutions have a bias."""
    feature_norm: bool = True
    """Whether a LayerNorm follows the convolutions, before the projection to the encoder's width. S3PRL's DistilHuBERT has
    none."""
    encoder_layers: int = pydantic.Field(default=12, ge=1)
    """Number of encoder layers L."""
    encoder_embed_dim: int = pydantic.Field(default=432, ge=1)
    """Width d of the encoder."""
    encoder_ffn_embed_dim: int = pydantic.Field(default=816, ge=1)
    """Width of the feed-forward layers."""
    encoder_attention_heads: int = pydantic.Field(default=12, ge=1)
    """Number of attention heads. It also decides the width of a head, ``encoder_embed_dim / encoder_attention_heads``."""
    layer_heads: tuple[Annotated[int, pydantic.Field(ge=0)], ...] | None = None
    """Number of attention heads of each layer, of the same width as above; 0 for a layer without attention. Pruning makes such
    students. None gives all layers ``encoder_attention_heads``."""
    layer_ffn_dims: tuple[Annotated[int, pydantic.Field(ge=0)], ...] | None = None
    """Width of each layer's feed-forward part; 0 for a layer without one. None gives all layers ``encoder_ffn_embed_dim``."""
    attention_reuse: Literal["none", "alternate"] | tuple[bool, ...] = "alternate"
    """Attention-map reuse: for each layer, True if it reuses the last computed attention map instead of computing its own;
    or ``alternate`` (every second layer reuses), or ``none``. This is the OPPOSITE sign of the published ``reuse_pattern``,
    where True means that a layer computes its own map."""
    reuse_behaviour: Literal["paper", "released"] = "paper"
    """Treatment of a reused map: ``paper`` applies it as it is; ``released`` applies softmax to it a second time, as the code
    that trained the released weights does."""
    layer_grad_scale: bool = True
    """Whether to use the published layer gradient scaling."""
    layer_type: Literal["transformer", "conformer"] = "transformer"
    """Type of the encoder layers."""
    layer_norm_first: bool = False
    """Whether Transformer layers normalise before each part instead of after it (pre-norm). The last layer's output is then
    normalised once more."""
    layer_drop: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Probability of skipping a layer during training (LayerDrop)."""
    depthwise_kernel: int = pydantic.Field(default=31, ge=1)
    """Kernel of a Conformer's depthwise convolution; must be odd."""
    position: Literal["convolution", "relative", "rotary"] = "convolution"
    """Position encoding: ``convolution`` before the encoder (wav2vec 2.0), or in attention ``relative`` (Transformer-XL) or
    ``rotary`` (RoFormer). Their published names are ``abs``, ``rel_pos`` and ``rope``."""
    conv_pos: int = pydantic.Field(default=128, ge=1)
    """Kernel of the position convolution."""
    conv_pos_groups: int = pydantic.Field(default=16, ge=1)
    """Number of groups of the position convolution."""
    conv_pos_depth: int = pydantic.Field(default=1, ge=1)
    """Number of position convolutions; more than one are smaller and applied one after another."""
    time_reduction: Literal["fc1", "fc2", "conv1d"] | None = None
    """Kind of time reduction (see `TimeReduction`). None keeps the frame rate."""
    time_reduction_factor: int = pydantic.Field(default=2, ge=2)
    """Number of frames that are merged into one."""
    time_reduction_index: int = pydantic.Field(default=0, ge=0)
    """Number of layers before the time reduction; the layers after it process the reduced frames."""
    heads: Literal["layerwise", "split", "none"] = "layerwise"
    """Prediction heads: ``layerwise``: each layer's output predicts one teacher layer; ``split`` (DistilHuBERT): the last
    layer's output predicts several; ``none``: for objectives that compare hidden states."""
    head_layers: tuple[Annotated[int, pydantic.Field(ge=1)], ...] | None = None
    """Layers with a ``layerwise`` head, counted from 1, and the last one among them: with ``[3, 6, 9, 12]`` four layers learn from
    four of the teacher (USAD, arXiv 2506.18843). None gives each layer one."""
    head_dim: int | None = pydantic.Field(default=None, ge=1)
    """Inner width of each ``layerwise`` head, which then has two linear layers (USAD). None gives it one."""
    head_activation: Literal["gelu", "relu"] = "gelu"
    """Activation between the two linear layers of a head with a ``head_dim``; USAD's is ``relu``."""
    split_heads: int = pydantic.Field(default=3, ge=1)
    """Number of ``split`` heads."""
    split_dim: int | None = pydantic.Field(default=None, ge=1)
    """Inner width of each ``split`` head. None takes the encoder's width."""
    feature_grad_mult: float = pydantic.Field(default=1.0, ge=0)
    """Factor on the front end's gradient; 0 freezes the front end."""
    target_dim: int = pydantic.Field(default=768, ge=1)
    """Teacher's width D, predicted by each head."""
    dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Dropout probability after the encoder's input, attention and feed-forward layers."""
    attention_dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Dropout probability of attention maps where they are computed; reused maps have none."""
    activation_dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)
    """Dropout probability inside feed-forward layers, after the activation."""
    dropout_input: float = pydantic.Field(default=0.05, ge=0, lt=1)
    """Dropout probability of the projected features."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield the fields that differ from their defaults, which the representation shows."""
        for name, field in type(self).model_fields.items():
            if (value := getattr(self, name)) != field.default:
                yield name, value

    @property
    def reuses(self) -> tuple[bool, ...]:
        """Whether each layer reuses an attention map, as a tuple of L flags."""
        if self.attention_reuse == "none":
            return (False,) * self.encoder_layers
        if self.attention_reuse == "alternate":
            return tuple(layer % 2 == 1 for layer in range(self.encoder_layers))
        assert not isinstance(self.attention_reuse, str)
        return self.attention_reuse

    @property
    def heads_of_layers(self) -> tuple[int, ...]:
        """Number of attention heads of each layer, as a tuple of L numbers."""
        return self.layer_heads or (self.encoder_attention_heads,) * self.encoder_layers

    @property
    def ffn_dims_of_layers(self) -> tuple[int, ...]:
        """Width of each layer's feed-forward part, as a tuple of L numbers."""
        return self.layer_ffn_dims or (self.encoder_ffn_embed_dim,) * self.encoder_layers

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.encoder_embed_dim // self.encoder_attention_heads

    @property
    def num_predictions(self) -> int:
        """Number of teacher layers that this student learns from: one per head, or one per encoder layer without heads."""
        if self.heads == "split":
            return self.split_heads
        return self.encoder_layers if self.head_layers is None else len(self.head_layers)

    @property
    def layers_with_heads(self) -> tuple[int, ...]:
        """The layers whose output a head reads, counted from 1."""
        if self.heads == "layerwise":
            return self.head_layers or tuple(range(1, self.encoder_layers + 1))
        return (self.encoder_layers,) if self.heads == "split" else ()

    def without_heads(self) -> "StudentConfig":
        """Return a copy without heads."""
        return self.model_copy(
            update={"heads": "none", "head_layers": None, "head_dim": None, "head_activation": "gelu"}
        )

    @property
    def has_plain_heads(self) -> bool:
        """Whether each layer has one linear head that reads its output."""
        plain = self.head_layers is None and self.head_dim is None and self.time_reduction is None
        return self.heads == "layerwise" and plain

    def check_targets(self, num_layers: int, dim: int) -> None:
        """Raise ValueError if this student does not predict ``num_layers`` layers of width ``dim``."""
        if self.num_predictions != num_layers or self.target_dim != dim:
            raise ValueError(
                f"the student predicts {self.num_predictions} layers of width {self.target_dim}, but the targets have "
                f"{num_layers} layers of width {dim}; set student.encoder_layers (student.split_heads with split heads, or "
                "student.head_layers) and student.target_dim to match, or choose other teacher.layers"
            )

    def check_frames(self, num_samples: np.ndarray, num_frames: np.ndarray) -> None:
        """Raise ValueError if this student and the targets differ in the number of frames of an utterance.

        Args:
            num_samples: (N,) integer, lengths of the utterances.
            num_frames: (N,) integer, numbers of frames of their targets.
        """
        ours = self.num_frames(torch.as_tensor(num_samples)).numpy()
        if (wrong := np.flatnonzero(ours != num_frames)).size:
            first = wrong[0]
            raise ValueError(
                f"the student makes {ours[first]} frames from an utterance of {num_samples[first]} samples, but the targets have "
                f"{num_frames[first]}; set student.patches to the teacher's, or change student.conv_layers"
            )

    @property
    def receptive_field(self) -> int:
        """Number of samples that one frame covers, and so the shortest waveform: 400 for the published front ends."""
        if self.patches is not None:
            return self.patches.min_samples
        samples = 1
        for _, kernel, stride in reversed(self.conv_layers):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_frames(self, num_samples: Length) -> Length:
        """Return the number of frames (or patches) of waveforms of these lengths.

        Args:
            num_samples: int, or integer tensor of any shape.

        Returns:
            The same type and shape; at least 0.
        """
        if self.patches is not None:
            return self.patches.num_patches(num_samples)
        return conv_output_length(num_samples, [(kernel, stride) for _, kernel, stride in self.conv_layers])

    @pydantic.model_validator(mode="after")
    def _check_sizes(self) -> Self:
        """Refuse what no machine can hold, before a student is built."""
        width, inputs, count = self.encoder_embed_dim, 1, 0
        for channels, kernel, _ in self.conv_layers:
            count, inputs = count + inputs * channels * kernel, channels
        # Not by the properties, which build a tuple as long as encoder_layers says.
        heads = (
            self.encoder_layers * self.encoder_attention_heads if self.layer_heads is None else sum(self.layer_heads)
        )
        units = (
            self.encoder_layers * self.encoder_ffn_embed_dim
            if self.layer_ffn_dims is None
            else sum(self.layer_ffn_dims)
        )
        count += inputs * width + width * (4 * heads * self.head_width + 2 * units)
        count += width**2 * self.conv_pos * self.conv_pos_depth // self.conv_pos_groups
        inner = self.split_dim if self.heads == "split" else self.head_dim
        count += self.num_predictions * (inner or width) * (self.target_dim + (width if inner else 0))
        if count > MAX_PARAMETERS or self.encoder_layers + len(self.conv_layers) + self.conv_pos_depth > MAX_MODULES:
            raise ValueError(
                f"a student with {self.encoder_layers:,} layers of width {width:,} and {len(self.conv_layers):,} convolutions would "
                f"have about {count:,} parameters; the limits are {MAX_PARAMETERS:,} parameters and {MAX_MODULES:,} layers and "
                "convolutions"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_geometry(self) -> Self:
        if not self.conv_layers or any(min(layer) < 1 for layer in self.conv_layers):
            raise ValueError(
                "conv_layers needs at least one layer (channels, kernel, stride), and all numbers must be positive"
            )
        if self.encoder_embed_dim % self.encoder_attention_heads:
            raise ValueError(
                f"encoder_embed_dim {self.encoder_embed_dim} is not a multiple of encoder_attention_heads "
                f"{self.encoder_attention_heads}"
            )
        if self.encoder_embed_dim % self.conv_pos_groups:
            raise ValueError(
                f"encoder_embed_dim {self.encoder_embed_dim} is not a multiple of conv_pos_groups {self.conv_pos_groups}"
            )
        if self.position == "rotary" and self.encoder_embed_dim // self.encoder_attention_heads % 2:
            raise ValueError(
                f"position rotary needs heads of even width, not {self.encoder_embed_dim // self.encoder_attention_heads}; "
                "choose another encoder_embed_dim or encoder_attention_heads"
            )
        if self.layer_type == "conformer" and self.depthwise_kernel % 2 == 0:
            raise ValueError(f"depthwise_kernel must be odd, not {self.depthwise_kernel}")
        if self.layer_type == "conformer" and self.layer_norm_first:
            raise ValueError(
                "layer_norm_first applies to Transformer layers only; Conformer layers have their own norms"
            )
        if self.heads != "layerwise" and (self.head_layers is not None or self.head_dim is not None):
            raise ValueError(f"head_layers and head_dim are for heads layerwise, not {self.heads}; remove them")
        if self.head_activation != "gelu" and self.head_dim is None:
            raise ValueError(
                f"head_activation {self.head_activation} does nothing without head_dim; set head_dim, or remove it"
            )
        if self.head_layers is not None and (
            sorted({*self.head_layers}) != [*self.head_layers] or self.head_layers[-1:] != (self.encoder_layers,)
        ):
            raise ValueError(
                f"head_layers is {list(self.head_layers)}; give ascending numbers of layers that end with the last one, "
                f"{self.encoder_layers}, since nothing would train the layers above the last head"
            )
        if len(self.reuses) != self.encoder_layers:
            raise ValueError(
                f"attention_reuse has {len(self.reuses)} entries, but encoder_layers is {self.encoder_layers}; "
                "give one entry per layer"
            )
        if self.reuses[0]:
            raise ValueError("attention_reuse: the first layer has no attention map to reuse; its entry must be false")
        for name, sizes in (("layer_heads", self.layer_heads), ("layer_ffn_dims", self.layer_ffn_dims)):
            if sizes is None:
                continue
            if len(sizes) != self.encoder_layers:
                raise ValueError(
                    f"{name} has {len(sizes)} entries, but encoder_layers is {self.encoder_layers}; give one entry per layer"
                )
            if self.layer_type != "transformer":
                raise ValueError(
                    f"{name} applies to Transformer layers only; remove it, or set layer_type to transformer"
                )
        if self.layer_heads is not None and any(self.reuses):
            raise ValueError(
                "layer_heads does not go with attention_reuse, because a reused map has the heads of an earlier layer; set "
                "attention_reuse to none"
            )
        if self.time_reduction is not None:
            if self.time_reduction_index >= self.encoder_layers:
                raise ValueError(
                    f"time_reduction_index {self.time_reduction_index} leaves no layer after the reduction; it must be below "
                    f"encoder_layers, {self.encoder_layers}"
                )
            if self.reuses[self.time_reduction_index]:
                raise ValueError(
                    f"attention_reuse: layer {self.time_reduction_index + 1} follows the time reduction, so earlier maps have "
                    "another number of frames; its entry must be false"
                )
        return self
