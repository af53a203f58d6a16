"""A distilled student for transformers, with task heads and a pipeline. This file is copied into each exported folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AudioClassificationPipeline, Pipeline, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .huggingface_configuration import DistilledStudentConfig
from .portable_model import PortableStudent


class DistilledStudentPreTrainedModel(PreTrainedModel):
    """Base class of the models in this file."""

    config_class = DistilledStudentConfig
    base_model_prefix = "distilled"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # A student is small, and its layers share attention maps, so all of it stays on one device.
    _no_split_modules = ["PortableStudent"]  # noqa: RUF012 (transformers declares it so)

    def __init__(self, config: DistilledStudentConfig) -> None:
        config.check()
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _Head) and module.config.use_weighted_layer_sum:
            nn.init.zeros_(module.layer_weights)
        if isinstance(module, DistilledStudentModel):
            nn.init.uniform_(module.masked_spec_embed)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = torch.utils.checkpoint.checkpoint, **others: Any
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True loses the gradients of reused attention maps; use use_reentrant=False"
            )
        if others.get("every_n_layers", 1) != 1:
            raise ValueError("a distilled student checkpoints every layer or none; leave out every_n_layers")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    def _get_feat_extract_output_lengths(self, input_lengths: Any) -> Any:
        """Return the number of frames of waveforms of these lengths (int or integer tensor)."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride):  # noqa: B905 (Python 3.9)
            input_lengths = (input_lengths - kernel) // stride + 1
        return input_lengths

    def _get_feature_vector_attention_mask(self, feature_vector_length: int, attention_mask: Tensor) -> Tensor:
        """Turn a mask of samples (B, S), 1 at real samples, into a mask of frames (B, T) bool, True at real frames."""
        counts: Tensor = self._get_feat_extract_output_lengths(attention_mask.bool().sum(-1))
        return torch.arange(feature_vector_length, device=attention_mask.device) < counts[:, None]

    def frame_mask(self, attention_mask: Tensor) -> Tensor:
        """Turn a mask of samples (B, S), 1 at real samples, into a mask of frames (B, T) bool, True at real frames."""
        frames = self._get_feat_extract_output_lengths(attention_mask.shape[1])
        return self._get_feature_vector_attention_mask(frames, attention_mask)

    def freeze_feature_encoder(self) -> None:
        """Freeze the convolutions."""
        self.base_model.student.conv_blocks.requires_grad_(False)

    def freeze_feature_extractor(self) -> None:
        """Freeze the convolutions; the name that transformers used before `freeze_feature_encoder`."""
        self.freeze_feature_encoder()

    def freeze_base_model(self) -> None:
        """Freeze the student, so that only the head and the weights of the layers are trained."""
        self.base_model.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        """Raise NotImplementedError: a speech model has no token embeddings."""
        raise NotImplementedError(
            "a distilled student has no token embeddings; for a CTC head of another size give vocab_size to from_pretrained"
        )


class DistilledStudentModel(DistilledStudentPreTrainedModel):
    """The student without a task head. Features of an utterance do not depend on the other utterances in its batch."""

    def __init__(self, config: DistilledStudentConfig) -> None:
        super().__init__(config)
        self.student = PortableStudent(config.portable())
        self.masked_spec_embed = nn.Parameter(torch.zeros(config.student["encoder_embed_dim"]))
        # DDP waits for the gradient of each trained parameter.
        self.masked_spec_embed.requires_grad_(bool(config.apply_spec_augment and config.mask_time_prob))
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return features of waveforms.

        Args:
            input_values: (B, S) float, 16 kHz mono audio in [-1, 1], not normalised.
            attention_mask: (B, S) integer, bool or float, 1 at real samples and 0 at padding on the right. Default None: no
                padding.
            mask_time_indices: (B, T) bool, True at frames to replace by the mask embedding. Default None: training draws spans
                as configured (SpecAugment), and evaluation masks nothing.
            output_attentions: Whether to return attention maps. Default: as configured.
            output_hidden_states: Whether to return all hidden states. Default: as configured.
            return_dict: Whether to return a `BaseModelOutput` instead of a tuple. Default: as configured.

        Returns:
            ``last_hidden_state`` (B, T, width), and on request ``hidden_states``: with features ``layers`` L + 1 tensors, where 0
            is the encoder's input and k the output of layer k; with features ``heads`` the heads' predictions. On request
            ``attentions``: the map (B, H, T, T) that each layer applies, its own or a reused one; after a time reduction, its
            T are reduced frames, and of a pruned layer, its H are the remaining heads, none without attention.

        Raises:
            ValueError: audio is shorter than one frame, padding precedes real samples, or a mask has another shape.
        """
        config = self.config
        lengths = None
        if attention_mask is not None:
            lengths = self._lengths(input_values, attention_mask)
        if not torch.compiler.is_compiling():
            shortest = input_values.shape[1] if lengths is None else int(lengths.min())
            if shortest < self.student.receptive_field:
                raise ValueError(
                    f"audio of {shortest} samples is too short; the minimum is {self.student.receptive_field} samples"
                )
        maps: list[Tensor] | None = None
        if config.output_attentions if output_attentions is None else output_attentions:
            maps = []
        self.student.hold_maps = config._attn_implementation == "eager"
        states = self.student(
            input_values.to(self.dtype),
            lengths,
            augment=lambda x, frames: self._mask_hidden_states(x, mask_time_indices, frames),
            checkpoint=self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None,
            maps=maps,
        )
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutput(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if wanted else None,
            attentions=None if maps is None else tuple(maps),
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _lengths(self, input_values: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Return the real samples (B,) of a mask of samples; None if nothing is padded."""
        if attention_mask.shape != input_values.shape:
            raise ValueError(
                f"attention_mask must be {tuple(input_values.shape)}, as input_values, not {tuple(attention_mask.shape)}"
            )
        real = attention_mask.bool()
        lengths = real.sum(-1)
        if torch.compiler.is_compiling():
            return lengths
        if bool(real.all()):
            return None
        if bool((real[:, 1:] > real[:, :-1]).any()):
            raise ValueError("attention_mask has padding before real samples; pad on the right")
        return lengths

    def _mask_hidden_states(
        self, hidden_states: Tensor, mask_time_indices: Tensor | None, frames: Tensor | None
    ) -> Tensor:
        """Return projected features (B, T, d) with masked frames and channels; ``frames`` (B, T) bool is False at padding."""
        config = self.config
        batch, count, width = hidden_states.shape
        augments = self.training and config.apply_spec_augment
        if mask_time_indices is not None and mask_time_indices.shape != (batch, count):
            raise ValueError(f"mask_time_indices must be {(batch, count)}, not {tuple(mask_time_indices.shape)}")
        if mask_time_indices is None and augments and config.mask_time_prob:
            lengths = [count] * batch if frames is None else frames.sum(-1).tolist()
            options = config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks
            mask_time_indices = span_mask(lengths, count, *options)
        if mask_time_indices is not None:
            masked = mask_time_indices.to(hidden_states.device, torch.bool)[..., None]
            hidden_states = torch.where(masked, self.masked_spec_embed.to(hidden_states.dtype), hidden_states)
        if augments and config.mask_feature_prob:
            options = config.mask_feature_prob, config.mask_feature_length, config.mask_feature_min_masks
            masked = span_mask([width] * batch, width, *options).to(hidden_states.device)
            hidden_states = hidden_states.masked_fill(masked[:, None], 0)
        return hidden_states


def span_mask(lengths: list[int], size: int, probability: float, length: int, minimum: int) -> Tensor:
    """Draw spans from torch's generator, as HuBERT's SpecAugment does, but from real positions only.

    Args:
        lengths: Number of real positions of each row.
        size: Number of positions with padding.
        probability: Share of a row that would be masked if no spans overlapped.
        length: Length of a span; shorter rows have shorter spans.
        minimum: Smallest number of spans, as far as they fit.

    Returns:
        (B, size) bool on the CPU, True at masked positions.
    """
    mask = torch.zeros(len(lengths), size, dtype=torch.bool)
    rounding = float(torch.rand(()))
    for row, real in zip(mask, lengths):  # noqa: B905 (Python 3.9)
        span = min(length, real)
        count = min(max(int(probability * real / length + rounding), minimum), real // span)
        for start in torch.randperm(real - span + 1)[:count].tolist():
            row[start : start + span] = True
    return mask


class _Head(DistilledStudentPreTrainedModel, ABC):
    """A student with a linear head on its features.

    Attributes:
        output_type: Class of the output.
    """

    output_type: Any

    def __init__(self, config: DistilledStudentConfig, outputs: int) -> None:
        super().__init__(config)
        self.distilled = DistilledStudentModel(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.zeros(self.distilled.student.num_features))
        self.head = nn.Linear(config.hidden_size, outputs)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return logits, and the loss if ``labels`` are given; see the class for both.

        For the other arguments see `DistilledStudentModel.forward`.

        Raises:
            ValueError: as for the student, or the labels don't fit.
        """
        config = self.config
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = self.distilled(input_values, attention_mask, None, output_attentions, True, True)
        features = output.last_hidden_state
        if config.use_weighted_layer_sum:
            weights = self.layer_weights.softmax(-1)
            features = sum(weight * state for weight, state in zip(weights, output.hidden_states))  # noqa: B905 (Python 3.9)
        real = None
        if attention_mask is not None:
            real = self._get_feature_vector_attention_mask(features.shape[1], attention_mask)
        logits = self.logits(features, real)
        result = self.output_type(
            loss=None if labels is None else self.loss(logits, labels, real),
            logits=logits,
            hidden_states=output.hidden_states if wanted else None,
            attentions=output.attentions,
        )
        return result if (config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def logits(self, features: Tensor, real: Tensor | None) -> Tensor:
        """Return the logits of features (B, T, width); ``real`` (B, T) bool is False at padding, or None if nothing is padded."""
        logits: Tensor = self.head(features)
        return logits

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        """Return the loss of logits; ``real`` as for `logits`."""


class DistilledStudentForCTC(_Head):
    """CTC head with ``config.vocab_size`` outputs, for characters or phones; ``config.pad_token_id`` is the blank.

    Logits are (B, T, V); labels are (B, N) integer, negative after a transcript's end.
    """

    output_type = CausalLMOutput

    def __init__(self, config: DistilledStudentConfig) -> None:
        super().__init__(config, config.vocab_size)
        self.dropout = nn.Dropout(config.final_dropout)

    def logits(self, features: Tensor, real: Tensor | None) -> Tensor:
        """See `_Head.logits`."""
        return super().logits(self.dropout(features), real)

    def loss(self, logits: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        """Return the CTC loss, reduced as configured."""
        config = self.config
        if int(labels.max()) >= config.vocab_size:
            raise ValueError(f"labels must be below vocab_size, which is {config.vocab_size}, not {int(labels.max())}")
        frames = torch.full(logits.shape[:1], logits.shape[1], device=logits.device) if real is None else real.sum(-1)
        spoken = labels >= 0
        return F.ctc_loss(
            F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1),
            labels.masked_select(spoken),
            frames,
            spoken.sum(-1),
            blank=config.pad_token_id,
            reduction=config.ctc_loss_reduction,
            zero_infinity=config.ctc_zero_infinity,
        )


class DistilledStudentForSequenceClassification(_Head):
    """Classification head with ``config.num_labels`` outputs, on the mean of an utterance's real frames.

    Logits are (B, C); labels are (B,) integer, for the cross-entropy.
    """

    output_type = SequenceClassifierOutput

    def __init__(self, config: DistilledStudentConfig) -> None:
        super().__init__(config, config.num_labels)

    def logits(self, features: Tensor, real: Tensor | None) -> Tensor:
        """See `_Head.logits`."""
        if real is None:
            return super().logits(features.mean(1), real)
        # Not a product: padded frames may hold anything.
        spoken = torch.where(real[..., None], features, torch.zeros_like(features))
        return super().logits(spoken.sum(1) / real.sum(1, keepdim=True), real)

    def loss(self, logits: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(logits, labels)


class DistilledStudentForAudioFrameClassification(_Head):
    """Classification head with ``config.num_labels`` outputs for each frame.

    Logits are (B, T, C); labels are (B, T) integer, negative at frames to leave out, or (B, T, C) with a 1 at the class, as
    WavLM's. The loss is the cross-entropy of real frames.
    """

    output_type = TokenClassifierOutput

    def __init__(self, config: DistilledStudentConfig) -> None:
        super().__init__(config, config.num_labels)

    def loss(self, logits: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        """Return the cross-entropy of real frames."""
        classes = labels.argmax(-1) if labels.ndim == 3 else labels
        if classes.shape != logits.shape[:2]:
            raise ValueError(
                f"labels must be {tuple(logits.shape[:2])}, one for each frame, not {tuple(classes.shape)}"
            )
        counted = classes >= 0 if real is None else real & (classes >= 0)
        return F.cross_entropy(logits[counted], classes[counted])


class DistilledStudentFeaturePipeline(AudioClassificationPipeline):
    """The task feature-extraction of transformers' pipeline for audio; transformers' own takes text.

    It takes the same inputs as the pipeline ``audio-classification``, and returns the last hidden state (1, T, width) of the frames
    of each input, without those of the padding in a batch, as nested lists, or with ``return_tensors=True`` as a tensor.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        Pipeline.__init__(self, *given, **options)  # Not that of classification, which sets a number of classes.

    def _sanitize_parameters(self, return_tensors: bool | None = None, **others: Any) -> tuple[Any, Any, Any]:
        if others:
            raise ValueError(f"feature-extraction of a distilled student has no option {next(iter(others))!r}")
        return {}, {}, {} if return_tensors is None else {"return_tensors": return_tensors}

    def _forward(self, model_inputs: Any, **options: Any) -> Any:
        """Return the last hidden state (B, T, width) and the number of frames of each input (B,)."""
        state = self.model(**model_inputs, **options).last_hidden_state
        samples = model_inputs["attention_mask"].sum(-1)
        return {"state": state, "frames": self.model._get_feat_extract_output_lengths(samples)}

    def postprocess(self, model_outputs: Any, return_tensors: bool = False) -> Any:
        """Return the last hidden state."""
        state = model_outputs["state"][:, : int(model_outputs["frames"])]
        return state if return_tensors else state.tolist()
