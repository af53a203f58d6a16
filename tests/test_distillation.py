"""The quality gate: a short distillation of the built-in teacher teaches the student, and a broken one is noticed.

The checks compare the student with the teacher itself, run here on the audio with masks drawn here, so that a fault in the cache, the
reader or the training loop can't hide in both sides of a comparison. Probes and training are deterministic on one machine; the
margins are wider than the differences between machines and between seeds (below two points of phone error).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from ray_distill.pipeline.config import Config, load_config
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import PHONES_FILE, read_task
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.student import Student, load_student
from ray_distill.student.model.position_encoding import PositionConv
from ray_distill.student.objectives.layer_prediction import LayerDistiller
from ray_distill.student.training.training_loop import train
from ray_distill.student.training.validation import batch_loss, make_distiller
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.codecs.raw import RawCodec
from ray_distill.teacher_cache.masks import draw_mask
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.targets.target_batch import CodedTargets
from tests.tiny import CONFIGS

pytestmark = pytest.mark.slow

_MINUTES = 4.0
_SHORT, _LONG = 100, 600
_CHECKED_BATCHES = 3


@dataclass(frozen=True)
class Distilled:
    """A student after a short training, and how its losses and predictions compare with the teacher.

    Attributes:
        student: The student in evaluation mode.
        explained: By layer, the share of the variance of the teacher's outputs that the student predicts, on validation voices.
        explained_masked: The same at masked frames, which the student can't see.
        validation_error, training_error: Relative differences between the loss of the product (from the cache, by its batches) and
            the loss computed here, on the validation split and on masked batches of the training split.
    """

    student: Student
    explained: list[float]
    explained_masked: list[float]
    validation_error: float
    training_error: float


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo on less speech, with an exact cache (fp16) and the built-in teacher."""
    folder = tmp_path_factory.mktemp("gate")
    corpus = make_demo_corpus(folder / "corpus", _MINUTES)
    run = Run(load_config(CONFIGS / "demo.yaml", _overrides(folder, corpus)), Console(quiet=True))
    index_audio(run)
    plan = plan_shards(run.utterances, run.spec.shard_seconds, run.teacher.num_frames)
    build_cache(
        run.cache.location, run.spec, plan, run.config.teacher.checkpoint, teacher_name=run.teacher.name, workers=None
    )
    return run


def _overrides(folder: Path, corpus: Path) -> list[str]:
    paths = [f"corpus.path={corpus}", f"cache.path={folder / 'cache'}", f"runs={folder / 'runs'}"]
    training = ["train.batch_seconds=5", "train.learning_rate=8e-3", "train.validate_every=1000"]
    return [*paths, *training, "cache.codec=fp16", "masks.draws=1"]


def layer_errors(student: Student, waveform: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """Return the (L, T) squared errors of a student's predictions of (L, T, D) targets, averaged over D."""
    with torch.inference_mode():
        predicted = student(waveform[None], frame_mask=None if mask is None else mask[None]).projections[0]
    return (predicted - targets).square().mean(-1)


def weighted(config: Config, errors: Tensor) -> float:
    """Return the published loss of (L, T) errors: the last layer's, and those below it times the weight of the hint."""
    per_layer = errors.double().mean(1)
    return float(config.train.hint_weight * per_layer[:-1].sum() + per_layer[-1])


def distil(job: Run, folder: Path, steps: int) -> Distilled:
    """Train a student for some steps, and compare its losses and predictions with the teacher's own outputs."""
    teacher, masks = job.teacher, job.spec.masks
    settings = job.config.train.model_copy(update={"max_steps": steps})
    readers = {split: CacheReader(job.cache.location, split, job.layers) for split in ("train", "validation")}
    architecture = job.config.resolve_student(len(job.layers), teacher.dim)
    result = train(architecture, settings, readers["train"], readers["validation"], folder)
    student = load_student(folder / "checkpoints" / "best").eval()

    def utterance(path: str, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        waveform = torch.from_numpy(load_audio(Path(path)))
        clean = teacher.hidden_states(waveform[None])[0]
        mask = torch.from_numpy(draw_mask(masks.policy, masks.seed, 0, name, clean.shape[1]))
        masked = teacher.hidden_states(waveform[None], frame_mask=mask[None])[0]
        return waveform, clean, mask, torch.where(mask[:, None], clean, masked)

    clean_targets, clean_errors, masked_targets, masked_errors = [], [], [], []
    sources = {u.id: u.path for u in job.utterances}
    for name in readers["validation"].ids:
        waveform, clean, mask, composite = utterance(sources[name], name)
        clean_targets.append(clean)
        clean_errors.append(layer_errors(student, waveform, clean, None))
        masked_targets.append(clean[:, mask])
        masked_errors.append(layer_errors(student, waveform, composite, mask)[:, mask])
    validation_loss = weighted(job.config, torch.cat(clean_errors, 1))
    distiller = make_distiller(student, settings).eval()
    product, ours = [], []
    for first in range(_CHECKED_BATCHES):
        rows = [first, first + _CHECKED_BATCHES]
        with torch.no_grad():
            product.append(float(batch_loss(distiller, readers["train"].read(rows, 0), settings).total))
        errors = []
        for name in (readers["train"].ids[row] for row in rows):
            waveform, _, mask, composite = utterance(sources[name], name)
            errors.append(layer_errors(student, waveform, composite, mask))
        ours.append(weighted(job.config, torch.cat(errors, 1)))
    return Distilled(
        student,
        _explained(clean_errors, clean_targets),
        _explained(masked_errors, masked_targets),
        abs(result.last_validation_loss / validation_loss - 1),
        float(np.abs(np.array(product) / np.array(ours) - 1).max()),
    )


def _explained(errors: list[Tensor], targets: list[Tensor]) -> list[float]:
    """Return, for each layer, 1 - squared error / variance."""
    variance = torch.cat(targets, 1).var(1, unbiased=False).mean(-1)
    return (1 - torch.cat(errors, 1).mean(1) / variance).tolist()


def check(distilled: Distilled, explained: float, explained_masked: float) -> None:
    """Fail unless the losses are the teacher's and the student predicts the teacher well enough."""
    assert distilled.validation_error < 1e-3, "the validation loss is not that of the teacher's outputs"
    assert distilled.training_error < 1e-3, "the training loss is not that of the masked and the clean teacher"
    assert min(distilled.explained) > explained, distilled.explained
    assert np.mean(distilled.explained_masked) > explained_masked, distilled.explained_masked


def test_student_learns(job: Run, tmp_path: Path) -> None:
    distilled = distil(job, tmp_path, _LONG)
    check(distilled, explained=0.4, explained_masked=0.03)
    torch.manual_seed(0)
    sources = [
        FeatureSource.log_mel(),
        FeatureSource.of_student(Student(distilled.student.config).eval(), "random weights"),
        FeatureSource.of_student(distilled.student, "student"),
        FeatureSource.of_teacher(job.teacher, "teacher"),
    ]
    assert job.config.corpus.path is not None
    task = read_task(job.config.corpus.path / PHONES_FILE)
    spectrum, untrained, student, teacher = (
        o.value for o in run_probes(task, sources, epochs=10, on_progress=lambda line: None)
    )
    assert teacher < student - 0.15
    assert student < spectrum - 0.04
    assert student < untrained - 0.3


def _negated(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LayerDistiller.forward

    def negated(self: LayerDistiller, *args: object, **kwargs: object) -> object:
        loss = forward(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.training:
            loss.total = -loss.total
        return loss

    monkeypatch.setattr(LayerDistiller, "forward", negated)


def _changed_targets(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        decode = CodedTargets.decode
        monkeypatch.setattr(CodedTargets, "decode", lambda self: change(decode(self)))

    return apply


def _shifted_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = CacheReader._mask
    monkeypatch.setattr(CacheReader, "_mask", lambda self, *args: np.roll(mask(self, *args), 1))


def _noisy_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = RawCodec.decode
    monkeypatch.setattr(RawCodec, "decode", lambda self, codes: torch.randn_like(decode(self, codes)))


def _no_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PositionConv, "forward", lambda self, x, padded=None: torch.zeros_like(x))


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "nothing": lambda monkeypatch: None,
    "wrong sign": _negated,
    "targets of other frames": _changed_targets(lambda x: x[:, :, torch.randperm(x.shape[2])]),
    "layers swapped": _changed_targets(lambda x: x.flip(1)),
    "masks one frame late": _shifted_masks,
    "codec returns noise": _noisy_codec,
    "no positions": _no_positions,
}


@pytest.mark.parametrize("broken", BREAKS)
def test_break_is_noticed(broken: str, job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of `test_student_learns`, with lower bounds for fewer steps, pass without a break and fail with each."""
    BREAKS[broken](monkeypatch)
    try:
        check(distil(job, tmp_path, _SHORT), explained=0.03, explained_masked=0.002)
    except (AssertionError, FloatingPointError):
        assert broken != "nothing"
    else:
        assert broken == "nothing", "the quality gate did not notice the break"
