"""What a student is: every architectural choice, with ARMHuBERT-S's value as default."""

from typing import Literal, Self

import pydantic

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


class StudentConfig(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Architecture of a student. Names follow fairseq's where it has one.

    Attributes:
        conv_layers: (channels, kernel, stride) of each convolution. Default ARMHuBERT-S's.
        patches: how a log-mel spectrogram is cut into patches, which then take the place of frames, for a teacher that has them
            (AST); the convolutions over the waveform are left out. None: frames. Default None; runs take the teacher's.
        conv_norm: ``group_norm`` (after the first convolution, as HuBERT Base) or ``layer_norm`` (after each, as Large).
        conv_bias: whether convolutions have a bias. Default False.
        encoder_layers: Transformer layers L. Default 12.
        encoder_embed_dim: width d. Default 432.
        encoder_ffn_embed_dim: width of the feed-forward layers. Default 816.
        encoder_attention_heads: heads. Default 12.
        attention_reuse: for each layer, True where it reuses the last attention map that was computed instead of computing
            its own; or ``alternate`` (every second layer reuses), or ``none``. This is the OPPOSITE sign of the published
            ``reuse_pattern``, where True means that a layer computes its own map. Default ``alternate``.
        reuse_behaviour: ``paper`` applies the map as it is; ``released`` applies softmax to it a second time, as the code
            did that trained the released weights. Default ``paper``.
        layer_grad_scale: the published layer gradient scaling. Default True.
        layer_type: ``transformer`` or ``conformer``. Default ``transformer``.
        layer_norm_first: normalise before each part of a Transformer layer, not after it, and the last layer's output once
            more. Default False.
        layer_drop: probability, in training, that a layer passes on its input (LayerDrop). Default 0.
        depthwise_kernel: of a Conformer's convolution, odd. Default 31.
        position: ``convolution`` before the encoder (wav2vec 2.0), or in attention ``relative`` (Transformer-XL) or ``rotary``
            (RoFormer). The published names are ``abs``, ``rel_pos`` and ``rope``. Default ``convolution``.
        conv_pos: kernel of the position convolution. Default 128.
        conv_pos_groups: its groups. Default 16.
        conv_pos_depth: above 1: so many smaller position convolutions one after another. Default 1.
        time_reduction: ``fc1``, ``fc2`` or ``conv1d`` of `TimeReduction`; None leaves frames as they are. Default None.
        time_reduction_factor: frames that become one. Default 2.
        time_reduction_index: layers before the reduction; those after it see the reduced frames. Default 0.
        heads: ``layerwise``: each layer's output predicts one of the teacher's layers; ``split`` (DistilHuBERT): the last layer's
            predicts several; ``none``: for objectives that compare hidden states. Default ``layerwise``.
        split_heads: predictions of ``split`` heads. Default 3.
        split_dim: inner width of each; None: the encoder's. Default None.
        feature_grad_mult: the front end's gradient is multiplied by this; 0 freezes it. Default 1.
        target_dim: the teacher's width D, which each head predicts. Default 768.
        dropout, attention_dropout, activation_dropout, dropout_input: probabilities. Defaults 0.1, 0.1, 0.1, 0.05.
    """

    conv_layers: ConvLayers = ARMHUBERT_S_CONV_LAYERS
    patches: PatchGeometry | None = None
    conv_norm: Literal["group_norm", "layer_norm"] = "group_norm"
    conv_bias: bool = False
    encoder_layers: int = pydantic.Field(default=12, ge=1)
    encoder_embed_dim: int = pydantic.Field(default=432, ge=1)
    encoder_ffn_embed_dim: int = pydantic.Field(default=816, ge=1)
    encoder_attention_heads: int = pydantic.Field(default=12, ge=1)
    attention_reuse: Literal["none", "alternate"] | tuple[bool, ...] = "alternate"
    reuse_behaviour: Literal["paper", "released"] = "paper"
    layer_grad_scale: bool = True
    layer_type: Literal["transformer", "conformer"] = "transformer"
    layer_norm_first: bool = False
    layer_drop: float = pydantic.Field(default=0.0, ge=0, lt=1)
    depthwise_kernel: int = pydantic.Field(default=31, ge=1)
    position: Literal["convolution", "relative", "rotary"] = "convolution"
    conv_pos: int = pydantic.Field(default=128, ge=1)
    conv_pos_groups: int = pydantic.Field(default=16, ge=1)
    conv_pos_depth: int = pydantic.Field(default=1, ge=1)
    time_reduction: Literal["fc1", "fc2", "conv1d"] | None = None
    time_reduction_factor: int = pydantic.Field(default=2, ge=2)
    time_reduction_index: int = pydantic.Field(default=0, ge=0)
    heads: Literal["layerwise", "split", "none"] = "layerwise"
    split_heads: int = pydantic.Field(default=3, ge=1)
    split_dim: int | None = pydantic.Field(default=None, ge=1)
    feature_grad_mult: float = pydantic.Field(default=1.0, ge=0)
    target_dim: int = pydantic.Field(default=768, ge=1)
    dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)
    activation_dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)
    dropout_input: float = pydantic.Field(default=0.05, ge=0, lt=1)

    @property
    def reuses(self) -> tuple[bool, ...]:
        """Whether each layer reuses an attention map."""
        if self.attention_reuse == "none":
            return (False,) * self.encoder_layers
        if self.attention_reuse == "alternate":
            return tuple(layer % 2 == 1 for layer in range(self.encoder_layers))
        assert not isinstance(self.attention_reuse, str)
        return self.attention_reuse

    @property
    def num_predictions(self) -> int:
        """Teacher layers that this student learns from: one for each head, or without heads for each of its layers."""
        return self.split_heads if self.heads == "split" else self.encoder_layers

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees, which is the shortest waveform with a frame: 400 for the published front ends."""
        if self.patches is not None:
            return self.patches.min_samples
        samples = 1
        for _, kernel, stride in reversed(self.conv_layers):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_frames(self, num_samples: Length) -> Length:
        """Frames, or patches, of audio of so many samples: an int, or an integer tensor of any shape; at least 0."""
        if self.patches is not None:
            return self.patches.num_patches(num_samples)
        return conv_output_length(num_samples, [(kernel, stride) for _, kernel, stride in self.conv_layers])

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.conv_layers or any(min(layer) < 1 for layer in self.conv_layers):
            raise ValueError("conv_layers needs at least one layer of (channels, kernel, stride), all positive")
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
            raise ValueError("layer_norm_first is an option of Transformer layers; a Conformer layer has its own norms")
        if len(self.reuses) != self.encoder_layers:
            raise ValueError(
                f"attention_reuse has {len(self.reuses)} entries, encoder_layers is {self.encoder_layers}; give one for each layer"
            )
        if self.reuses[0]:
            raise ValueError("attention_reuse: the first layer has no attention map to reuse; its entry must be false")
        if self.time_reduction is not None:
            if self.time_reduction_index >= self.encoder_layers:
                raise ValueError(
                    f"time_reduction_index {self.time_reduction_index} leaves no layer after it; encoder_layers is "
                    f"{self.encoder_layers}"
                )
            if self.reuses[self.time_reduction_index]:
                raise ValueError(
                    f"attention_reuse: layer {self.time_reduction_index + 1} comes right after the time reduction, where earlier "
                    "maps have other frames; its entry must be false"
                )
        return self
