"""Names in sentences."""

import pytest

from ray_distill.pipeline.composition.suggestions import enumerated
from ray_distill.pipeline.reports.ablation_summary import layer_range


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "a", "c"], "a, b and c"), (["a", "a"], "a")],
)
def test_names_are_enumerated_once(names: list[str], text: str) -> None:
    assert enumerated(iter(names)) == text


def test_layers_of_several_teachers_are_enumerated() -> None:
    layers = [f"{name}_{number:02}" for name in ("a", "b", "c") for number in (1, 2)]
    assert layer_range(layers) == "a layers 1-2, b layers 1-2 and c layers 1-2"
