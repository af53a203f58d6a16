"""A distilled speech student in plain PyTorch (1.13 or newer), for inference and fine-tuning, without other dependencies.

The features of an utterance do not depend on its batch: normalisation and attention only use real samples.

Shape suffixes: B batch, S samples, C channels, T frames, d width, H heads, h width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .portable_attention import Attention


class PortableStudent(nn.Module):
    """Convolutional front end and Transformer encoder with attention-map reuse, and the prediction heads if they are exported.

    Attributes:
        config: Architecture, as JSON values: conv_layers [[channels, kernel, stride], ...], conv_norm, conv_bias,
            feature_norm, encoder_embed_dim, encoder_ffn_embed_dim, encoder_attention_heads, layer_heads and layer_ffn_dims
            [number for each layer, 0 for none] (null or missing if all layers are alike), reuses [bool for each layer],
            reuse_behaviour, layer_norm_first, position, conv_pos, conv_pos_groups, conv_pos_depth, time_reduction,
            time_reduction_factor, time_reduction_index, dropout, attention_dropout, activation_dropout, dropout_input;
            features: ``layers`` or ``heads`` (see `forward`), and for heads: heads (``layerwise`` or ``split``),
            split_heads, split_dim, target_dim.
        hold_maps: Whether to pass a computed (T, T) attention map to the layers that reuse it, instead of its queries and
            keys. The result is the same, with less work and, for long audio, more memory. Default False.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.hold_maps = False
        width: int = config["encoder_embed_dim"]
        blocks, channels = [], 1
        for number, (outputs, kernel, stride) in enumerate(config["conv_layers"]):
            norm = config["conv_norm"] if config["conv_norm"] == "layer_norm" or number == 0 else None
            blocks.append(ConvBlock(channels, outputs, kernel, stride, config["conv_bias"], norm))
            channels = outputs
        self.conv_blocks = nn.ModuleList(blocks)
        self.feature_norm = nn.LayerNorm(channels) if config["feature_norm"] else nn.Identity()
        self.projection = nn.Linear(channels, width) if channels != width else nn.Identity()
        self.input_dropout = nn.Dropout(config["dropout_input"])
        self.position: nn.Module | None = None
        if config["position"] == "convolution" and config["conv_pos_depth"] > 1:
            self.position = DeepPositionConv(
                width, config["conv_pos"], config["conv_pos_groups"], config["conv_pos_depth"]
            )
        elif config["position"] == "convolution":
            self.position = PositionConv(width, config["conv_pos"], config["conv_pos_groups"])
        self.encoder_norm = nn.LayerNorm(width)
        self.encoder_dropout = nn.Dropout(config["dropout"])
        count = len(config["reuses"])
        heads = config.get("layer_heads") or [config["encoder_attention_heads"]] * count
        inner = config.get("layer_ffn_dims") or [config["encoder_ffn_embed_dim"]] * count
        self.layers = nn.ModuleList(
            [EncoderLayer(config, reuses, heads[i], inner[i]) for i, reuses in enumerate(config["reuses"])]
        )
        self.reduction: TimeReduction | None = None
        if config["time_reduction"] is not None:
            self.reduction = TimeReduction(width, config["time_reduction"], config["time_reduction_factor"])
        if config["features"] == "heads":
            self._add_heads(width)

    def _add_heads(self, width: int) -> None:
        config = self.config
        layers = len(self.layers)
        split = config["heads"] == "split"
        inner: int = (config["split_dim"] or width) if split else width
        count: int = config["split_heads"] if split else layers
        if split:
            self.split = nn.Linear(width, inner * count)
        plain = not split and inner == config["target_dim"]
        self.heads = nn.ModuleList(
            [nn.Identity() if plain else nn.Linear(inner, config["target_dim"]) for _ in range(count)]
        )
        self.upsamplers = nn.ModuleDict()
        if self.reduction is not None:
            used = [layers - 1] if split else range(config["time_reduction_index"], layers)
            self.upsamplers.update({str(layer): Upsampler(width, self.reduction.factor) for layer in used})

    @property
    def width(self) -> int:
        """Width of the features: d of the encoder, or D of the heads' predictions."""
        name = "target_dim" if self.config["features"] == "heads" else "encoder_embed_dim"
        width: int = self.config[name]
        return width

    @property
    def num_features(self) -> int:
        """Number of tensors that `forward` returns."""
        return len(self.heads) if self.config["features"] == "heads" else len(self.layers) + 1

    @property
    def stride(self) -> int:
        """Number of samples between the starts of neighbouring frames."""
        return math.prod(stride for _, _, stride in self.config["conv_layers"])

    @property
    def receptive_field(self) -> int:
        """Number of samples that one frame covers, and so the shortest waveform."""
        samples = 1
        for _, kernel, stride in reversed(self.config["conv_layers"]):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_frames(self, lengths: Any) -> Any:
        """Return the number of real frames of waveforms of these lengths (int or integer tensor), at least one frame each."""
        for _, kernel, stride in self.config["conv_layers"]:
            lengths = (lengths - kernel) // stride + 1
        return lengths

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        augment: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        checkpoint: Callable[..., Any] | None = None,
        maps: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the features of a padded batch.

        Args:
            waveforms: (B, S) float, 16 kHz mono in [-1, 1]; padding may hold any finite values.
            lengths: (B,) int64, real samples, from ``receptive_field`` to S. Default None: nothing is padded.
            augment: Function of the projected features (B, T, d) and the real frames (B, T) bool, or None if nothing is
                padded, that returns augmented features. Default None: no augmentation.
            checkpoint: Function that calls each layer, such as `torch.utils.checkpoint.checkpoint`. Default None: a plain call.
            maps: List that receives the attention map (B, H, T, T) that each layer applies. Default None: not collected.

        Returns:
            With features ``layers``, L + 1 tensors (B, T, d): 0 is the encoder's input, k the output of layer k; after a time
            reduction, each reduced frame is repeated for all the frames it was made from. With features ``heads``, the
            predictions of the heads, (B, T, D) each. Values at padded frames are finite and meaningless.
        """
        x, real = waveforms[:, None], lengths
        for block in self.conv_blocks:
            x, real = block(x, real)
        x = self.input_dropout(self.projection(self.feature_norm(x.transpose(1, 2))))
        frames, length = _real_frames(real, x), x.shape[1]
        if augment is not None:
            x = augment(x, frames)
        x = _zero_padding(x, frames)
        if self.position is not None:
            x = x + self.position(x, frames)
        norm_first = self.config["layer_norm_first"]
        x = self.encoder_dropout(x if norm_first else self.encoder_norm(x))
        states, outputs = [x], []
        previous_map: tuple[Tensor, ...] = ()
        for number, layer in enumerate(self.layers):
            if self.reduction is not None and number == self.config["time_reduction_index"]:
                x = self.reduction(_zero_padding(x, frames))
                factor = self.reduction.factor
                reduced = None if real is None else torch.div(real + factor - 1, factor, rounding_mode="floor")
                frames = _real_frames(reduced, x)
            given = x, None if frames is None else frames[:, None, None], previous_map, self.hold_maps, maps
            x, previous_map = layer(*given) if checkpoint is None else checkpoint(layer, *given)
            if norm_first and number == len(self.layers) - 1:
                x = self.encoder_norm(x)
            outputs.append(x)
            state = x
            if self.reduction is not None and number >= self.config["time_reduction_index"]:
                places = torch.arange(length, device=x.device)
                state = x.index_select(1, torch.div(places, self.reduction.factor, rounding_mode="floor"))
            states.append(state)
        return self._predictions(outputs, length) if self.config["features"] == "heads" else states

    def _predictions(self, outputs: list[Tensor], frames: int) -> list[Tensor]:
        """Return the heads' predictions (B, frames, D) from the layers' outputs, which may be reduced."""
        upsampled = [
            self.upsamplers[str(layer)](x, frames) if str(layer) in self.upsamplers else x
            for layer, x in enumerate(outputs)
        ]
        if self.config["heads"] == "split":
            upsampled = list(F.gelu(self.split(upsampled[-1])).chunk(len(self.heads), -1))
        return [head(x) for head, x in zip(self.heads, upsampled)]  # noqa: B905 (Python 3.9)


def _real_frames(real: Tensor | None, x_BTd: Tensor) -> Tensor | None:
    """Return (B, T) bool, False at padding; None if nothing is padded."""
    return None if real is None else torch.arange(x_BTd.shape[1], device=x_BTd.device) < real[:, None]


def _zero_padding(x_BTd: Tensor, frames: Tensor | None) -> Tensor:
    return x_BTd if frames is None else torch.where(frames[..., None], x_BTd, torch.zeros_like(x_BTd))


class ConvBlock(nn.Module):
    """Unpadded convolution, normalisation if any, GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, bias: bool, norm: str | None) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=bias)
        self.norm: nn.Module | None = None
        if norm is not None:
            self.norm = nn.GroupNorm(outputs, outputs) if norm == "group_norm" else nn.LayerNorm(outputs)

    def forward(self, x_BCS: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map (B, C, S) and lengths (B,) or None to (B, C', S') and lengths (B,) or None."""
        x = self.conv(x_BCS)
        if lengths is not None:
            lengths = torch.div(lengths - self.conv.kernel_size[0], self.conv.stride[0], rounding_mode="floor") + 1
        if isinstance(self.norm, nn.GroupNorm) and lengths is not None:
            x = _group_norm_over_real(x, lengths, self.norm)
        elif isinstance(self.norm, nn.GroupNorm):
            x = self.norm(x)
        elif self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(x), lengths


def _group_norm_over_real(x_BCS: Tensor, lengths: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Apply GroupNorm with one group per channel and statistics over real positions only."""
    x = x_BCS.float()  # A sum over thousands of positions overflows in half precision.
    real = (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None].float()
    count = lengths[:, None, None].float()
    centred = x - (x * real).sum(-1, keepdim=True) / count
    variance = (centred * real).square().sum(-1, keepdim=True) / count
    normalised = (centred / torch.sqrt(variance + norm.eps)).to(x_BCS.dtype)
    return normalised * norm.weight[:, None] + norm.bias[:, None]


def _convolve_in_groups(conv: Any, x_BCT: Tensor) -> Tensor:
    """Apply a grouped convolution, in float32 on a CPU: with AMX, PyTorch 2.11 computes small groups in bfloat16 wrongly."""
    try:
        autocast = torch.is_autocast_enabled("cpu")
    except TypeError:  # PyTorch before 2.4.
        autocast = torch.is_autocast_cpu_enabled()
    if x_BCT.device.type != "cpu" or not (x_BCT.dtype == torch.bfloat16 or autocast):
        y: Tensor = conv(x_BCT)
        return y
    bias = None if conv.bias is None else conv.bias.float()
    with torch.autocast("cpu", enabled=False):
        y = F.conv1d(x_BCT.float(), conv.weight.float(), bias, padding=conv.padding[0], groups=conv.groups)
    return y.to(x_BCT.dtype)


class PositionConv(nn.Module):
    """Convolutional position embedding, with the weight normalisation of training folded into the weight."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.surplus = 1 - kernel % 2

    def forward(self, x_BTd: Tensor, frames: Tensor | None) -> Tensor:
        """Map (B, T, d) to (B, T, d); padded frames must be zeros."""
        x = _convolve_in_groups(self.conv, x_BTd.transpose(1, 2))
        return F.gelu(x[..., : x.shape[-1] - self.surplus]).transpose(1, 2)


class DeepPositionConv(nn.Module):
    """A sequence of smaller position convolutions, each followed by LayerNorm without weights and GELU."""

    def __init__(self, width: int, kernel: int, groups: int, depth: int) -> None:
        super().__init__()
        kernel = max(3, kernel // depth)
        self.convs = nn.ModuleList(
            [nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)]
        )
        self.surplus = 1 - kernel % 2

    def forward(self, x_BTd: Tensor, frames: Tensor | None) -> Tensor:
        """Map (B, T, d), zeros at padding, to (B, T, d). ``frames``: (B, T) bool, False at padding; None if nothing is padded."""
        x = x_BTd
        for conv in self.convs:
            y = _convolve_in_groups(conv, x.transpose(1, 2))
            y = y[..., : y.shape[-1] - self.surplus].transpose(1, 2)
            x = _zero_padding(F.gelu(F.layer_norm(y, y.shape[-1:])), frames)
        return x


class TimeReduction(nn.Module):
    """Merge groups of ``factor`` neighbouring frames into one frame each; the last group is padded with zeros."""

    def __init__(self, width: int, kind: str, factor: int) -> None:
        super().__init__()
        self.factor = factor
        wide = width * factor
        self.reduce: nn.Module
        if kind == "conv1d":
            self.reduce = nn.Conv1d(width, width, factor, factor)
        elif kind == "fc1":
            self.reduce = nn.Linear(wide, width)
        else:
            self.reduce = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x_BTd: Tensor) -> Tensor:
        """Map (B, T, d), zeros at padding, to (B, ceil(T / factor), d)."""
        # Exporters can't trace the remainder of a length. So pad by the most that may be missing and drop the rest by a
        # convolution, which is equal to a linear layer over the concatenated frames.
        x = F.pad(x_BTd, (0, 0, 0, self.factor - 1)).transpose(1, 2)
        first: Any = self.reduce[0] if isinstance(self.reduce, nn.Sequential) else self.reduce
        weight: Tensor = first.weight
        if weight.ndim == 2:
            weight = weight.view(len(weight), self.factor, -1).transpose(1, 2)
        y: Tensor = F.conv1d(x, weight, first.bias, self.factor).transpose(1, 2)
        if isinstance(self.reduce, nn.Sequential):
            y = self.reduce[2](self.reduce[1](y))
        return y


class Upsampler(nn.Module):
    """A transposed convolution before a head, which returns reduced frames to the number of frames."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.expand = nn.ConvTranspose1d(width, width, factor, factor)

    def forward(self, x_BRd: Tensor, frames: int) -> Tensor:
        """Map (B, R, d) to (B, frames, d)."""
        y: Tensor = self.expand(x_BRd.transpose(1, 2))
        # Exporters can't trace a slice, because they can't tell that there are enough frames.
        return y.transpose(1, 2).index_select(1, torch.arange(frames, device=y.device))


class EncoderLayer(nn.Module):
    """Transformer layer, normalised after each part, or before it with ``layer_norm_first``.

    With 0 heads it has no attention, and with a feed-forward width of 0 no feed-forward part.
    """

    def __init__(self, config: dict[str, Any], reuses: bool, heads: int, inner: int) -> None:
        super().__init__()
        norm_first: bool = config["layer_norm_first"]
        self.norm_first = norm_first
        width: int = config["encoder_embed_dim"]
        self.attention = Attention(config, reuses, heads) if heads else None
        self.attention_norm = nn.LayerNorm(width) if heads or not norm_first else None
        self.up = nn.Linear(width, inner) if inner else None
        self.down = nn.Linear(inner, width) if inner else None
        self.final_norm = nn.LayerNorm(width) if inner or not norm_first else None
        self.dropout = nn.Dropout(config["dropout"])
        self.activation_dropout = nn.Dropout(config["activation_dropout"])

    def forward(
        self,
        x_BTd: Tensor,
        attention_mask: Tensor | None,
        previous_map: tuple[Tensor, ...],
        hold_maps: bool,
        maps: list[Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output (B, T, d) and the attention map; see `Attention.forward`."""
        x, norm_first = x_BTd, self.norm_first
        if self.attention is not None:
            normalised = self.attention_norm(x) if norm_first and self.attention_norm is not None else x
            mixed, previous_map = self.attention(normalised, attention_mask, previous_map, hold_maps, maps)
            x = x + self.dropout(mixed)
        elif maps is not None:
            maps.append(x.new_zeros(x.shape[0], 0, x.shape[1], x.shape[1]))
        if not norm_first and self.attention_norm is not None:
            x = self.attention_norm(x)
        if self.up is not None and self.down is not None:
            inner = self.up(self.final_norm(x) if norm_first and self.final_norm is not None else x)
            x = x + self.dropout(self.down(self.activation_dropout(F.gelu(inner))))
        if not norm_first and self.final_norm is not None:
            x = self.final_norm(x)
        return x, previous_map


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pad waveforms (S_i,) with zeros to (B, S), and return them with their lengths (B,), or None if all are equal."""
    lengths = [len(waveform) for waveform in waveforms]
    padded = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    return padded, None if min(lengths) == max(lengths) else torch.tensor(lengths, device=padded.device)
