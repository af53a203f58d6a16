"""Tiny models of transformers with random weights, saved with ``save_pretrained``."""

from pathlib import Path
from typing import Any

import torch
import transformers

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_source_positions": 100,
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
AST = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_mel_bins": 32,
    "patch_size": 8,
    "time_stride": 5,
    "frequency_stride": 6,
    "max_length": 240,
}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "left_max_position_embeddings": 6,
    "right_max_position_embeddings": 3,
    "conv_depthwise_kernel_size": 5,
}
SETTINGS: dict[str, dict[str, Any]] = {"whisper": WHISPER, "wav2vec2-bert": BERT, "audio-spectrogram-transformer": AST}


LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
"""Settings of the Large models of HuBERT, WavLM and wav2vec 2.0, and of XLS-R."""


def tiny_model(kind: str, **changes: Any) -> Any:
    """Return the model (for pre-training, if there is such a class) in float32 and evaluation mode."""
    config = transformers.AutoConfig.for_model(kind, **SETTINGS.get(kind, ENCODER) | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in ("unispeech-sat", "wav2vec2"):
            model = transformers.AutoModelForPreTraining.from_config(config)
        else:
            model = transformers.AutoModel.from_config(config)
        # With transformers' small standard deviations, layers would be almost equal and hide errors.
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.dim() < 2 or "masked_spec_embed" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape)
            else:
                parameter.data.normal_(0.0, parameter[0].numel() ** -0.5)
    return model.eval()


def save_tiny(kind: str, folder: Path, **changes: Any) -> str:
    """Save `tiny_model` and return the folder."""
    tiny_model(kind, **changes).save_pretrained(folder)
    return str(folder)
