"""Objectives as a discriminated union, and their keys in the flat section ``train``."""

from typing import Any

import pydantic
import pytest

from ray_distill.student.objectives.codebook_prediction import CodebookPrediction
from ray_distill.student.objectives.layer_prediction import LayerPrediction
from ray_distill.student.objectives.mixture import Mixture, Part
from ray_distill.student.objectives.objective_keys import AnyObjective
from ray_distill.student.objectives.temporal_relation import TemporalRelation
from ray_distill.student.objectives.unit_prediction import UnitPrediction
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING
from ray_distill.student.training.train_settings import TrainSettings

OBJECTIVES = {
    "prediction": LayerPrediction,
    "star": TemporalRelation,
    "units": UnitPrediction,
    "mvq": CodebookPrediction,
}
ARCHITECTURE = ("hint_layers", "unit_dim", "codebook_hidden", "frame_weights")
"""Keys that do not change what the loss means."""


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, LayerPrediction()),
        ({"hint_weight": 0.3, "hint_layers": 2}, LayerPrediction(hint_weight=0.3, hint_layers=2)),
        (
            {"objective": "star", "loss": "l1", "relation_weights": [1, 2]},
            TemporalRelation(loss="l1", relation_weights=(1, 2)),
        ),
        (
            {
                "objective": "mixture",
                "parts": [{"settings": {"objective": n}, "from_step": 9 * (n == "mvq")} for n in ("mvq", "prediction")],
            },
            Mixture(parts=(Part(settings=CodebookPrediction(), from_step=9), Part(settings=LayerPrediction()))),
        ),
    ],
)
def test_flat_keys_choose_an_objective(keys: dict[str, Any], expected: object) -> None:
    settings = TrainSettings.model_validate({"batch_size": 2} | keys)
    assert settings.chosen_objective == expected
    # A run's recorded configuration is flat, too, and is the same configuration.
    dumped = settings.model_dump(mode="json")
    assert dumped["objective"] == keys.get("objective", "prediction")
    assert TrainSettings.model_validate(dumped) == settings


def test_every_key_of_an_objective_is_a_documented_key_of_train() -> None:
    for name, objective in OBJECTIVES.items():
        for key, field in objective.model_fields.items():
            flat = TrainSettings.model_fields[key]
            if key != "objective":
                assert (flat.annotation, flat.default) == (field.annotation, field.default)
                assert flat.description is not None and flat.description.startswith(str(field.description))
            assert (CHANGES_LOSS_MEANING in flat.metadata) == (key not in ARCHITECTURE), key
        assert f"``{name}``" in str(TrainSettings.model_fields["objective"].description)


def test_the_name_tells_objectives_apart() -> None:
    adapter: pydantic.TypeAdapter[object] = pydantic.TypeAdapter(AnyObjective)
    for name, objective in OBJECTIVES.items():
        assert adapter.validate_python({"objective": name}) == objective()
    for wrong in ({"objective": "ctc"}, {"objective": "star", "hint_weight": 1.0}):
        with pytest.raises(pydantic.ValidationError):
            adapter.validate_python(wrong)
    with pytest.raises(pydantic.ValidationError, match="'prediction', 'star', 'units', 'mvq' or 'mixture'"):
        TrainSettings(batch_size=2, objective="ctc")
