"""Hyper-parameters of models with the architecture of wav2vec 2.0, and the torchaudio model that they define."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchaudio.models import Wav2Vec2Model, wav2vec2_model, wavlm_model

from ray_distill.teacher_cache.teachers.blocks.stacked_position_conv import StackedPositionConv
from ray_distill.teacher_cache.teachers.teacher import TeacherError

HUBERT_CONVOLUTIONS = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


@dataclass(frozen=True)
class Architecture:
    """Hyper-parameters of an encoder. Names follow fairseq.

    Attributes:
        conv_layers: (channels, kernel, stride) of each convolution.
        conv_bias: Whether the convolutions have biases.
        conv_layer_norm: Whether every convolution has a layer norm (Large). Otherwise the first has a group norm (Base).
        dim: Width D of the encoder.
        ffn_dim: Inner width of the feed-forward blocks.
        heads: Number of attention heads.
        layers: Number of Transformer layers, L.
        layer_norm_first: Whether layer norms come before the blocks (Large). Otherwise they come after (Base).
        pos_kernel: Kernel size of the position convolution, in frames.
        pos_groups: Number of groups of the position convolution.
        projected: Whether a linear layer projects the convolutions' width to D. fairseq has none if the widths are equal.
        feature_norm: Whether a layer norm precedes that projection. DistilHuBERT has none.
        relative_positions: (buckets, maximum distance in frames) of WavLM's gated relative position bias, or None for
            HuBERT and wav2vec 2.0.
        pos_depth: Number of stacked position convolutions of data2vec, or None for the single weight-normalised one of
            wav2vec 2.0.
    """

    conv_layers: list[tuple[int, int, int]]
    conv_bias: bool
    conv_layer_norm: bool
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    layer_norm_first: bool
    pos_kernel: int
    pos_groups: int
    projected: bool = True
    feature_norm: bool = True
    relative_positions: tuple[int, int] | None = None
    pos_depth: int | None = None

    @property
    def modules(self) -> int:
        """Number of layers and convolutions."""
        return self.layers + len(self.conv_layers) + (self.pos_depth or 1)


def build_model(architecture: Architecture, source: str) -> Wav2Vec2Model:
    """Build the torchaudio model with untrained weights. The global random state does not change.

    Args:
        architecture: Hyper-parameters.
        source: Name of the checkpoint, for messages.

    Raises:
        TeacherError: If the hyper-parameters are inconsistent.
    """
    arguments: dict[str, Any] = {
        "extractor_mode": "layer_norm" if architecture.conv_layer_norm else "group_norm",
        "extractor_conv_layer_config": architecture.conv_layers,
        "extractor_conv_bias": architecture.conv_bias,
        "encoder_embed_dim": architecture.dim,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": architecture.pos_kernel,
        "encoder_pos_conv_groups": architecture.pos_groups,
        "encoder_num_layers": architecture.layers,
        "encoder_num_heads": architecture.heads,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": architecture.ffn_dim,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": architecture.layer_norm_first,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
    }
    build: Callable[..., Wav2Vec2Model] = wav2vec2_model
    if architecture.relative_positions is not None:
        build = wavlm_model
        arguments["encoder_num_buckets"], arguments["encoder_max_distance"] = architecture.relative_positions
    if architecture.layers < 1 or architecture.heads < 1 or architecture.dim % architecture.heads:
        raise TeacherError(
            f"{source} has {architecture.layers} layers of width {architecture.dim} with {architecture.heads} heads; "
            "it needs at least one layer, and the number of heads must divide the width"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            model = build(**arguments)
            if architecture.pos_depth is not None:
                model.encoder.transformer.pos_conv_embed = StackedPositionConv(
                    architecture.dim, architecture.pos_depth, architecture.pos_kernel, architecture.pos_groups
                )
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise TeacherError(f"{source} has a configuration from which no model can be built: {error}") from error
    if not architecture.projected:
        model.encoder.feature_projection.projection = nn.Identity()
    if not architecture.feature_norm:
        model.encoder.feature_projection.layer_norm = nn.Identity()
    return model
