"""Configuration of a distilled student for transformers. This file is copied into each exported folder."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig


class DistilledStudentConfig(PretrainedConfig):
    """Architecture and origin of a student, and the options of its task heads.

    Attributes:
        student: Architecture, as `PortableStudent` takes it.
        origin: Origin of the student: run, teacher, corpus and configuration, where known.
        use_weighted_layer_sum: Whether task heads use a learned weighted mean of all hidden states, as in SUPERB, instead of
            the last one. Default True.
        hidden_size: Width of the encoder.
        num_hidden_layers: Number of encoder layers.
        vocab_size: Number of outputs of the CTC head. Default 32.
        inputs_to_logits_ratio: Samples between frames, with which transformers' speech recognition cuts long audio into
            chunks. A time reduction does not change it, because reduced frames are repeated.
    """

    model_type = "distilled_student"

    def __init__(
        self,
        student: dict[str, Any] | None = None,
        origin: dict[str, Any] | None = None,
        use_weighted_layer_sum: bool = True,
        vocab_size: int = 32,
        pad_token_id: int = 0,
        **others: Any,
    ) -> None:
        self.student: Any = student
        self.origin = origin
        self.use_weighted_layer_sum = use_weighted_layer_sum
        self.vocab_size = vocab_size
        # transformers creates an instance without arguments, for comparison.
        self.hidden_size: Any = student["encoder_embed_dim"] if student else None
        self.num_hidden_layers: Any = len(student["reuses"]) if student else None
        self.inputs_to_logits_ratio: Any = math.prod(layer[2] for layer in student["conv_layers"]) if student else None
        for derived in ("hidden_size", "num_hidden_layers", "inputs_to_logits_ratio"):
            others.pop(derived, None)
        super().__init__(pad_token_id=pad_token_id, **others)
