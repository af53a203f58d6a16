"""w2v-BERT 2.0 as a teacher: a Conformer over pairs of log-mel frames.

Shapes: B utterances, S samples, N mel frames (10 ms), M mel bands, T frames (20 ms), D width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_distill.teacher_cache.frames import num_frames, padding_mask
from ray_distill.teacher_cache.spectrograms import MEL_HOP, MEL_WINDOW, kaldi_fbank
from ray_distill.teacher_cache.teachers.blocks.conformer_layer import ConformerLayer
from ray_distill.teacher_cache.teachers.huggingface_folder import HuggingFaceFolder
from ray_distill.teacher_cache.teachers.teacher import Teacher, TeacherError
from ray_distill.teacher_cache.teachers.weights import checked_mask_embedding, load_model

# Part of every fingerprint. Increase the number when a change of the arithmetic below changes results.
_ARITHMETIC = "w2v-bert-1"

_BANDS = 80
_NORMALISE_EPS = 1e-7
_FULL_SCALE = 2**15
"""Kaldi takes samples as 16-bit integers."""

# Supported values of settings. With other values the model has another architecture.
_SUPPORTED = {
    "hidden_act": ("swish", "silu"),
    "position_embeddings_type": ("relative_key",),
    "feature_projection_input_dim": (2 * _BANDS,),
    "add_adapter": (False,),
    "use_intermediate_ffn_before_adapter": (False,),
}
_EXTRACTOR = {"num_mel_bins": _BANDS, "feature_size": _BANDS, "stride": 2}

# Weights that no layer's output depends on.
_UNUSED = ("quantizer.", "project_q.", "project_hid.")


class ConformerEncoder(nn.Module):
    """Projection of two mel frames, and Conformer layers. Parameters have transformers' names."""

    def __init__(self, dim: int, layers: list[ConformerLayer], eps: float) -> None:
        super().__init__()
        self.feature_projection = nn.ModuleDict(
            {"layer_norm": nn.LayerNorm(2 * _BANDS, eps), "projection": nn.Linear(2 * _BANDS, dim)}
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})


class Wav2Vec2BertTeacher(Teacher):
    """Outputs of the layers of w2v-BERT 2.0.

    The input is Kaldi's log-mel spectrogram, normalised per band over the utterance, two frames of 10 ms at a time. With an odd
    number of mel frames, transformers pads the last one and treats the pair as padding, which no other frame sees. Here this is
    the same, and the output at the pair is kept, so that there are as many frames as HuBERT has.
    """

    def __init__(
        self,
        model: ConformerEncoder,
        mask_embedding: Tensor | None,
        *,
        padding_value: float,
        name: str,
        device: str | torch.device = "cpu",
    ) -> None:
        """Wrap an encoder. Most callers use `load_teacher` instead.

        Args:
            model: Encoder with its weights.
            mask_embedding: (D,) float, or None if the model has none.
            padding_value: Value of padded mel frames, ``padding_value`` of the feature extractor.
            name: Name for people to read.
            device: Device on which the teacher computes.
        """
        self._encoder = model
        self._padding_value = padding_value
        self._layers: list[ConformerLayer] = list(model.encoder["layers"])  # type: ignore[call-overload]
        first = self._layers[0]
        self.heads: int = first.self_attn.heads
        projection: nn.Linear = model.feature_projection["projection"]  # type: ignore[assignment]
        super().__init__(
            model,
            name=name,
            num_layers=len(self._layers),
            dim=projection.out_features,
            identity=[
                _ARITHMETIC,
                self.heads,
                first.self_attn.left,
                first.final_layer_norm.eps,
                padding_value,
            ],
            mask_embedding=mask_embedding,
            device=device,
        )

    def map_bytes(self, num_samples: int) -> int:
        """See `Teacher.map_bytes`. It holds the bias of the distances and its masked copy, each (heads, T, T) float32."""
        frames: int = self.num_frames(num_samples)
        return 2 * self.heads * frames * frames * 4

    def features(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Return the (B, T, 2 M) normalised pairs of mel frames, with zeros in place of pairs of padding.

        Args:
            waveforms: (B, S) float32, zeros at padding.
            lengths: (B,) number of samples of each row.
        """
        mel_BNM = kaldi_fbank(waveforms * _FULL_SCALE, _BANDS, "povey")
        counts = (lengths - MEL_WINDOW) // MEL_HOP + 1
        padding = padding_mask(counts, mel_BNM.shape[1])[:, :, None]
        total = counts[:, None, None]
        mean = mel_BNM.masked_fill(padding, 0.0).sum(1, keepdim=True) / total
        centred = (mel_BNM - mean).masked_fill(padding, 0.0)
        variance = centred.square().sum(1, keepdim=True) / (total - 1).clamp(min=1)
        mel_BNM = (centred / (variance + _NORMALISE_EPS).sqrt()).masked_fill(padding, self._padding_value)
        mel_BNM = F.pad(mel_BNM, (0, 0, 0, mel_BNM.shape[1] % 2), value=self._padding_value)
        pairs: Tensor = mel_BNM.reshape(len(mel_BNM), -1, 2 * _BANDS)
        return pairs

    def layer_outputs(self, waveforms: Tensor, lengths: Tensor, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """See `Teacher.layer_outputs`."""
        projection = self._encoder.feature_projection
        features = self.features(waveforms, lengths)
        x_BTD = projection["projection"](projection["layer_norm"](features))
        frames = x_BTD.shape[1]
        x_BTD = self.masked(x_BTD, frame_mask, num_frames(lengths))
        # An utterance of a single mel frame, for which transformers gives no numbers, attends to itself.
        whole_pairs = (((lengths - MEL_WINDOW) // MEL_HOP + 1) // 2).clamp(min=1)
        padding: Tensor | None = padding_mask(whole_pairs, frames)
        if bool((whole_pairs == frames).all()):
            padding = None
        else:
            x_BTD = x_BTD.masked_fill(padding_mask(whole_pairs, frames)[:, :, None], 0.0)
        for layer in self._layers:
            x_BTD = layer(x_BTD, padding)
            yield x_BTD


def load_wav2vec2_bert(folder: HuggingFaceFolder, device: str | torch.device) -> Wav2Vec2BertTeacher:
    """Load a pre-trained w2v-BERT 2.0.

    Raises:
        TeacherError: If a setting is not supported, the model is fine-tuned, or the weights don't fit.
    """
    folder.require(_SUPPORTED)
    config = folder.config
    extractor = folder.preprocessor or {}
    for key, value in _EXTRACTOR.items():
        if extractor.get(key, value) != value:
            raise TeacherError(
                f"{folder.name} has {key} = {extractor[key]!r} in its preprocessor, but only {value} is supported"
            )
    try:
        sizes = {
            "dim": int(config.get("hidden_size", 1024)),
            "heads": int(config.get("num_attention_heads", 16)),
            "ffn_dim": int(config.get("intermediate_size", 4096)),
            "kernel": int(config.get("conv_depthwise_kernel_size", 31)),
            "left": int(config.get("left_max_position_embeddings", 64)),
            "right": int(config.get("right_max_position_embeddings", 8)),
        }
        count, eps = int(config.get("num_hidden_layers", 24)), float(config.get("layer_norm_eps", 1e-5))
        padding_value = float(extractor.get("padding_value", 0.0))
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{folder.name} has a config.json with a value of the wrong kind: {error}") from error
    if min(count, *sizes.values()) < 1 or sizes["dim"] % sizes["heads"]:
        raise TeacherError(f"{folder.name} has sizes from which no model can be built: {count} layers, {sizes}")
    mask_embedding: Tensor | None = None
    weights: dict[str, Tensor] = {}
    for full_key, weight in folder.weights().items():
        key = full_key.removeprefix("wav2vec2_bert.")
        if key == "masked_spec_embed":
            mask_embedding = weight
        elif key.startswith(("lm_head.", "classifier.", "projector.", "tdnn.", "objective.")):
            raise TeacherError(
                f"{folder.name} is a fine-tuned model, since it has the weight {full_key!r} of a task's head; use the pre-trained "
                "model that it was made from"
            )
        elif not key.startswith(_UNUSED):
            weights[key] = weight

    def build() -> ConformerEncoder:
        return ConformerEncoder(sizes["dim"], [ConformerLayer(**sizes, eps=eps) for _ in range(count)], eps)

    model = load_model(build, weights, count, folder.name)
    return Wav2Vec2BertTeacher(
        model,
        checked_mask_embedding(mask_embedding, sizes["dim"], folder.name),
        padding_value=padding_value,
        name=folder.name,
        device=device,
    )
