"""A distilled student for transformers: features, CTC and classification. This file is copied into each exported folder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

from .huggingface_configuration import DistilledStudentConfig
from .portable_model import PortableStudent


class DistilledStudentPreTrainedModel(PreTrainedModel):
    """Base class of the models in this file."""

    config_class = DistilledStudentConfig
    base_model_prefix = "distilled"
    main_input_name = "input_values"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _Head) and module.config.use_weighted_layer_sum:
            nn.init.zeros_(module.layer_weights)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class DistilledStudentModel(DistilledStudentPreTrainedModel):
    """The student without heads. Features of an utterance do not depend on the other utterances in its batch."""

    def __init__(self, config: DistilledStudentConfig) -> None:
        super().__init__(config)
        self.student = PortableStudent(config.student)
        self.post_init()

    def frame_mask(self, attention_mask: Tensor) -> Tensor:
        """Turn a mask of samples (B, S), 1 at real samples, into a mask of frames (B, T) bool, True at real frames."""
        frames = self.student.num_frames(attention_mask.shape[1])
        counts: Tensor = self.student.num_frames(attention_mask.sum(-1))
        return torch.arange(frames, device=attention_mask.device) < counts[:, None]

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return features of waveforms.

        Args:
            input_values: (B, S) float, 16 kHz mono audio in [-1, 1], not normalised.
            attention_mask: (B, S) integer, 1 at real samples and 0 at padding on the right. Default None: no padding.
            output_hidden_states: Whether to return all hidden states. Default: as configured.
            return_dict: Whether to return a `BaseModelOutput` instead of a tuple. Default True.

        Returns:
            ``last_hidden_state`` (B, T, d), and on request ``hidden_states``, L + 1 tensors (B, T, d): 0 is the encoder's
            input, k the output of layer k.

        Raises:
            ValueError: audio is shorter than one frame, or padding precedes real samples.
        """
        lengths = None
        if attention_mask is not None and not bool(attention_mask.all()):
            if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
                raise ValueError("attention_mask has padding before real samples; pad on the right")
            lengths = attention_mask.sum(-1)
        shortest = input_values.shape[1] if lengths is None else int(lengths.min())
        if shortest < self.student.receptive_field:
            raise ValueError(
                f"audio of {shortest} samples is too short; the minimum is {self.student.receptive_field} samples"
            )
        states = self.student(input_values, lengths)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states) if wanted else None)
        return output.to_tuple() if return_dict is False else output


class _Head(DistilledStudentPreTrainedModel):
    """A student with a linear head on its features."""

    def __init__(self, config: DistilledStudentConfig, outputs: int) -> None:
        super().__init__(config)
        self.distilled = DistilledStudentModel(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.head = nn.Linear(config.hidden_size, outputs)
        self.post_init()

    def freeze_base_model(self) -> None:
        """Freeze the student, so that only the head and the weights of the layers are trained."""
        self.distilled.requires_grad_(False)

    def features(
        self, input_values: Tensor, attention_mask: Tensor | None, output_hidden_states: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return the input of the head (B, T, d), and the hidden states if they are requested."""
        states = self.distilled(input_values, attention_mask, output_hidden_states=True).hidden_states
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features = states[-1]
        if self.config.use_weighted_layer_sum:
            weights = self.layer_weights.softmax(-1)
            features = sum(weight * state for weight, state in zip(weights, states))  # noqa: B905 (Python 3.9)
        return features, states if wanted else None


class DistilledStudentForCTC(_Head):
    """CTC head with ``config.vocab_size`` outputs, for characters or phones; ``config.pad_token_id`` is the blank."""

    def __init__(self, config: DistilledStudentConfig) -> None:
        super().__init__(config, config.vocab_size)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return logits (B, T, V), and the CTC loss if ``labels`` are given: (B, N) integer, negative after a transcript's end.

        For the other arguments see `DistilledStudentModel.forward`.
        """
        features, states = self.features(input_values, attention_mask, output_hidden_states)
        logits = self.head(features)
        loss = None
        if labels is not None:
            mask = torch.ones_like(input_values, dtype=torch.long) if attention_mask is None else attention_mask
            frames = self.distilled.frame_mask(mask).sum(-1)
            real = labels >= 0
            log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
            loss = F.ctc_loss(
                log_probabilities,
                labels.masked_select(real),
                frames,
                real.sum(-1),
                blank=self.config.pad_token_id,
                zero_infinity=True,
            )
        output = CausalLMOutput(loss=loss, logits=logits, hidden_states=states)
        return output.to_tuple() if return_dict is False else output


class DistilledStudentForSequenceClassification(_Head):
    """Classification head with ``config.num_labels`` outputs, on the mean of an utterance's real frames."""

    def __init__(self, config: DistilledStudentConfig) -> None:
        super().__init__(config, config.num_labels)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return logits (B, C), and the cross-entropy loss if ``labels`` are given: (B,) integer.

        For the other arguments see `DistilledStudentModel.forward`.
        """
        features, states = self.features(input_values, attention_mask, output_hidden_states)
        if attention_mask is None:
            pooled = features.mean(1)
        else:
            real = self.distilled.frame_mask(attention_mask)[..., None]
            pooled = (features * real).sum(1) / real.sum(1)
        logits = self.head(pooled)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)
        return output.to_tuple() if return_dict is False else output
