"""What differs between two configurations is told by its keys."""

from ray_distill.pipeline.composition.config_difference import told_differences


def test_keys_are_told_with_both_values() -> None:
    old = {"train": {"seed": 0, "epochs": 3}, "student": {}, "teachers": [{"name": "b", "weight": 0.5}]}
    new = {"train": {"seed": 9, "epochs": 3}, "student": {"heads": "split"}, "teachers": [{"name": "b", "weight": 7}]}
    assert told_differences(old, old) == ""
    assert told_differences(old, new) == (
        'train.seed is 0 there and 9 here, student.heads is not set there and "split" here, '
        "teachers.b.weight is 0.5 there and 7 here"
    )
    assert told_differences(new | {"name": "x"}, old).endswith("teachers.b.weight is 7 there and 0.5 here, and 1 more")
