"""Whisper's encoder, one utterance at a time: a trained, full-size speech Transformer for experiments that need one."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from teacher_cache.frames import num_frames


class WhisperEncoder:
    """The encoder of a Hugging Face Whisper folder (model.safetensors, config.json).

    Args:
        folder: as ``WhisperForConditionalGeneration.save_pretrained`` writes it; only ``model.encoder.*`` is read.
        device: where it computes.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        config = json.loads((folder / "config.json").read_text())
        self.num_layers, self.dim = config["encoder_layers"], config["d_model"]
        self._heads = config["encoder_attention_heads"]
        prefix = "model.encoder."
        self._weights = {
            key.removeprefix(prefix): value.float().to(device)
            for key, value in load_file(folder / "model.safetensors").items()
            if key.startswith(prefix)
        }
        self._mel = melscale_fbanks(201, 0.0, 8000.0, config["num_mel_bins"], 16_000, "slaney", "slaney").to(device)
        self.device = torch.device(device)

    @torch.inference_mode()
    def hidden_states(self, waveform: np.ndarray) -> Tensor:
        """(S,) float32 at 16 kHz → (L, T, D) float32, T = num_frames(S) frames of 20 ms; layer k is the k-th block's output."""
        weights = self._weights
        audio = torch.from_numpy(waveform).to(self.device)
        spectrum = torch.stft(audio, 400, 160, window=torch.hann_window(400, device=self.device), return_complex=True)
        mel = (spectrum[:, :-1].abs().square().T @ self._mel).clamp(min=1e-10).log10()
        mel = (torch.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
        x = F.gelu(F.conv1d(mel.T[None], weights["conv1.weight"], weights["conv1.bias"], padding=1))
        x = F.gelu(F.conv1d(x, weights["conv2.weight"], weights["conv2.bias"], stride=2, padding=1))[0].T
        x = x[: num_frames(len(waveform))]
        x = x + weights["embed_positions.weight"][: len(x)]
        layers = []
        for number in range(self.num_layers):
            x = x + self._attention(
                self._norm(x, f"layers.{number}.self_attn_layer_norm"), f"layers.{number}.self_attn"
            )
            inner = F.gelu(self._linear(self._norm(x, f"layers.{number}.final_layer_norm"), f"layers.{number}.fc1"))
            x = x + self._linear(inner, f"layers.{number}.fc2")
            layers.append(x)
        return torch.stack(layers)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _attention(self, x: Tensor, name: str) -> Tensor:
        query, key, value = (
            self._linear(x, f"{name}.{part}_proj").view(len(x), self._heads, -1).transpose(0, 1) for part in "qkv"
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self._linear(mixed.transpose(0, 1).flatten(1), f"{name}.out_proj")
