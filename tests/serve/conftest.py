"""A real student, small enough for tests."""

import pytest
import torch

from student import Student, StudentConfig

TINY = StudentConfig(
    conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (8, 2, 2)),
    encoder_layers=3,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=24,
    encoder_attention_heads=2,
    conv_pos=8,
    conv_pos_groups=2,
    target_dim=32,
)


@pytest.fixture(scope="session")
def student() -> Student:
    """Three layers, 16 wide, seeded random weights."""
    torch.manual_seed(0)
    return Student(TINY).eval()
