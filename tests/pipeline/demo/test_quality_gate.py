"""A gate on what distillation teaches: a student that is trained for seconds must know phones that it did not know before.

Figures that only compare losses would not notice a wrong sign or targets of another frame. Each such fault is shown to fail.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ray_distill.pipeline.config import Config, load_config
from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import PHONES_FILE, Task, read_task
from ray_distill.student import Student, load_student
from ray_distill.student.objectives import layer_prediction
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.targets.target_batch import CodedTargets
from ray_distill.teacher_cache.teachers import load_teacher

from ...tiny import CONFIGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("espeakng_loader") is None,
        reason="espeakng-loader is not installed (it is the [demo] extra)",
    ),
]

MARGIN = 0.08
"""Share of the frames by which the student must beat the spectrum and a student with random weights."""
SETTINGS = [
    "masks.draws=0",
    "train.workers=1",
    "train.batch_seconds=12",
    "train.max_steps=60",
    "train.validate_every=60",
]


@dataclass(frozen=True)
class Small:
    """A small cache of the demo's teacher, and what its phones are probed with."""

    config: Config
    readers: tuple[CacheReader, CacheReader]
    task: Task

    def errors(self, folder: Path) -> dict[str, float]:
        """Train a student and return the phone errors of log-mel bands, of its random weights and of what it learnt."""
        architecture = self.config.resolve_student(len(self.readers[0].layers), self.readers[0].dim)
        train(architecture, self.config.train, *self.readers, folder)
        torch.manual_seed(0)
        sources = [
            FeatureSource.log_mel(),
            FeatureSource.of_student(Student(architecture).eval(), "untrained"),
            FeatureSource.of_student(load_student(folder / "checkpoints" / "last").eval(), "distilled"),
        ]
        found = run_probes(self.task, sources, epochs=8, on_progress=lambda line: None)
        return {outcome.source.split(",")[0]: outcome.value for outcome in found}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("gate")
    corpus = make_demo_corpus(folder / "corpus", minutes=1.5)
    config = load_config(CONFIGS / "demo.yaml", [f"corpus.path={corpus}", *SETTINGS])
    teacher = load_teacher(config.teacher.checkpoint)
    index = index_corpus(corpus, output=folder / "index")
    layers = tuple(range(1, teacher.num_layers + 1))
    spec = CacheSpec(
        teacher=teacher.fingerprint,
        num_layers=teacher.num_layers,
        dim=teacher.dim,
        layers=layers,
        masks=config.masks,
        codec=config.cache.codec,
        corpus=index.fingerprint,
        shard_seconds=180,
        batch_seconds=30,
    )
    plan = plan_shards(index.utterances, spec.shard_seconds)
    build_cache(folder / "cache", spec, plan, teacher.name, teacher_name=teacher.name, workers=None)
    train_reader, validation_reader = (
        CacheReader(str(folder / "cache"), split, layers) for split in ("train", "validation")
    )
    return Small(config, (train_reader, validation_reader), read_task(corpus / PHONES_FILE))


def passes(errors: dict[str, float]) -> bool:
    return errors["distilled"] < min(errors["log-mel"], errors["untrained"]) - MARGIN


def test_a_student_learns_phones(small: Small, tmp_path: Path) -> None:
    errors = small.errors(tmp_path / "run")
    assert passes(errors), errors


def _shuffled(decode: Callable[[CodedTargets], Tensor], coded: CodedTargets) -> Tensor:
    targets = decode(coded)
    return targets[:, :, torch.randperm(targets.shape[2])]


def _noise(decode: Callable[[CodedTargets], Tensor], coded: CodedTargets) -> Tensor:
    targets = decode(coded)
    return targets.std() * torch.randn(targets.shape)


@pytest.mark.parametrize("fault", [_shuffled, _noise])
def test_wrong_targets_do_not_pass(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Tensor]
) -> None:
    decode = CodedTargets.decode
    monkeypatch.setattr(CodedTargets, "decode", lambda coded: fault(decode, coded))
    errors = small.errors(tmp_path / "run")
    assert not passes(errors), errors


def test_a_wrong_sign_does_not_pass(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_prediction.head_loss

    def wrong(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        total, errors, similarities = right(*arguments)  # type: ignore[arg-type]
        return -total, errors, similarities

    monkeypatch.setattr(layer_prediction, "head_loss", wrong)
    try:
        errors = small.errors(tmp_path / "run")
    except FloatingPointError:
        return  # The weights grew without bound.
    assert not passes(errors), errors
