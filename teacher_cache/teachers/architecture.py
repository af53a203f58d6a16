"""The hyper-parameters that models built like wav2vec 2.0 differ in, and the torchaudio model they describe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchaudio.models import Wav2Vec2Model, wav2vec2_model, wavlm_model

from ray_distill.teacher_cache.teachers.stacked_position_conv import StackedPositions
from ray_distill.teacher_cache.teachers.teacher import TeacherError

HUBERT_CONVOLUTIONS = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint's configuration says of its encoder; names follow fairseq.

    Attributes:
        conv_layers: (channels, kernel, stride) of each convolution.
        conv_bias: whether they have biases.
        conv_layer_norm: layer norm after each convolution (Large), else group norm after the first (Base).
        dim: encoder width, D.
        ffn_dim: inner width of the feed-forward blocks.
        heads: attention heads.
        layers: Transformer layers, L.
        layer_norm_first: layer norms before the blocks (Large), else after them (Base).
        pos_kernel: kernel of the position convolution, in frames.
        pos_groups: its groups.
        projected: whether a linear layer leads from the convolutions' width to D; fairseq has none if they are equal.
        relative_positions: (buckets, maximal distance in frames) of WavLM's gated relative position bias; None for
            HuBERT and wav2vec 2.0.
        pos_depth: position convolutions of data2vec, one after the other; None for wav2vec 2.0's single, weight-normed one.
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
    relative_positions: tuple[int, int] | None = None
    pos_depth: int | None = None


def build_model(architecture: Architecture, source: str) -> Wav2Vec2Model:
    """The torchaudio model, with weights of no meaning. Leaves the global random state as it was.

    Raises:
        TeacherError: the numbers don't fit together.
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
            f"{source} has {architecture.layers} layers and {architecture.heads} heads of a width of "
            f"{architecture.dim}; there must be at least one layer, and the heads must divide the width"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            model = build(**arguments)
            if architecture.pos_depth is not None:
                model.encoder.transformer.pos_conv_embed = StackedPositions(
                    architecture.dim, architecture.pos_depth, architecture.pos_kernel, architecture.pos_groups
                )
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise TeacherError(f"{source} has a configuration that makes no model: {error}") from error
    if not architecture.projected:
        model.encoder.feature_projection.projection = nn.Identity()
    return model
