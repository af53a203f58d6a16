"""Whisper's encoder as a teacher: log-mel input, frames of 20 ms, no mask embedding.

Shapes: B utterances, S samples, N mel frames (10 ms), T frames (20 ms), M mel bands, D width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.teacher_cache.frames import FRAME_SAMPLES, num_frames, padding_mask
from ray_distill.teacher_cache.spectrograms import whisper_log_mel
from ray_distill.teacher_cache.teachers.blocks.prenorm_layer import PreNormLayer
from ray_distill.teacher_cache.teachers.huggingface_folder import HuggingFaceFolder
from ray_distill.teacher_cache.teachers.teacher import Teacher, TeacherError
from ray_distill.teacher_cache.teachers.weights import load_model

# Part of every fingerprint. Increase the number when a change of the arithmetic below changes results.
_ARITHMETIC = "whisper-1"

_PREFIXES = ("model.encoder.", "encoder.")

# Supported values of settings. With other values the model has another architecture.
_SUPPORTED = {"activation_function": ("gelu",), "scale_embedding": (False,)}


class WhisperEncoder(nn.Module):
    """Two convolutions, learned positions and Transformer layers. Parameters have transformers' names."""

    def __init__(self, bands: int, dim: int, layers: int, heads: int, ffn_dim: int, positions: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(bands, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(positions, dim)
        self.layers = nn.ModuleList(PreNormLayer(dim, heads, ffn_dim, biases="qv") for _ in range(layers))
        # Only the decoder uses this layer norm. No layer's output depends on it.
        self.layer_norm = nn.LayerNorm(dim)


class WhisperTeacher(Teacher):
    """Outputs of the layers of Whisper's encoder, before its final layer norm.

    Whisper pads all audio with silence to 30 s and attends to all of it. Here real frames attend to real frames only. The
    input of the first layer is the same, short utterances are much cheaper, and features of speech change little (measured in
    ``benchmarks/student/whisper.py``). Frames are cropped to HuBERT's number, which is at most one less than Whisper's. Audio longer
    than Whisper's positions (30 s) is an error.
    """

    def __init__(self, encoder: WhisperEncoder, *, name: str, device: str | torch.device = "cpu") -> None:
        """Wrap an encoder. Most callers use `load_teacher` instead.

        Args:
            encoder: Encoder with its weights.
            name: Name for people to read.
            device: Device on which the teacher computes.
        """
        positions, dim = encoder.embed_positions.weight.shape
        self.max_samples = positions * FRAME_SAMPLES
        self._encoder = encoder
        super().__init__(
            encoder,
            name=name,
            num_layers=len(encoder.layers),
            dim=dim,
            identity=[_ARITHMETIC, encoder.layers[0].heads],
            device=device,
        )

    def layer_outputs(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """See `Teacher.layer_outputs`."""
        encoder = self._encoder
        yield from self.layers_of_mel(
            whisper_log_mel(waveforms, encoder.conv1.in_channels), num_frames(lengths), frame_mask
        )

    def layers_of_mel(
        self, mel_BNM: Tensor, frame_counts: Tensor, frame_mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the layer outputs for (B, N, M) spectrograms with (B,) numbers of real frames. T is the largest of these."""
        encoder = self._encoder
        x = F.gelu(encoder.conv1(mel_BNM.transpose(1, 2)))
        x_BTD = F.gelu(encoder.conv2(x)).transpose(1, 2)[:, : int(frame_counts.max())]
        frames = x_BTD.shape[1]
        x_BTD = self.masked(x_BTD, frame_mask, frame_counts) + encoder.embed_positions.weight[:frames]
        attended: Tensor | None = None
        if bool((frame_counts < frames).any()):
            attended = ~padding_mask(frame_counts, frames)[:, None, None]
        for layer in encoder.layers:
            x_BTD = layer(x_BTD, attended)
            yield x_BTD


def load_whisper(folder: HuggingFaceFolder, device: str | torch.device) -> WhisperTeacher:
    """Load the encoder of a Whisper of any size and version, without the weights of its decoder.

    Raises:
        TeacherError: If a setting is not supported or the weights don't fit.
    """
    folder.require(_SUPPORTED)
    config = folder.config
    try:
        sizes = {
            "bands": int(config.get("num_mel_bins", 80)),
            "dim": int(config["d_model"]),
            "layers": int(config["encoder_layers"]),
            "heads": int(config["encoder_attention_heads"]),
            "ffn_dim": int(config["encoder_ffn_dim"]),
            "positions": int(config.get("max_source_positions", 1500)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(f"{folder.name} has a config.json without a usable value: {error}") from error
    if min(sizes.values()) < 1 or sizes["dim"] % sizes["heads"]:
        raise TeacherError(f"{folder.name} has sizes from which no model can be built: {sizes}")
    weights = {
        key.removeprefix(prefix): value
        for prefix in _PREFIXES
        for key, value in folder.weights().items()
        if key.startswith(prefix)
    }
    encoder = load_model(lambda: WhisperEncoder(**sizes), weights, sizes["layers"], folder.name)
    return WhisperTeacher(encoder, name=folder.name, device=device)
