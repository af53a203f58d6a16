"""What a student is: every architectural choice, with ARMHuBERT-S's value as default."""

from typing import Literal, Self

import pydantic

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
        conv_pos: kernel of the position convolution. Default 128.
        conv_pos_groups: its groups. Default 16.
        target_dim: the teacher's width D, which each layer's head predicts. Default 768.
        dropout, attention_dropout, activation_dropout, dropout_input: probabilities. Defaults 0.1, 0.1, 0.1, 0.05.
    """

    conv_layers: ConvLayers = ARMHUBERT_S_CONV_LAYERS
    conv_norm: Literal["group_norm", "layer_norm"] = "group_norm"
    conv_bias: bool = False
    encoder_layers: int = pydantic.Field(default=12, ge=1)
    encoder_embed_dim: int = pydantic.Field(default=432, ge=1)
    encoder_ffn_embed_dim: int = pydantic.Field(default=816, ge=1)
    encoder_attention_heads: int = pydantic.Field(default=12, ge=1)
    attention_reuse: Literal["none", "alternate"] | tuple[bool, ...] = "alternate"
    reuse_behaviour: Literal["paper", "released"] = "paper"
    layer_grad_scale: bool = True
    conv_pos: int = pydantic.Field(default=128, ge=1)
    conv_pos_groups: int = pydantic.Field(default=16, ge=1)
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
    def receptive_field(self) -> int:
        """Samples that one frame sees, which is the shortest waveform with a frame: 400 for the published front ends."""
        samples = 1
        for _, kernel, stride in reversed(self.conv_layers):
            samples = (samples - 1) * stride + kernel
        return samples

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
        if len(self.reuses) != self.encoder_layers:
            raise ValueError(
                f"attention_reuse has {len(self.reuses)} entries, encoder_layers is {self.encoder_layers}; give one for each layer"
            )
        if self.reuses[0]:
            raise ValueError("attention_reuse: the first layer has no attention map to reuse; its entry must be false")
        return self
