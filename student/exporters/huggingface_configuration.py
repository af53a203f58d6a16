"""Configuration of a distilled student for transformers. This file is copied into each exported folder."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig


class DistilledStudentConfig(PretrainedConfig):
    """Architecture and origin of a student, and the options that a fine-tuning may change. Names follow `HubertConfig`.

    Attributes:
        student: Architecture, as `PortableStudent` takes it. The attributes that `architecture` returns follow from it.
        origin: Origin of the student: run, teacher, corpus and configuration, where known.
        use_weighted_layer_sum: Whether task heads use a learned weighted mean of all hidden states, as in SUPERB, instead of
            the last one. Default True.
        vocab_size: Number of outputs of the CTC head. Default 32.
        hidden_dropout, attention_dropout, activation_dropout, feat_proj_dropout: Dropout probabilities after attention and
            feed-forward layers, of attention maps, inside feed-forward layers, and of the projected features. Default None:
            those of the distillation.
        final_dropout: Dropout probability before the CTC head. Default 0.
        apply_spec_augment: Whether training masks features (SpecAugment). Default True.
        mask_time_prob, mask_time_length, mask_time_min_masks: Share of frames that training masks in spans, at most; length of
            a span; and smallest number of spans. Defaults 0.05, 10 and 2, as in HuBERT.
        mask_feature_prob, mask_feature_length, mask_feature_min_masks: The same for channels. Defaults 0, 10 and 0.
        ctc_loss_reduction: ``mean`` or ``sum``. Default ``mean``.
        ctc_zero_infinity: Whether infinite CTC losses count as zero. Default True.
        layerdrop, add_adapter: Not supported; they must be 0 and False.
    """

    model_type = "distilled_student"

    def __init__(
        self,
        student: dict[str, Any] | None = None,
        origin: dict[str, Any] | None = None,
        use_weighted_layer_sum: bool = True,
        vocab_size: int = 32,
        hidden_dropout: float | None = None,
        attention_dropout: float | None = None,
        activation_dropout: float | None = None,
        feat_proj_dropout: float | None = None,
        final_dropout: float = 0.0,
        apply_spec_augment: bool = True,
        mask_time_prob: float = 0.05,
        mask_time_length: int = 10,
        mask_time_min_masks: int = 2,
        mask_feature_prob: float = 0.0,
        mask_feature_length: int = 10,
        mask_feature_min_masks: int = 0,
        ctc_loss_reduction: str = "mean",
        ctc_zero_infinity: bool = True,
        layerdrop: float = 0.0,
        add_adapter: bool = False,
        pad_token_id: int = 0,
        **others: Any,
    ) -> None:
        self.student: Any = student
        self.origin = origin
        self.use_weighted_layer_sum = use_weighted_layer_sum
        self.vocab_size = vocab_size
        # transformers creates an instance without arguments, for comparison.
        dropouts = student or dict.fromkeys(
            ("dropout", "attention_dropout", "activation_dropout", "dropout_input"), 0.0
        )
        self.hidden_dropout = dropouts["dropout"] if hidden_dropout is None else hidden_dropout
        self.attention_dropout = dropouts["attention_dropout"] if attention_dropout is None else attention_dropout
        self.activation_dropout = dropouts["activation_dropout"] if activation_dropout is None else activation_dropout
        self.feat_proj_dropout = dropouts["dropout_input"] if feat_proj_dropout is None else feat_proj_dropout
        self.final_dropout = final_dropout
        self.apply_spec_augment = apply_spec_augment
        self.mask_time_prob = mask_time_prob
        self.mask_time_length = mask_time_length
        self.mask_time_min_masks = mask_time_min_masks
        self.mask_feature_prob = mask_feature_prob
        self.mask_feature_length = mask_feature_length
        self.mask_feature_min_masks = mask_feature_min_masks
        self.ctc_loss_reduction = ctc_loss_reduction
        self.ctc_zero_infinity = ctc_zero_infinity
        self.layerdrop = layerdrop
        self.add_adapter = add_adapter
        for name, value in self.architecture().items():
            setattr(self, name, others.pop(name, value))
        super().__init__(pad_token_id=pad_token_id, **others)

    def architecture(self) -> dict[str, Any]:
        """Return the attributes of `HubertConfig` that follow from ``student``.

        ``hidden_size`` is the width of the hidden states, which with features ``heads`` is the teacher's.
        ``inputs_to_logits_ratio`` are the samples between frames; a time reduction does not change it, because reduced
        frames are repeated.
        """
        student = self.student
        if student is None:
            return {}
        channels, kernels, strides = (list(values) for values in zip(*student["conv_layers"]))  # noqa: B905 (Python 3.9)
        heads = student["features"] == "heads"
        return {
            "hidden_size": student["target_dim"] if heads else student["encoder_embed_dim"],
            "num_hidden_layers": len(student["reuses"]),
            "num_attention_heads": student["encoder_attention_heads"],
            "intermediate_size": student["encoder_ffn_embed_dim"],
            "conv_dim": channels,
            "conv_kernel": kernels,
            "conv_stride": strides,
            "conv_bias": student["conv_bias"],
            "num_feat_extract_layers": len(kernels),
            "inputs_to_logits_ratio": math.prod(strides),
        }

    def check(self) -> None:
        """Raise ValueError if a setting was changed that a distilled student can't follow."""
        for name, value in self.architecture().items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but the weights of this student need {value!r}; it can't be changed"
                )
        if self.layerdrop:
            raise ValueError(
                f"layerdrop is {self.layerdrop}, but layers can't be dropped, because later layers may reuse their maps; set it to 0"
            )
        if self.add_adapter:
            raise ValueError("add_adapter is not supported by a distilled student; set it to False")
        if self.ctc_loss_reduction not in ("mean", "sum"):
            raise ValueError(f"ctc_loss_reduction must be mean or sum, not {self.ctc_loss_reduction!r}")

    def portable(self) -> dict[str, Any]:
        """Return the architecture as `PortableStudent` takes it, with the dropout probabilities of this configuration."""
        return {
            **self.student,
            "dropout": self.hidden_dropout,
            "attention_dropout": self.attention_dropout,
            "activation_dropout": self.activation_dropout,
            "dropout_input": self.feat_proj_dropout,
        }
