"""What a student learns from an ensemble of two teachers in a short training, and by how much that differs between seeds.

``python -m benchmarks.teacher.ensemble`` trains a student of the demo's teacher, makes it the second teacher of an ensemble, and
trains students of both from the caches of both, for several seeds. The second teacher is as wide as the first, so that a mix-up of
the two fits in shape. What a student predicts is compared with the teachers themselves, run here with masks drawn here, and with
losses that are computed here. tests/test_ensemble.py requires `LONG` and `SHORT`; this script says how far they are from what it
measures. No Ray is needed.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
import yaml
from rich.console import Console
from torch import Tensor, nn

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.teacher.cached_run import cached_run
from ray_distill.pipeline.config import Config, load_config
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import PHONES_FILE, read_task
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.train import teacher_caches
from ray_distill.student import Student, load_student
from ray_distill.student.objectives.several_teachers import SeveralDistiller
from ray_distill.student.objectives.teacher_heads import TeacherHeads
from ray_distill.student.training.target_source import several_readers
from ray_distill.student.training.training_loop import train
from ray_distill.student.training.validation import batch_loss
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.masks import draw_mask
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.targets.several_caches import SeveralCaches

MINUTES = 4.0
TEACHER_STEPS, SHORT_STEPS, LONG_STEPS = 400, 150, 700
WEIGHTS = (1.0, 0.25)
"""Weight of each teacher. The second one is worse than the first, and easier to predict."""
_CHECKED_BATCHES = 3


@dataclass(frozen=True)
class Bounds:
    """What a student must reach.

    Attributes:
        explained: For each teacher, share of the variance of its outputs that the student predicts, of all layers together.
        explained_masked: The same at masked frames, which the student can't see.
    """

    explained: tuple[float, float]
    explained_masked: tuple[float, float]


LONG = Bounds((0.45, 0.75), (0.03, 0.08))
"""Bounds after `LONG_STEPS`."""
SHORT = Bounds((0.03, 0.1), (-0.02, -0.02))
"""Bounds after `SHORT_STEPS`."""
BEYOND_SPECTRUM, BEYOND_UNTRAINED = 0.06, 0.35
"""Least differences of phone errors: log-mel bands and a student with random weights, each minus the student of both."""


@dataclass(frozen=True)
class Learnt:
    """A student of two teachers after a short training.

    Attributes:
        student: The exported student in evaluation mode.
        explained, explained_masked: As in `Bounds`, on voices that were not trained on.
        validation_error, training_error: Relative differences between the loss of the product (from the caches, by its batches) and
            the loss computed here, on the validation split and on masked batches of the training split.
    """

    student: Student
    explained: tuple[float, ...]
    explained_masked: tuple[float, ...]
    validation_error: float
    training_error: float

    def check(self, bounds: Bounds) -> None:
        """Raise AssertionError unless the losses are those of the teachers and the student predicts both well enough."""
        assert self.validation_error < 1e-3, "the validation loss is not that of the teachers' outputs"
        assert self.training_error < 1e-3, "the training loss is not that of the masked and the clean teachers"
        for found, least in ((self.explained, bounds.explained), (self.explained_masked, bounds.explained_masked)):
            assert all(value > bound for value, bound in zip(found, least, strict=True)), (found, least)


@dataclass(frozen=True)
class Spoken:
    """An utterance with what the teachers themselves say of it.

    Attributes:
        waveform: (1, S) float32.
        mask: (T,) bool, mask of draw 0.
        clean: (K, L, T, D) float32, layers of the K teachers.
        composite: (K, L, T, D) float32, the same with the masked pass at unmasked frames.
    """

    waveform: Tensor
    mask: Tensor
    clean: Tensor
    composite: Tensor


class Ensemble:
    """The demo's teacher and a trained student of it, with a cache of each, of less speech than the demo's.

    Args:
        folder: Folder for everything.
        seed: Seed of the second teacher's training.

    Attributes:
        run: The run of both teachers.
        corpus: Folder of the corpus.
        readers: Readers of the training and of the validation split.
        validation: The utterances of the validation split.
        training: Those of the checked batches of the training split.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.corpus = make_demo_corpus(folder / "corpus", MINUTES)
        single = cached_run(_configuration(folder, [("builtin", "builtin:phone-hubert")], "one"))
        second = folder / f"teacher-{seed}"
        _train_teacher(single, second, seed)
        pair = [("builtin", "builtin:phone-hubert"), (f"student-{seed}", str((second / "checkpoints/best").resolve()))]
        self.run = Run(_configuration(folder, pair, f"two-{seed}"), Console(quiet=True))
        index_audio(self.run)
        for part in self.run.parts:
            if not Cache.exists(part.cache):
                cached_run(part.config)
        self.readers = cast(
            tuple[SeveralCaches, SeveralCaches],
            several_readers(teacher_caches(self.run), self.run.config.masks, fresh=False)[:2],
        )
        sources = {utterance.id: utterance.path for utterance in self.run.utterances}
        # Each checked batch has two utterances.
        checked = self.readers[0].ids[: 2 * _CHECKED_BATCHES]
        self.training = [self._spoken(name, sources[name]) for name in checked]
        self.validation = [self._spoken(name, sources[name]) for name in self.readers[1].ids]

    def _spoken(self, name: str, path: str) -> Spoken:
        waveform = torch.from_numpy(load_audio(Path(path)))[None]
        masks = self.run.config.masks
        teachers = [part.teacher for part in self.run.parts]
        clean = torch.stack([teacher.hidden_states(waveform)[0] for teacher in teachers])
        mask = torch.from_numpy(draw_mask(masks.policy, masks.seed, 0, name, clean.shape[2]))
        masked = torch.stack([teacher.hidden_states(waveform, frame_mask=mask[None])[0] for teacher in teachers])
        return Spoken(waveform, mask, clean, torch.where(mask[:, None], clean, masked))

    def variances(self) -> Tensor:
        """Return the (K, L) variance of each teacher's layers over the frames of the validation split, averaged over channels."""
        return torch.cat([spoken.clean for spoken in self.validation], 2).double().var(2, unbiased=False).mean(-1)

    def loss(self, errors: Tensor) -> float:
        """Return the balanced loss of (K, L, T) squared errors, averaged over channels, of the predictions of both teachers."""
        settings = self.run.config.train

        def weighted(layers: Tensor) -> Tensor:
            return settings.hint_weight * layers[:, :-1].sum(1) + layers[:, -1]

        sizes = weighted(self.variances())
        return float((torch.tensor(WEIGHTS) * weighted(errors.double().mean(2)) / sizes).sum())

    def distil(self, folder: Path, steps: int, seed: int = 0) -> Learnt:
        """Train a student for some steps, and compare its losses and predictions with the teachers' own outputs."""
        run = self.run
        settings = run.settings().model_copy(update={"max_steps": steps, "seed": seed})
        architecture = run.config.resolve_student(len(run.layers), run.target_dim)
        kept: list[SeveralDistiller] = []

        def keep(distiller: nn.Module) -> nn.Module:
            kept.append(cast(SeveralDistiller, distiller))
            return distiller

        result = train(architecture, settings, *self.readers, folder, wrap=keep)
        distiller = kept[0].eval()
        student = load_student(folder / "checkpoints" / "best").eval()
        # The export predicts the first teacher; the heads of the second are a part of the training.
        (others,) = (cast(TeacherHeads, part.predictors[0]).heads for part in distiller.parts if len(part.predictors))
        heads = [list(student.heads), list(cast(Any, others))]

        def errors(spoken: Spoken, targets: Tensor, mask: Tensor | None) -> Tensor:
            with torch.inference_mode():
                inputs = student.layer_outputs(spoken.waveform, frame_mask=None if mask is None else mask[None])[1]
                predicted = torch.stack(
                    [torch.cat([head(x) for head, x in zip(one, inputs, strict=True)]) for one in heads]
                )
            return (predicted - targets).square().mean(-1)

        clean = [errors(one, one.clean, None) for one in self.validation]
        masked = [errors(one, one.composite, one.mask)[:, :, one.mask] for one in self.validation]
        hidden = torch.cat([one.clean[:, :, one.mask] for one in self.validation], 2).double()
        hidden_variances = hidden.var(2, unbiased=False).mean(-1)
        explained = 1 - torch.cat(clean, 2).double().mean(2).sum(1) / self.variances().sum(1)
        explained_masked = 1 - torch.cat(masked, 2).double().mean(2).sum(1) / hidden_variances.sum(1)
        differences = []
        for first in range(0, len(self.training), 2):
            with torch.no_grad():
                product = batch_loss(distiller, self.readers[0].read([first, first + 1], 0), settings).total
            ours = [errors(one, one.composite, one.mask) for one in self.training[first : first + 2]]
            differences.append(abs(float(product) / self.loss(torch.cat(ours, 2)) - 1))
        return Learnt(
            student,
            tuple(explained.tolist()),
            tuple(explained_masked.tolist()),
            abs(result.last_validation_loss / self.loss(torch.cat(clean, 2)) - 1),
            max(differences),
        )

    def phone_errors(self, student: Student, *, teachers: bool = False) -> dict[str, float]:
        """Return the phone errors of linear probes on log-mel bands, on a student as it is given and with random weights, and on the
        teachers if they are wanted."""
        torch.manual_seed(0)
        sources = [
            FeatureSource.log_mel(),
            FeatureSource.of_student(Student(student.config).eval(), "untrained"),
            FeatureSource.of_student(student, "student"),
        ]
        if teachers:
            sources += [FeatureSource.of_teacher(part.teacher, f"teacher {k}") for k, part in enumerate(self.run.parts)]
        outcomes = run_probes(read_task(self.corpus / PHONES_FILE), sources, epochs=10, on_progress=lambda line: None)
        names = ["log-mel", *(source.name for source in sources[1:])]
        return dict(zip(names, (outcome.value for outcome in outcomes), strict=True))


def _configuration(folder: Path, teachers: Sequence[tuple[str, str]], name: str) -> Config:
    """Return the demo's configuration for short trainings from exact caches of some teachers."""
    caches = [{"path": str(folder / "caches" / name)} for name, _ in teachers]
    tree: dict[str, Any] = {
        "base": str(REPOSITORY / "configs" / "demo.yaml"),
        "name": name,
        "corpus": {"path": str(folder / "corpus")},
        "runs": str(folder / "runs"),
        "cache": {"codec": "fp16"},
        "masks": {"draws": 1},
        "train": {"batch_seconds": 5, "validate_every": 1000},
    }
    if len(teachers) == 1:
        tree |= {"teacher": {"checkpoint": teachers[0][1]}, "cache": tree["cache"] | caches[0]}
    else:
        entries = zip(teachers, caches, WEIGHTS, strict=True)
        tree["teachers"] = [
            {"name": name, "checkpoint": checkpoint, "cache": cache, "weight": weight}
            for (name, checkpoint), cache, weight in entries
        ]
        # With a shorter warm-up some seeds begin to learn much later than others.
        tree["train"] |= {"learning_rate": 8e-3, "warmup_fraction": 0.3, "balance": "variance"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_config(path)


def _train_teacher(job: Run, folder: Path, seed: int) -> None:
    """Train the second teacher: a student that is as wide as its teacher."""
    teacher = job.teacher
    wide = {"encoder_embed_dim": teacher.dim, "encoder_ffn_embed_dim": teacher.dim}
    architecture = job.config.resolve_student(len(job.layers), teacher.dim).model_copy(update=wide)
    settings = job.config.train.model_copy(
        update={"max_steps": TEACHER_STEPS, "seed": 1_000 + seed, "learning_rate": 3e-3}
    )
    readers = [CacheReader(job.cache.location, split, job.layers) for split in ("train", "validation")]
    train(architecture, settings, readers[0], readers[1], folder)


def summary(values: Sequence[float], bound: float) -> dict[str, float]:
    """Return mean, standard deviation and least of the values of seeds, and how many standard deviations a bound is below the mean."""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return {
        "mean": mean,
        "deviation": deviation,
        "least": min(values),
        "bound": bound,
        "deviations_to_bound": (mean - bound) / deviation,
    }


def summaries(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the `summary` of everything that the test requires, by name."""
    found = {}
    for length, bounds in (("short", SHORT), ("long", LONG)):
        for kind, least in asdict(bounds).items():
            for k, bound in enumerate(least):
                found[f"{length}, {kind}, teacher {k}"] = summary([row[length][kind][k] for row in rows], bound)
    for other, bound in (("log-mel", BEYOND_SPECTRUM), ("untrained", BEYOND_UNTRAINED)):
        differences = [row["phone_errors"][other] - row["phone_errors"]["student"] for row in rows]
        found[f"phone error, {other} minus student"] = summary(differences, bound)
    return found


def measured(folder: Path, seed: int) -> dict[str, Any]:
    """Train an ensemble and students of it in ``folder``, unless that is done, and return what they reach."""
    record = folder / "row.json"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    folder.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"seed": seed}
    ensemble = Ensemble(folder, seed)
    for length, steps in (("short", SHORT_STEPS), ("long", LONG_STEPS)):
        learnt = ensemble.distil(folder / length, steps, seed)
        row[length] = {key: value for key, value in vars(learnt).items() if key != "student"}
        print(row, flush=True)
    row["phone_errors"] = ensemble.phone_errors(learnt.student, teachers=True)
    record.write_text(json.dumps(row))
    print(row, flush=True)
    return row


def main(
    folder: Annotated[Path, typer.Option(help="Folder for everything that is trained; it is kept.")],
    seeds: Annotated[int, typer.Option(help="Number of ensembles and students.", min=2)] = 5,
    share: Annotated[
        str | None,
        typer.Option(help="I/N: only train for every N-th seed from the I-th (from 0) on, and write nothing."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "teacher/ensemble.json",
) -> None:
    """Train ensembles and students of them for several seeds, and compare them with the bounds of the test."""
    torch.set_num_threads(1)
    part, parts = map(int, (share or "0/1").split("/"))
    rows = [measured(folder.resolve() / f"seed-{seed}", seed) for seed in range(part, seeds, parts)]
    if share is not None:
        return
    found = summaries(rows)
    for name, numbers in found.items():
        print(name, {key: round(value, 4) for key, value in numbers.items()})
    write_result(
        output,
        minutes=MINUTES,
        steps={"second teacher": TEACHER_STEPS, "short": SHORT_STEPS, "long": LONG_STEPS},
        rows=rows,
        summaries=found,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
