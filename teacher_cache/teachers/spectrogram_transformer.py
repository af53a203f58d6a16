"""The Audio Spectrogram Transformer (AST) as a teacher, with patches of a log-mel spectrogram instead of frames.

Shapes: B utterances, S samples, M mel bands, N mel frames, R rows, C columns, T = C x R patches, D width.
"""

import re
from collections.abc import Iterator

import pydantic
import torch
from torch import Tensor, nn

from ray_distill.teacher_cache.frames import Length
from ray_distill.teacher_cache.patch_geometry import PatchGeometry, flatten_by_column
from ray_distill.teacher_cache.spectrograms import MEL_HOP, MEL_WINDOW
from ray_distill.teacher_cache.teachers.blocks.prenorm_layer import PreNormLayer
from ray_distill.teacher_cache.teachers.huggingface_folder import HuggingFaceFolder
from ray_distill.teacher_cache.teachers.teacher import Teacher, TeacherError
from ray_distill.teacher_cache.teachers.weights import load_model

# Part of every fingerprint. Increase the number when a change of the arithmetic below changes results.
_ARITHMETIC = "ast-1"

# Supported values of settings. With other values the model has another architecture.
_SUPPORTED = {"hidden_act": ("gelu",)}

# transformers' names of AST's weights, and ours, which follow transformers' Whisper.
_NAMES = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r"self_attn.\1_proj."),
    (r"attention\.output\.dense\.", "self_attn.out_proj."),
    (r"intermediate\.dense\.", "fc1."),
    (r"(?<!attention\.)output\.dense\.", "fc2."),
    (r"layernorm_before\.", "self_attn_layer_norm."),
    (r"layernorm_after\.", "final_layer_norm."),
    (r"^embeddings\.(patch_embeddings\.)?", ""),
    (r"^layernorm\.", "layer_norm."),
)


class SpectrogramTransformer(nn.Module):
    """The network of AST, a DeiT: patch embedding, two extra tokens, learned positions and Transformer layers."""

    def __init__(self, geometry: PatchGeometry, columns: int, dim: int, layers: list[PreNormLayer], eps: float) -> None:
        super().__init__()
        strides = geometry.frequency_stride, geometry.time_stride
        self.projection = nn.Conv2d(1, dim, geometry.patch_size, strides)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.zeros(1, columns * geometry.rows + 2, dim))
        self.layers = nn.ModuleList(layers)
        # Only the classifier uses this layer norm. No layer's output depends on it.
        self.layer_norm = nn.LayerNorm(dim, eps)


class SpectrogramTeacher(Teacher):
    """AST's layer outputs at the patches of real audio, column by column (see `PatchGeometry`).

    As published, every utterance is padded to the model's length (10.24 s) and attention covers all of it, including the
    classifier's two tokens, so outputs can't depend on the batch. Outputs at padding and at the two tokens are left out. Longer
    audio is an error. AST has no mask embedding; with ``mean-mask:``, masked patches become the mean patch.
    """

    def __init__(
        self,
        model: SpectrogramTransformer,
        geometry: PatchGeometry,
        mel_frames: int,
        *,
        name: str,
        device: str | torch.device = "cpu",
    ) -> None:
        """Wrap a network. Most callers use `load_teacher` instead.

        Args:
            model: Network with its weights.
            geometry: Geometry of its patches.
            mel_frames: Number of mel frames N that the model was trained on.
            name: Name for people to read.
            device: Device on which the teacher computes.
        """
        self.patches = self._geometry = geometry
        self._mel_frames = mel_frames
        self.min_samples = geometry.min_samples
        self.max_samples = MEL_WINDOW + mel_frames * MEL_HOP - 1
        dim = model.cls_token.shape[2]
        settings = geometry.model_dump(mode="json")
        heads, eps = model.layers[0].heads, model.layer_norm.eps
        super().__init__(
            model,
            name=name,
            num_layers=len(model.layers),
            dim=dim,
            identity=[_ARITHMETIC, settings, mel_frames, heads, eps],
            device=device,
        )
        self._network = model

    def num_frames(self, num_samples: Length) -> Length:
        """Return the number of patches of an utterance."""
        return self._geometry.num_patches(num_samples)

    def layer_outputs(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """See `Teacher.layer_outputs`."""
        network, patches = self._network, self.num_frames(waveforms.shape[1])
        x_BTD = flatten_by_column(network.projection(self._geometry.spectrogram(waveforms, lengths, self._mel_frames)))
        x_BTD = torch.cat(
            [self.masked(x_BTD[:, :patches], frame_mask, self.num_frames(lengths)), x_BTD[:, patches:]], 1
        )
        tokens = torch.cat([network.cls_token, network.distillation_token], 1)
        positions_by_row = (
            network.position_embeddings[:, 2:].transpose(1, 2).reshape(1, self.dim, self._geometry.rows, -1)
        )
        positions = torch.cat([network.position_embeddings[:, :2], flatten_by_column(positions_by_row)], 1)
        x_BTD = torch.cat([tokens.expand(len(x_BTD), -1, -1).to(x_BTD.dtype), x_BTD], 1) + positions
        for layer in network.layers:
            x_BTD = layer(x_BTD, None)
            yield x_BTD[:, 2 : 2 + patches]


def load_spectrogram_transformer(folder: HuggingFaceFolder, device: str | torch.device) -> SpectrogramTeacher:
    """Load a pre-trained or fine-tuned AST, without the weights of its classifier.

    Raises:
        TeacherError: If a setting is not supported or the weights don't fit.
    """
    folder.require(_SUPPORTED)
    config = folder.config
    geometry_keys = ("num_mel_bins", "patch_size", "time_stride", "frequency_stride")
    extractor = folder.preprocessor or {}
    normalisation = {key: extractor[key] for key in ("mean", "std") if key in extractor}
    if not extractor.get("do_normalize", True):
        normalisation = {"mean": 0.0, "std": 0.5}
    try:
        geometry = PatchGeometry(**{key: config[key] for key in geometry_keys if key in config}, **normalisation)
        dim, heads = int(config.get("hidden_size", 768)), int(config.get("num_attention_heads", 12))
        ffn_dim, count = int(config.get("intermediate_size", 3072)), int(config.get("num_hidden_layers", 12))
        mel_frames, eps = int(config.get("max_length", 1024)), float(config.get("layer_norm_eps", 1e-12))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise TeacherError(
            f"{folder.name} has an invalid setting of its patches: {first['loc']} {first['msg']}"
        ) from error
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{folder.name} has a config.json with a value of the wrong kind: {error}") from error
    columns = geometry.columns_of(mel_frames, geometry.time_stride)
    if min(dim, heads, ffn_dim, count, columns) < 1 or dim % heads:
        raise TeacherError(
            f"{folder.name} has sizes from which no model can be built: {count} layers of width {dim} with {heads} heads, "
            f"{columns} columns of patches"
        )
    biases = "qkv" if config.get("qkv_bias", True) else ""

    def build() -> SpectrogramTransformer:
        layers = [PreNormLayer(dim, heads, ffn_dim, biases, eps) for _ in range(count)]
        return SpectrogramTransformer(geometry, columns, dim, layers, eps)

    weights = {
        _our_name(key.removeprefix("audio_spectrogram_transformer.")): value
        for key, value in folder.weights().items()
        if not key.startswith("classifier.")
    }
    model = load_model(build, weights, count, folder.name)
    return SpectrogramTeacher(model, geometry, mel_frames, name=folder.name, device=device)


def _our_name(key: str) -> str:
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key
