"""What a validation loss means: its comparison with the best constant prediction of the targets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_distill.pipeline.reports.training_charts import Rows, layer_label, rows_of_kind

_PREFIX = "constant_layer_"


@dataclass(frozen=True)
class ExplainedVariance:
    """The last validation of a training, compared with the best constant prediction.

    Attributes:
        constant_loss: Loss of predicting, in each layer, the mean of the validation targets.
        share: By layer, as `layer_label` names it, the share of the targets' variance that the student explains: 1 - its squared
            error / variance. It is negative if the constant is better.
    """

    constant_loss: float
    share: dict[str, float]


def shown_share(share: float, layer: str) -> str:
    """Return the share of a layer's variance that a student explains as words, such as ``12.3% of layer 12``."""
    if share >= 0:
        return f"{share:.1%} of layer {layer}"
    return f"none of layer {layer}, whose error is {1 - share:,.3g} times that of a constant"


def explained_variance(metrics: Rows) -> ExplainedVariance | None:
    """Return the comparison. None without a validation, with another loss than the squared error, and for runs of earlier versions."""
    validation = rows_of_kind(metrics, "validation")
    constants: Mapping[str, Any] | None = next((row for row in validation if "constant_loss" in row), None)
    if constants is None:
        return None
    last = validation[-1]
    variances = {key.removeprefix(_PREFIX): value for key, value in constants.items() if key.startswith(_PREFIX)}
    share = {
        layer_label(name, ""): 1 - last[f"layer_{name}"] / variance
        for name, variance in sorted(variances.items())
        if variance > 0 and f"layer_{name}" in last
    }
    return ExplainedVariance(constants["constant_loss"], share)
