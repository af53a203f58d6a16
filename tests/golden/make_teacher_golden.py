"""Write teachers.safetensors: a tiny HuBERT and a tiny WavLM with seeded weights, and their layer outputs.

This needs the `[fairseq]` extra. HuBERT's outputs come from fairseq. WavLM's come from torchaudio's forward pass on a model whose
weights this script sets without our loaders; for the masked pass it inserts the mask embedding after the projection. Run it from
the repository's root: ``python tests/golden/make_teacher_golden.py``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
from safetensors.torch import save_file
from torch import Tensor
from torchaudio.models import wavlm_model

SAMPLES = 6_000
CONVOLUTIONS = "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"
SHAPE: dict[str, Any] = {
    "extractor_mode": "default",
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_feature_layers": CONVOLUTIONS,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "layer_norm_first": False,
}
RELATIVE = {
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "num_buckets": 16,
    "max_distance": 40,
    "normalize": False,
}


def seeded(shapes: dict[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """Fill the weights in the order of their names: norms near 1, all others normal with std 1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        one = name.endswith(("norm.weight", ".0.2.weight", "weight_g", "grep_a"))
        fan_in = shape[1:].numel() if len(shape) > 1 else 10
        weights[name] = 1 + 0.1 * noise if one else noise * fan_in**-0.5
    return weights


def fairseq_layers(model: HubertModel, waveform: Tensor, mask: Tensor | None) -> Tensor:
    """Return the outputs (L, T, D) of fairseq's Transformer layers for one waveform (S,)."""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0])) for layer in model.encoder.layers]
    model.apply_mask = lambda x, *_: (torch.where(mask[None, :, None], model.mask_emb, x), mask)
    model(waveform[None], mask=mask is not None, features_only=True)
    for hook in hooks:
        hook.remove()
    return torch.stack([output[:, 0] for output in outputs])


def torchaudio_wavlm(weights: dict[str, Tensor]) -> Any:
    """Return torchaudio's WavLM with weights copied one by one from fairseq's names."""
    model = wavlm_model(
        "group_norm", [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2, False, 32, 0.0, 16, 4, 2, 4,
        RELATIVE["num_buckets"], RELATIVE["max_distance"], 0.0, 48, 0.0, 0.0, False, 0.0, None,
    ).eval()  # fmt: skip

    def put(target: Tensor, name: str) -> None:
        target.data.copy_(weights[name])

    def put_pair(module: Any, name: str) -> None:
        put(module.weight, f"{name}.weight")
        put(module.bias, f"{name}.bias")

    for i, layer in enumerate(model.feature_extractor.conv_layers):
        put(layer.conv.weight, f"feature_extractor.conv_layers.{i}.0.weight")
    put_pair(model.feature_extractor.conv_layers[0].layer_norm, "feature_extractor.conv_layers.0.2")
    put_pair(model.encoder.feature_projection.layer_norm, "layer_norm")
    put_pair(model.encoder.feature_projection.projection, "post_extract_proj")
    position = model.encoder.transformer.pos_conv_embed.conv
    put(position.parametrizations.weight.original0, "encoder.pos_conv.0.weight_g")
    put(position.parametrizations.weight.original1, "encoder.pos_conv.0.weight_v")
    put(position.bias, "encoder.pos_conv.0.bias")
    put_pair(model.encoder.transformer.layer_norm, "encoder.layer_norm")
    for i, layer in enumerate(model.encoder.transformer.layers):
        prefix, attention = f"encoder.layers.{i}", layer.attention
        for j, part in enumerate(("q", "k", "v")):
            attention.attention.in_proj_weight.data[32 * j : 32 * j + 32] = weights[
                f"{prefix}.self_attn.{part}_proj.weight"
            ]
            attention.attention.in_proj_bias.data[32 * j : 32 * j + 32] = weights[
                f"{prefix}.self_attn.{part}_proj.bias"
            ]
        put_pair(attention.attention.out_proj, f"{prefix}.self_attn.out_proj")
        put_pair(attention.gru_rel_pos_linear, f"{prefix}.self_attn.grep_linear")
        put(attention.gru_rel_pos_const, f"{prefix}.self_attn.grep_a")
        put_pair(layer.layer_norm, f"{prefix}.self_attn_layer_norm")
        put_pair(layer.feed_forward.intermediate_dense, f"{prefix}.fc1")
        put_pair(layer.feed_forward.output_dense, f"{prefix}.fc2")
        put_pair(layer.final_layer_norm, f"{prefix}.final_layer_norm")
    put(
        model.encoder.transformer.layers[0].attention.rel_attn_embed.weight,
        "encoder.layers.0.self_attn.relative_attention_bias.weight",
    )
    return model


@torch.no_grad()
def main() -> None:
    """Write the file beside this script."""
    torch.manual_seed(0)
    hubert = HubertModel(HubertConfig(**SHAPE, final_dim=8, label_rate=50.0), HubertPretrainingConfig(), [None]).eval()
    shapes = {name: value.shape for name, value in hubert.state_dict().items() if not name.startswith("final_proj")}
    weights = seeded(shapes, seed=1)
    hubert.load_state_dict(weights, strict=False)

    generator = torch.Generator().manual_seed(3)
    waveform = 0.1 * torch.randn(SAMPLES, generator=generator)
    frames = (SAMPLES - 400) // 320 + 1
    mask = torch.zeros(frames, dtype=torch.bool)
    mask[2:7] = mask[11:14] = True

    wavlm_shapes = dict(shapes)
    for i in range(SHAPE["encoder_layers"]):
        attention = f"encoder.layers.{i}.self_attn"
        wavlm_shapes[f"{attention}.grep_a"] = torch.Size([1, 4, 1, 1])
        wavlm_shapes[f"{attention}.grep_linear.weight"] = torch.Size([8, 8])
        wavlm_shapes[f"{attention}.grep_linear.bias"] = torch.Size([8])
    wavlm_shapes["encoder.layers.0.self_attn.relative_attention_bias.weight"] = torch.Size([16, 4])
    wavlm_weights = seeded(wavlm_shapes, seed=2)
    wavlm = torchaudio_wavlm(wavlm_weights)
    clean = torch.stack(wavlm.extract_features(waveform[None])[0])[:, 0]
    wavlm.encoder.feature_projection.register_forward_hook(
        lambda _m, _i, out: torch.where(mask[None, :, None], wavlm_weights["mask_emb"], out)
    )
    masked = torch.stack(wavlm.extract_features(waveform[None])[0])[:, 0]

    tensors = {
        "waveform": waveform,
        "mask": mask,
        "hubert.clean": fairseq_layers(hubert, waveform, None),
        "hubert.masked": fairseq_layers(hubert, waveform, mask),
        "wavlm.clean": clean,
        "wavlm.masked": masked,
        **{f"hubert.weights.{name}": value for name, value in weights.items()},
        **{f"wavlm.weights.{name}": value for name, value in wavlm_weights.items()},
    }
    path = Path(__file__).with_name("teachers.safetensors")
    metadata = {"hubert": json.dumps({"_name": "hubert", **SHAPE}), "wavlm": json.dumps({**SHAPE, **RELATIVE})}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
