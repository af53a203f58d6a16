"""Validation: the best constant prediction, and a cache that lacks utterances."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_distill.student import Student
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.target_source import cached_source
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.student.training.validation import TargetVariance, make_distiller, validate
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards

from ...tiny import TEACHER

Settings = Callable[..., TrainSettings]
Rows = Callable[..., list[dict[str, Any]]]


def test_the_variance_is_the_loss_of_the_best_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    variance = TargetVariance(2, 5, Rank())
    frames = []
    for count in (4, 7):
        targets = 100 + torch.randn(3, 2, count, 5, generator=generator)
        lengths = torch.tensor([count, count - 2, 1])
        targets[2, :, 1:] = torch.nan  # Padding may hold anything.
        variance.add(targets, lengths)
        frames += [targets[b, :, :n] for b, n in enumerate(lengths.tolist())]
    together = torch.cat(frames, 1).double()
    expected = (together - together.mean(1, keepdim=True)).square().mean((1, 2))
    torch.testing.assert_close(variance.per_layer(), expected, rtol=1e-9, atol=0)


def test_the_first_validation_has_the_loss_of_the_best_constant(
    tmp_path: Path, tiny: StudentConfig, settings: Settings, readers: tuple[CacheReader, CacheReader], rows: Rows
) -> None:
    train(tiny, settings(max_steps=1, hint_weight=0.2), *readers, tmp_path / "run")
    first, last = rows(tmp_path / "run", "validation")
    targets = torch.cat([item.targets for item in readers[1]], 1).double()
    expected = targets.var(1, correction=0).mean(1)
    assert [first[f"constant_layer_0{n}"] for n in (1, 2)] == pytest.approx(expected.tolist(), rel=1e-6)
    assert first["constant_loss"] == pytest.approx(float(0.2 * expected[0] + expected[1]), rel=1e-6)
    assert not any("constant" in key for key in last), "targets don't change"
    train(tiny, settings(max_steps=1, loss="l1"), *readers, tmp_path / "l1")
    assert not any("constant" in key for row in rows(tmp_path / "l1", "validation") for key in row)


def test_ranks_validate_their_shares_together(
    tiny: StudentConfig, settings: Settings, readers: tuple[CacheReader, CacheReader]
) -> None:
    chosen = settings(batch_size=1)
    distiller = make_distiller(Student(tiny), chosen, readers[1])
    whole = validate(distiller, readers[1], chosen, Rank(), constant=True)

    @dataclass(frozen=True)
    class Half(Rank):
        """One of two ranks, which keeps what it would sum, and adds what the other one kept."""

        kept: list[torch.Tensor] = field(default_factory=list)
        others: list[torch.Tensor] | None = None

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            self.kept.append(values.clone())
            return values if self.others is None else values.add_(self.others[len(self.kept) - 1])

    def run(index: int, others: list[torch.Tensor] | None = None) -> tuple[dict[str, float], list[torch.Tensor]]:
        rank = Half(index, 2, others=others)
        return validate(distiller, readers[1], chosen, rank, constant=True), rank.kept

    kept = [run(index)[1] for index in (0, 1)]
    for index in (0, 1):
        assert run(index, kept[1 - index])[0] == pytest.approx(whole, rel=1e-9)


def test_training_and_validation_without_failed_utterances(
    tmp_path: Path,
    cache_spec: Callable[..., CacheSpec],
    source_utterances: list[Utterance],
    tiny: StudentConfig,
    settings: Settings,
    rows: Rows,
) -> None:
    """A run also records where it was resumed, and is not resumed with other utterances."""
    spec = cache_spec()

    def build(name: str) -> list[CacheReader]:
        plan = plan_shards(source_utterances, spec.shard_seconds)
        build_cache(tmp_path / name, spec, plan, TEACHER, teacher_name=TEACHER, workers=None)
        return [CacheReader(tmp_path / name, split) for split in ("train", "validation")]

    whole = cached_source(build("whole")[0])
    victims = [next(u for u in source_utterances if u.split == split) for split in ("train", "validation")]
    for victim in victims:
        Path(victim.path).unlink()
    readers = build("cache")
    assert [len(reader) for reader in readers] == [8, 2]
    source = cached_source(readers[0])
    assert source.key != whole.key
    for steps in (2, 4):
        train(tiny, settings(max_steps=steps, validate_every=1), *readers, tmp_path / "run", source=source)
    assert [row["loss"] > 0 for row in rows(tmp_path / "run")] == [True] * 4
    (resumed,) = rows(tmp_path / "run", "resumed")
    assert resumed["step"] == 2 and resumed["time"].endswith("UTC")
    with pytest.raises(ValueError, match="was trained with the cache .* but now the targets come from the cache"):
        train(tiny, settings(max_steps=6), *(CacheReader(tmp_path / "whole", s) for s in ("train", "validation")),
              tmp_path / "run", source=whole)  # fmt: skip
