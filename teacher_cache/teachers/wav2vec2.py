"""Teachers with the architecture of wav2vec 2.0: convolutions over the waveform, position convolution, Transformer.

These are wav2vec 2.0, HuBERT, WavLM, UniSpeech, UniSpeech-SAT and data2vec-audio.

Shapes: B utterances, S samples, T frames (mostly 20 ms), C channels, D width.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import resample
from torchaudio.models import Wav2Vec2Model
from torchaudio.models.wav2vec2.components import ConvLayerBlock
from torchaudio.models.wav2vec2.wavlm_attention import WavLMSelfAttention

from ray_distill.teacher_cache.frames import (
    FRAME_RATE,
    RECEPTIVE_FIELD,
    SAMPLE_RATE,
    Length,
    conv_output_length,
    group_norm_over_real,
    padding_mask,
)
from ray_distill.teacher_cache.precision import convolve_in_groups
from ray_distill.teacher_cache.teachers.blocks.stacked_position_conv import StackedPositionConv
from ray_distill.teacher_cache.teachers.teacher import Teacher, TeacherError

# Part of every fingerprint. Increase the number when a change of the arithmetic below changes results.
_ARITHMETIC = "teacher-1"

_MAX_FRAME_RATE = 1000

NORMALIZE_EPS = 1e-5
"""Value that fairseq and torchaudio add to the variance when they normalise waveforms (``layer_norm`` of the waveform)."""


class Wav2Vec2Teacher(Teacher):
    """A torchaudio ``Wav2Vec2Model`` whose outputs do not depend on the batch.

    The forward pass differs from torchaudio's in three points: GroupNorm statistics use real positions only, each waveform is
    normalised over its own real samples, and masked frames can be replaced by the learned mask embedding (after the projection
    to the encoder's width, as in fairseq).

    Attributes:
        heads: Number of attention heads per layer.
        layer_norm_first: Whether layer norms come before the blocks (Large). Otherwise they come after (Base).
        strides: Strides of the convolutions.
        input_rate: Sampling rate in Hz that the waveforms are resampled to.
    """

    def __init__(
        self,
        model: Wav2Vec2Model,
        mask_embedding: Tensor | None,
        *,
        name: str,
        normalize_eps: float | None = None,
        input_rate: int = SAMPLE_RATE,
        device: str | torch.device = "cpu",
    ) -> None:
        """Wrap a torchaudio model. Most callers use `load_teacher` instead.

        Args:
            model: Encoder with its weights.
            mask_embedding: (D,) float, or None if the model has none.
            name: Name for people to read.
            normalize_eps: Value added to the variance when waveforms are normalised to zero mean and unit variance (most
                Large models), or None for models that take raw waveforms (Base).
            input_rate: Sampling rate in Hz that the model was trained with, to which waveforms are resampled. Default 16,000.
            device: Device on which the teacher computes.

        Raises:
            TeacherError: If frames are 20 ms apart, but not 25 ms wide.
        """
        self._normalize_eps = normalize_eps
        self._convolutions: list[ConvLayerBlock] = list(model.feature_extractor.conv_layers)
        transformer = model.encoder.transformer
        self._encoder: Any = model.encoder
        self._layers: list[nn.Module] = list(transformer.layers)
        self.strides = [layer.stride for layer in self._convolutions]
        kernels_and_strides = [(layer.kernel_size, layer.stride) for layer in self._convolutions]
        self._kernels_and_strides, self.input_rate = kernels_and_strides, input_rate
        self.frame_rate = Fraction(input_rate, math.prod(self.strides))
        if not 1 <= self.frame_rate <= _MAX_FRAME_RATE:
            raise TeacherError(
                f"{name} has a frame every {float(1000 / self.frame_rate):g} ms; teachers need 1 to {_MAX_FRAME_RATE} frames per "
                "second"
            )
        field = 1
        for kernel, stride in reversed(kernels_and_strides):
            field = (field - 1) * stride + kernel
        if self.frame_rate == FRAME_RATE and (input_rate, field) != (SAMPLE_RATE, RECEPTIVE_FIELD):
            raise TeacherError(
                f"{name} has frames of {field / input_rate * 1000:g} ms every 20 ms, by its convolutions (kernel, stride) "
                f"{kernels_and_strides}, but teachers with 50 frames per second must have frames of 25 ms, as HuBERT has"
            )
        self.min_samples = max(RECEPTIVE_FIELD, -(-field * SAMPLE_RATE // input_rate))
        attention: Any = self._layers[0].attention
        self.heads: int = attention.num_heads
        self.layer_norm_first: bool = self._layers[0].layer_norm_first  # type: ignore[assignment]
        positions: Any = transformer.pos_conv_embed
        depth = len(positions.convolutions) if isinstance(positions, StackedPositionConv) else None
        position: Any = positions.conv if depth is None else positions.convolutions[0]
        # Settings that names and shapes of the weights do not show.
        architecture = {
            "convolutions": kernels_and_strides,
            "norms": [type(layer.layer_norm).__name__ for layer in self._convolutions],
            "projection": type(model.encoder.feature_projection.projection).__name__,
            "position": [position.kernel_size[0], position.groups],
            "layer_norm_first": self.layer_norm_first,
            "heads": self.heads,
            "max_distance": getattr(attention, "max_distance", None),
        }
        other_rate = {} if input_rate == SAMPLE_RATE else {"input_rate": input_rate}
        super().__init__(
            model,
            name=name,
            num_layers=len(self._layers),
            dim=positions.embed_dim,
            identity=[_ARITHMETIC, normalize_eps, architecture | other_rate],
            mask_embedding=mask_embedding,
            device=device,
        )

    def num_frames(self, num_samples: Length) -> Length:
        """See `Teacher.num_frames`."""
        return conv_output_length(self._resampled(num_samples), self._kernels_and_strides)

    def _resampled(self, num_samples: Length) -> Length:
        """Return the number of samples at the model's own sampling rate."""
        return -(-num_samples * self.input_rate // SAMPLE_RATE)

    def map_bytes(self, num_samples: int) -> int:
        """See `Teacher.map_bytes`. WavLM holds the bias of the positions and its gated copy, each (heads, T, T) float32."""
        attention = self._layers[0].attention
        return (
            2 * self.heads * self.num_frames(num_samples) ** 2 * 4 if isinstance(attention, WavLMSelfAttention) else 0
        )

    def layer_outputs(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """See `Teacher.layer_outputs`."""
        features, frame_counts = self._features(waveforms, lengths)
        transformer = self._encoder.transformer
        x_BTD = self.masked(self._encoder.feature_projection(features), frame_mask, frame_counts)
        batch, frames, _ = x_BTD.shape
        padding: Tensor | None = padding_mask(frame_counts, frames)
        if bool((frame_counts == frames).all()):
            padding = None
        attention_mask: Tensor | None = None
        key_padding: Tensor | None = None
        if padding is not None:
            # Otherwise the position convolution would carry padding into real frames.
            x_BTD = x_BTD.masked_fill(padding[:, :, None], 0.0)
            if isinstance(self._layers[0].attention, WavLMSelfAttention):
                # It is added to the position bias, so it needs its dtype, which autocast leaves as it is.
                key_padding = torch.zeros_like(padding, dtype=torch.float32).masked_fill(padding, -torch.inf)
            else:
                # PyTorch would turn a bool mask, or one of another dtype, into a whole (T, T) map for each utterance.
                kind = x_BTD.device.type
                dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTD.dtype
                added = torch.zeros_like(padding, dtype=dtype).masked_fill(padding, -torch.inf)
                attention_mask = added[:, None, None, :].expand(batch, 1, frames, frames)
        positions = transformer.pos_conv_embed
        stacked = isinstance(positions, StackedPositionConv)
        x_BTD = x_BTD + (positions(x_BTD, padding) if stacked else convolve_in_groups(positions, x_BTD))
        if transformer.layer_norm_first:
            x_BTD = transformer.layer_norm(x_BTD)
        position_bias: Tensor | None = None
        first = self._layers[0].attention
        if isinstance(first, WavLMSelfAttention):
            position_bias = _position_bias(first, frames, x_BTD.device).repeat(batch, 1, 1, 1)
        for layer in self._layers:
            x_BTD, position_bias = layer(
                x_BTD, attention_mask=attention_mask, position_bias=position_bias, key_padding_mask=key_padding
            )
            yield x_BTD

    def _features(self, x_BS: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (B, T, C) outputs of the convolutions and the (B,) numbers of real frames."""
        if self.input_rate != SAMPLE_RATE:
            lengths = self._resampled(lengths)
            x_BS = resample(x_BS, SAMPLE_RATE, self.input_rate)
            # The filter goes on beyond the end of shorter utterances.
            x_BS = x_BS.masked_fill(padding_mask(lengths, x_BS.shape[1]), 0.0)
        x = x_BS[:, None, :]
        if self._normalize_eps is not None:
            # With one channel, GroupNorm is a layer norm over the utterance.
            x = group_norm_over_real(x, lengths, None, None, self._normalize_eps)
        for layer in self._convolutions:
            x = layer.conv(x)
            lengths = conv_output_length(lengths, [(layer.kernel_size, layer.stride)])
            norm = layer.layer_norm
            if isinstance(norm, nn.GroupNorm):
                x = group_norm_over_real(x, lengths, norm.weight, norm.bias, norm.eps)
            elif norm is not None:
                x = norm(x)
            x = F.gelu(x)
        return x.transpose(1, 2), lengths


def _position_bias(attention: WavLMSelfAttention, frames: int, device: torch.device) -> Tensor:
    """Return the (1, heads, T, T) float32 bias of WavLM's attention, before its gates.

    It has the numbers of ``attention.compute_bias``. That finds the bucket of each pair of frames on the CPU, where a GPU would wait
    for it in each pass: 75 ms for 30 s of audio. A bucket depends on the distance only.

    Args:
        attention: Attention of the first layer.
        frames: Number of frames T.
        device: Device of its weights.
    """
    distances = torch.arange(1 - frames, frames)
    buckets = attention._relative_positions_bucket(distances, bidirectional=True).to(device, non_blocking=True)
    positions = torch.arange(frames, device=device)
    biases: Tensor = attention.rel_attn_embed(buckets)[positions - positions[:, None] + frames - 1]
    return biases.permute(2, 0, 1)[None]
