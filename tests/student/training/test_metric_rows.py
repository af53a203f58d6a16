"""The last training row, which progress shows each second."""

from pathlib import Path

import pytest

from ray_distill.student.training.metric_rows import read_last_train_row

TRAIN = '{"kind": "train", "step": %d, "loss": 0.5}\n'


def test_the_last_complete_training_row_is_read_without_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_last_train_row(path) is None
    validation = '{"kind": "validation", "step": 8, "loss": 0.4}\n'
    path.write_text("damaged\n" + TRAIN % 7 + validation + '{"kind": "train", "st')
    row = read_last_train_row(path)
    assert row is not None and row["step"] == 7


def test_a_damaged_last_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(TRAIN % 1 + "damaged\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged in line 2"):
        read_last_train_row(path)
