"""Comparison with fairseq on the same checkpoint. It needs the `[fairseq]` extra and is skipped without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.teachers import load_teacher

pytest.importorskip("fairseq", reason="fairseq is not installed (it is the [fairseq] extra), so there is no oracle")

from fairseq.data.dictionary import Dictionary
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

BASE = {"extractor_mode": "default", "conv_bias": False, "layer_norm_first": False}
LARGE = {"extractor_mode": "layer_norm", "conv_bias": True, "layer_norm_first": True}


def fairseq_model(kind: str, cfg: dict[str, Any]) -> Any:
    torch.manual_seed(11)
    if kind == "hubert":
        config = HubertConfig(**cfg, label_rate=50.0)
        model = HubertModel(config, HubertPretrainingConfig(), [Dictionary()])
    else:
        model = Wav2Vec2Model(Wav2Vec2Config(**cfg, quantize_targets=True, latent_vars=4, latent_groups=2))
    with torch.no_grad():  # Identity norms and zero biases, fairseq's initial values, would hide mistakes.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def fairseq_layers(model: Any, waveform: Tensor, mask: Tensor | None) -> Tensor:
    """Return the (L, T, D) outputs of fairseq's Transformer layers for one (S,) waveform."""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0])) for layer in model.encoder.layers]
    if mask is not None:
        model.apply_mask = lambda x, *_, **__: (torch.where(mask[None, :, None], model.mask_emb, x), mask[None])
    model(waveform[None], mask=mask is not None, features_only=True)
    for hook in hooks:
        hook.remove()
    frames = num_frames(len(waveform))  # wav2vec 2.0 pads to an even number of frames.
    return torch.stack([output[:frames, 0] for output in outputs])


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2"])
@pytest.mark.parametrize("size", ["base", "large", "equal widths"])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_agree_with_fairseq(kind: str, size: str, masked: bool, tmp_path: Path) -> None:
    channels = 48 if size == "equal widths" else 32
    cfg: dict[str, Any] = {
        **(LARGE if size == "large" else BASE),
        "encoder_layers": 3,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 4,
        "conv_feature_layers": f"[({channels},10,5)] + [({channels},3,2)] * 4 + [({channels},2,2)] * 2",
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "final_dim": 16,
    }
    model = fairseq_model(kind, cfg)
    path = tmp_path / "checkpoint.pt"
    content = {
        "args": None,
        "cfg": {"model": {"_name": kind, **cfg}, "task": {"normalize": size == "large", "sample_rate": 16_000}},
        "model": model.state_dict(),
        "task_state": {"dictionaries": [Dictionary()]},
    }
    torch.save(content, path)
    teacher = load_teacher(str(path))
    generator = torch.Generator().manual_seed(4)
    for samples in (16_000, 7_777, 3_000):
        waveform = 0.1 * torch.randn(samples, generator=generator) + 0.05
        mask = torch.rand(num_frames(samples), generator=generator) < 0.4 if masked else None
        fed = torch.nn.functional.layer_norm(waveform, waveform.shape) if size == "large" else waveform
        ours = teacher.hidden_states(waveform[None], frame_mask=None if mask is None else mask[None])[0]
        assert float((ours - fairseq_layers(model, fed, mask)).abs().max()) < 2e-5
