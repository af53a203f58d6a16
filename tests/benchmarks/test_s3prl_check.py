"""S3PRL loads an exported student. It needs its own environment, which ``benchmarks/student/s3prl_check.py`` creates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ray_distill.student import Student, save_student

from ..tiny import tiny_student

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def test_features_upstream_test_and_two_tasks(tmp_path: Path, shared: Path) -> None:
    environment = os.environ.get("S3PRL_ENVIRONMENT")
    if environment is None:
        pytest.skip("needs S3PRL in its own environment (set S3PRL_ENVIRONMENT to the one that s3prl_check.py created)")
    torch.manual_seed(0)
    save_student(Student(tiny_student()), tmp_path / "model")
    options = ["--environment", environment, "--asr-steps", "2", "--speaker-steps", "2", "--utterances", "64"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.student.s3prl_check",
            tmp_path / "model",
            *options,
            "--output",
            tmp_path / "r.json",
        ],
        check=True,
        cwd=REPOSITORY,
        env=os.environ | {"SHARED_DATA": str(shared)},
    )
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["largest_difference"] < 1e-5
    assert any("acc" in line and "nan" not in line for line in found["evaluated"]["speaker_linear_utter_libri"])
    assert any("uer" in line for line in found["evaluated"]["asr"])
