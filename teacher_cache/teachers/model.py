"""A teacher: a HuBERT, WavLM or wav2vec 2.0 encoder whose layer outputs don't depend on the batch.

Shapes: B utterances, S samples, T frames (20 ms), D width, L layers, C channels.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.models import Wav2Vec2Model
from torchaudio.models.wav2vec2.components import ConvLayerBlock
from torchaudio.models.wav2vec2.wavlm_attention import WavLMSelfAttention

from teacher_cache.frames import (
    FRAME_SAMPLES,
    RECEPTIVE_FIELD,
    conv_output_length,
    group_norm_over_real,
    num_frames,
    padding_mask,
)

# Part of every fingerprint: raise it when the arithmetic below changes its results.
_ARITHMETIC = "teacher-1"

NORMALIZE_EPS = 1e-5
"""Added to the variance when waveforms are normalised: fairseq's and torchaudio's (``layer_norm`` of the waveform)."""


class TeacherError(ValueError):
    """A teacher that can't be had, or can't do what is asked of it."""


class Teacher:
    """Layer outputs of a frozen speech SSL encoder, one utterance's independent of what it is batched with.

    Runs torchaudio's modules, with three differences from their own forward pass: GroupNorm statistics count real
    positions only, waveforms are normalised one utterance at a time over real samples, and masked frames can be
    replaced by the learned mask embedding (after the projection to the encoder's width, as in fairseq).

    Attributes:
        name: what it was loaded from, for people to read.
        num_layers: Transformer layers, L.
        dim: width of every layer's output, D.
        num_parameters: weights, mask embedding included.
        has_mask_embedding: whether ``frame_mask`` may be given.
        device: where it computes.

    Example:
        >>> teacher = load_teacher("random:4x96")
        >>> teacher.hidden_states(torch.zeros(1, 16_000), torch.tensor([16_000])).shape
        torch.Size([1, 4, 49, 96])
    """

    def __init__(
        self,
        model: Wav2Vec2Model,
        mask_embedding: Tensor | None,
        *,
        name: str,
        normalize_eps: float | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Wraps a torchaudio model; `load_teacher` is the usual way to get one.

        Args:
            model: the encoder, with its weights.
            mask_embedding: (D,) float, or None if there is none.
            name: for people to read.
            normalize_eps: None for models fed raw waveforms (Base); else waveforms are normalised to zero mean and
                unit variance first (most Large models), with this added to the variance.
            device: where to compute.

        Raises:
            TeacherError: its frames are not 400 samples wide and 320 apart.
        """
        self.name = name
        self.device = torch.device(device)
        self._normalize_eps = normalize_eps
        self._convolutions: list[ConvLayerBlock] = list(model.feature_extractor.conv_layers)
        self._layers: list[nn.Module] = list(model.encoder.transformer.layers)
        self._kernels_and_strides = [(layer.kernel_size, layer.stride) for layer in self._convolutions]
        strides = 1
        for _, stride in self._kernels_and_strides:
            strides *= stride
        first_two = [conv_output_length(n, self._kernels_and_strides) for n in (RECEPTIVE_FIELD - 1, RECEPTIVE_FIELD)]
        if strides != FRAME_SAMPLES or first_two != [0, 1]:
            raise TeacherError(
                f"{name} has convolutions (kernel, stride) {self._kernels_and_strides}, but frames must be "
                f"{RECEPTIVE_FIELD} samples wide and {FRAME_SAMPLES} apart, as in HuBERT"
            )
        self._model = model.eval().requires_grad_(False).to(self.device)
        self._mask_embedding = None if mask_embedding is None else mask_embedding.detach().float().to(self.device)
        self.num_layers = len(self._layers)
        self.dim: int = model.encoder.transformer.pos_conv_embed.embed_dim
        self.has_mask_embedding = mask_embedding is not None
        mask_size = 0 if mask_embedding is None else mask_embedding.numel()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters()) + mask_size

    @property
    def weights(self) -> dict[str, Tensor]:
        """Its tensors by torchaudio's names, and ``mask_embedding`` where it has one."""
        weights = dict(self._model.state_dict())
        if self._mask_embedding is not None:
            weights["mask_embedding"] = self._mask_embedding
        return weights

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the weights and of everything else that changes the output; not of name or device."""
        digest = hashlib.sha256()
        digest.update(json.dumps([_ARITHMETIC, self._normalize_eps, self._architecture()], sort_keys=True).encode())
        weights = self.weights
        for key in sorted(weights):
            value = weights[key].detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.numpy().data)
        return digest.hexdigest()

    def _architecture(self) -> dict[str, Any]:
        """What the weights' names and shapes don't tell."""
        attention: Any = self._layers[0].attention
        position = self._model.encoder.transformer.pos_conv_embed.conv
        return {
            "convolutions": self._kernels_and_strides,
            "norms": [type(layer.layer_norm).__name__ for layer in self._convolutions],
            "projection": type(self._model.encoder.feature_projection.projection).__name__,
            "position": [position.kernel_size[0], position.groups],
            "layer_norm_first": self._layers[0].layer_norm_first,
            "heads": attention.num_heads,
            "max_distance": getattr(attention, "max_distance", None),
        }

    def hidden_states(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        frame_mask: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """Outputs of the Transformer layers.

        Args:
            waveforms: (B, S) float, 16 kHz, in [-1, 1]; what lies beyond each length is ignored.
            lengths: (B,) integer, real samples of each row, 400 <= length <= S. Default: S for all.
            frame_mask: (B, T) bool with T = num_frames(S), True where the mask embedding takes the place of the input.
                Default: no masking.
            layers: 1-based layers to return, in this order; later ones than the last of them are not computed.
                Default: all.

        Returns:
            (B, L, T, D) float32 on the teacher's device, without gradients: layer k is the output of Transformer layer
            k, as fairseq's layer hook and torchaudio's ``extract_features`` give it. Values at padded frames are finite
            and meaningless.

        Raises:
            TeacherError: shapes that don't fit, audio shorter than a frame, an unknown layer, or a mask where there is
                no mask embedding.
        """
        lengths = self._checked_lengths(waveforms, lengths)
        wanted = self._checked_layers(layers)
        batch, width = waveforms.shape
        frames = num_frames(width)
        if frame_mask is not None:
            self._check_frame_mask(frame_mask, batch, frames)
        # Filled in inference mode but made outside it, so that a loss may use it: autograd refuses inference tensors.
        out = torch.empty(batch, len(wanted), frames, self.dim, device=self.device)
        with torch.inference_mode():
            features, frame_counts = self._features(waveforms.to(self.device).float(), lengths.to(self.device))
            self._transform(features, frame_counts, frame_mask, wanted, out)
        return out

    def _features(self, x_BS: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised waveforms through the convolutions: (B, T, C), and each row's real frames (B,)."""
        x_BS = x_BS.masked_fill(padding_mask(lengths, x_BS.shape[1]), 0.0)
        x = x_BS[:, None, :]
        if self._normalize_eps is not None:
            # One channel, so GroupNorm over it is layer_norm over the utterance.
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

    def _transform(
        self, features: Tensor, frame_counts: Tensor, frame_mask: Tensor | None, wanted: list[int], out: Tensor
    ) -> None:
        """Projection, masking and Transformer; writes the wanted layers' outputs to out (B, L, T, D)."""
        encoder = self._model.encoder
        x_BTD = encoder.feature_projection(features)
        if frame_mask is not None:
            assert self._mask_embedding is not None
            x_BTD = torch.where(frame_mask.to(self.device)[:, :, None], self._mask_embedding, x_BTD)
        batch, frames, _ = x_BTD.shape
        padding: Tensor | None = padding_mask(frame_counts, frames)
        if bool((frame_counts == frames).all()):
            padding = None
        attention_mask: Tensor | None = None
        key_padding: Tensor | None = None
        if padding is not None:
            # Before the position convolution, which would else carry padding into real frames.
            x_BTD = x_BTD.masked_fill(padding[:, :, None], 0.0)
            if isinstance(self._layers[0].attention, WavLMSelfAttention):
                # Added to the position bias, so of its type.
                key_padding = torch.zeros_like(padding, dtype=x_BTD.dtype).masked_fill(padding, -torch.inf)
            else:
                attention_mask = ~padding[:, None, None, :].expand(batch, 1, frames, frames)
        x_BTD = encoder.transformer._preprocess(x_BTD)
        position_bias: Tensor | None = None
        for number, layer in enumerate(self._layers[: max(wanted)], start=1):
            x_BTD, position_bias = layer(
                x_BTD, attention_mask=attention_mask, position_bias=position_bias, key_padding_mask=key_padding
            )
            for slot, layer_number in enumerate(wanted):
                if layer_number == number:
                    out[:, slot] = x_BTD

    def _checked_lengths(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        if waveforms.ndim != 2 or not waveforms.is_floating_point() or waveforms.shape[0] == 0:
            raise TeacherError(
                f"waveforms must be a float tensor of shape (batch, samples), not {waveforms.dtype} of shape "
                f"{tuple(waveforms.shape)}"
            )
        batch, width = waveforms.shape
        if lengths is None:
            lengths = torch.full((batch,), width, dtype=torch.int64)
        integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
        if lengths.shape != (batch,) or not integer:
            raise TeacherError(
                f"lengths must be an integer tensor of shape ({batch},), one length for each waveform, not "
                f"{lengths.dtype} of shape {tuple(lengths.shape)}"
            )
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < RECEPTIVE_FIELD or longest > width:
            raise TeacherError(
                f"lengths run from {shortest} to {longest} samples, but each must be at least {RECEPTIVE_FIELD} (one "
                f"frame) and at most {width}, the width of waveforms"
            )
        return lengths.long()

    def _checked_layers(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return list(range(1, self.num_layers + 1))
        if not layers or not all(1 <= layer <= self.num_layers for layer in layers):
            raise TeacherError(
                f"layers {list(layers)} must be one or more of 1 to {self.num_layers}, those {self.name} has"
            )
        return list(layers)

    def _check_frame_mask(self, frame_mask: Tensor, batch: int, frames: int) -> None:
        if not self.has_mask_embedding:
            raise TeacherError(
                f"{self.name} has no mask embedding, so it can't give masked targets: use the model's original "
                "checkpoint, or targets that need no mask"
            )
        if frame_mask.shape != (batch, frames) or frame_mask.dtype != torch.bool:
            raise TeacherError(
                f"frame_mask must be a bool tensor of shape ({batch}, {frames}), one value for each frame, not "
                f"{frame_mask.dtype} of shape {tuple(frame_mask.shape)}"
            )


def load_weights(model: Wav2Vec2Model, weights: dict[str, Tensor], source: str) -> None:
    """Loads a complete state dict into the model, in float32.

    Raises:
        TeacherError: weights are missing, left over or of another shape; the message names some of them.
    """
    expected = model.state_dict()
    problems = {
        "lacks weights that its configuration needs": sorted(expected.keys() - weights.keys()),
        "has weights that its configuration doesn't know": sorted(weights.keys() - expected.keys()),
        "has weights of other shapes than its configuration says": sorted(
            key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape
        ),
    }
    for problem, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise TeacherError(f"{source} {problem}: {', '.join(keys[:3])}{more}")
    model.load_state_dict(weights)


def checked_mask_embedding(mask_embedding: Tensor | None, dim: int, source: str) -> Tensor | None:
    """The mask embedding, if it has the encoder's width.

    Raises:
        TeacherError: it is there and not of shape (dim,).
    """
    if mask_embedding is not None and mask_embedding.shape != (dim,):
        raise TeacherError(f"{source} has a mask embedding of shape {tuple(mask_embedding.shape)}, not ({dim},)")
    return mask_embedding
