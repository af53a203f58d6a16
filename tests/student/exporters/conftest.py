"""A student that is exported to a Hugging Face folder, and code of such folders that stays out of the home folder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_distill.student import Student, StudentConfig
from ray_distill.student.exporters.huggingface import export_huggingface

ORIGIN = {
    "run": "tiny run",
    "teacher": "hubert_small.pt",
    "cache_fingerprint": "f00",
    "commit": "c0ffee",
    "corpus_hours": 0.96,
}


def waves() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.normal(size=samples)).astype(np.float32) for samples in (16_000, 5_000, 9_000)]


@pytest.fixture
def exported(tmp_path: Path, tiny: StudentConfig) -> tuple[Student, Path]:
    torch.manual_seed(0)
    student = Student(tiny).eval()
    export_huggingface(student, tmp_path / "tiny-student", ORIGIN)
    return student, tmp_path / "tiny-student"
