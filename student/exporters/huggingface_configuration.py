"""Configuration of a distilled student for transformers; copied into every exported folder."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig


class DistilledStudentConfig(PretrainedConfig):
    """What the student is, where it comes from, and the options of its task heads.

    Attributes:
        student: architecture, as `PortableStudent` takes it.
        origin: what the export says of itself.
        use_weighted_layer_sum: task heads see a learnt weighted mean of all hidden states, as in SUPERB, not the last one.
        hidden_size, num_hidden_layers, vocab_size: as usual in transformers; the last for CTC.
        inputs_to_logits_ratio: samples between frames (after a time reduction too, whose frames are repeated); transformers'
            speech recognition cuts long audio into chunks by it.
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
        # transformers makes one without arguments to compare with.
        self.hidden_size: Any = student["encoder_embed_dim"] if student else None
        self.num_hidden_layers: Any = len(student["reuses"]) if student else None
        self.inputs_to_logits_ratio: Any = math.prod(layer[2] for layer in student["conv_layers"]) if student else None
        for derived in ("hidden_size", "num_hidden_layers", "inputs_to_logits_ratio"):
            others.pop(derived, None)
        super().__init__(pad_token_id=pad_token_id, **others)
