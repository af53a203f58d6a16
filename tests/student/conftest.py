"""A student, settings and a cache that are small enough to train in a test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec

MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=1)


@pytest.fixture
def tiny() -> StudentConfig:
    """A student for two layers of width 32."""
    return StudentConfig(
        conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (8, 2, 2)),
        encoder_layers=2,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=24,
        encoder_attention_heads=2,
        conv_pos=8,
        conv_pos_groups=2,
        target_dim=32,
    )


@pytest.fixture
def still(tiny: StudentConfig) -> StudentConfig:
    """The same student without dropout."""
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0}
    return tiny.model_copy(update=none)


@pytest.fixture
def settings() -> Callable[..., TrainSettings]:
    """Makes settings for twelve steps (four epochs of the cache) with a row each and validations at 0, 6 and 12."""

    def make(**changes: Any) -> TrainSettings:
        values = {
            "batch_size": 3,
            "epochs": 1000,
            "max_steps": 12,
            "log_every": 1,
            "validate_every": 6,
            "learning_rate": 5e-3,
        }
        return TrainSettings.model_validate(values | changes)

    return make


@pytest.fixture
def cache(tmp_path: Path, make_cache: Callable[..., CacheSpec]) -> Path:
    """A cache with nine training and three validation utterances."""
    make_cache(tmp_path / "cache", masks=MASKS)
    return tmp_path / "cache"


@pytest.fixture
def readers(cache: Path) -> tuple[CacheReader, CacheReader]:
    """Readers of its training and its validation split."""
    return CacheReader(cache, "train"), CacheReader(cache, "validation")


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """Reads a run's rows of metrics of one kind."""

    def read(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    return read


@pytest.fixture
def last() -> Callable[[Path], dict[str, Any]]:
    """Reads the state from which a run would continue."""

    def read(folder: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(folder / "checkpoints" / "last" / "state.pt", weights_only=True)
        return state

    return read


@pytest.fixture
def assert_same_end(
    rows: Callable[..., list[dict[str, Any]]], last: Callable[[Path], dict[str, Any]]
) -> Callable[[Path, Path], None]:
    """Asserts that two runs have the same losses and, bit for bit, the same weights, averages and optimiser state."""

    def check(ours: Path, theirs: Path) -> None:
        for kind in ("train", "validation"):
            assert [(r["step"], r["loss"]) for r in rows(ours, kind)] == [
                (r["step"], r["loss"]) for r in rows(theirs, kind)
            ]
        torch.testing.assert_close(last(ours)["parts"], last(theirs)["parts"], rtol=0, atol=0)
        torch.testing.assert_close(last(ours)["random"], last(theirs)["random"], rtol=0, atol=0)
        for name in ("model.safetensors", "config.json"):
            best = [run / "checkpoints" / "best" / name for run in (ours, theirs)]
            assert best[0].read_bytes() == best[1].read_bytes()

    return check
