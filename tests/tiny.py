"""The tiny teacher, student and run that the tests share. Each takes about a millisecond a step."""

from pathlib import Path
from typing import Any

import torch

from ray_distill.pipeline.config import Config, load_config
from ray_distill.student import Student, StudentConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TEACHER = "random:2x32"
"""A HuBERT of two layers, 32 wide, with seeded random weights."""
STUDENT: dict[str, Any] = {
    "conv_layers": ((8, 10, 5), *((8, 3, 2),) * 4, *((8, 2, 2),) * 2),
    "encoder_layers": 2,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "conv_pos": 8,
    "conv_pos_groups": 2,
    "target_dim": 32,
}
"""The keys of a student for both layers of `TEACHER`."""


def tiny_student(**changes: Any) -> StudentConfig:
    """Return the configuration `STUDENT` with ``changes``."""
    return StudentConfig.model_validate(STUDENT | changes)


def sharpen_attention(student: Student, std: float = 0.5) -> Student:
    """Give the linear layers of the encoder normal weights, so that attention is far from uniform and mixing up maps or rows shows."""
    with torch.no_grad():
        for module in student.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, std)
    return student


def tiny_tree(**sections: Any) -> dict[str, Any]:
    """Return a run's configuration, as read from YAML, with `TEACHER` and `STUDENT`; ``sections`` replace or add top-level keys."""
    student = {key: value for key, value in STUDENT.items() if key not in ("encoder_layers", "target_dim")}
    student["conv_layers"] = [list(layer) for layer in STUDENT["conv_layers"]]
    return {
        "name": "tiny",
        "corpus": {"path": "corpus"},
        "teacher": {"checkpoint": TEACHER},
        "cache": {"path": "cache"},
        "student": student,
        "train": {"batch_seconds": 8},
    } | sections


def demo_config(folder: Path, *overrides: str) -> Config:
    """Return the demo's configuration with a two-layer teacher; its cache is ``folder/cache``, its runs are in ``folder/runs``."""
    paths = (f"cache.path={folder / 'cache'}", f"runs={folder / 'runs'}")
    return load_config(CONFIGS / "demo.yaml", ["teacher.checkpoint=random:2x64", *paths, *overrides])
