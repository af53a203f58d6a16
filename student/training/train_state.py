"""Progress and result of a training, and its checkpoints: the state from which it continues, and its best students."""

import io
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ray_distill.student.checkpoints import save_student
from ray_distill.student.model.student import Student
from ray_distill.student.training import run_files
from ray_distill.student.training.metric_rows import read_rows
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.target_source import TargetSource
from ray_distill.whole_files import replacing, sync

_FOLDER = 0x10
"""Attribute of a folder in a ZIP file. For a record with it, torch.load would return memory that it has not filled."""


class CheckpointError(OSError):
    """A checkpoint can't be written."""


@dataclass
class TrainState:
    """Progress of a training.

    Attributes:
        step: Optimiser steps done, skipped ones included.
        seconds: Wall-clock time.
        loss_sum, loss_steps: Sum of the losses of all ranks, and number of steps, over the steps with a finite loss since
            the last training row.
        first_loss, last_loss: Losses of the first and last training rows; None before the first.
        gradient_norm: Gradient norm before clipping, at the last step that was not skipped.
        skipped_steps: Number of steps with a loss or gradient that was not finite.
        skipped_in_a_row: Number of consecutive skipped steps up to now, except those in which fp16 searches its loss scale.
        first_validation_loss, last_validation_loss: Validation losses; None before the first validation.
        best: (validation loss, step) of the kept students, best first.
        shuffle: Order of the utterances, ``full`` or ``window``; see `TrainSettings.shuffle`. None before it is chosen.
        batch_seconds: Seconds of audio per batch and rank, given or found; None with ``train.batch_size``.
    """

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    gradient_norm: float | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    first_validation_loss: float | None = None
    last_validation_loss: float | None = None
    best: list[tuple[float, int]] = field(default_factory=list)
    shuffle: str | None = None
    batch_seconds: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training, stored as ``train.json``. Losses are per frame, weighted as in training.

    Attributes:
        steps: Optimiser steps, skipped ones included.
        skipped_steps: Steps that were skipped because a loss or gradient was not finite.
        first_loss, last_loss: Losses of the first and of the last training row.
        first_validation_loss, last_validation_loss: Validation losses before the first and after the last step.
        best_validation_loss: Lowest validation loss.
        best_step: Optimiser steps done at the lowest validation loss.
        seconds: Wall-clock time.
        cache_fingerprint: Fingerprint of the cache that the targets were read from, or those of several teachers by their names; None
            for online targets.
    """

    steps: int
    skipped_steps: int
    first_loss: float
    last_loss: float
    first_validation_loss: float
    last_validation_loss: float
    best_validation_loss: float
    best_step: int
    seconds: float
    cache_fingerprint: str | dict[str, str] | None = None


@dataclass(frozen=True)
class BatchRecord:
    """One batch of this rank in the current step: its loss, and the seconds of each utterance by id."""

    loss: Tensor
    seconds: dict[str, float]


@dataclass(frozen=True)
class StepRecord:
    """A step whose gradient norm has not been read from the device."""

    step: int
    learning_rate: float
    norm: Tensor
    loss_scale: Tensor
    batches: list[BatchRecord]


class Stateful(Protocol):
    """A part of a checkpoint: a student, an optimiser, a loss scaler or an average of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """The checkpoints of a run.

    ``last/state.pt`` holds everything that a run needs to continue as if it had not stopped. Folders such as
    ``step-000123/`` hold the best students (see `save_student`), and ``best`` is a link to the best of them. A file is only
    replaced once its replacement is on the disk (fsync).

    Args:
        folder: Folder of the checkpoints.
        parts: Parts to save, by name; the same names on every rank.
        rank: This process. Only rank 0 writes; its errors are raised on all ranks.
        source: Source of the targets, which a checkpoint records. Default None: unknown, and not compared.
    """

    def __init__(
        self, folder: Path, parts: Mapping[str, Stateful], rank: Rank, source: TargetSource | None = None
    ) -> None:
        self._folder = folder
        self._parts = parts
        self._rank = rank
        self._source = None if source is None else {"name": source.name, "key": source.key}

    def load(self) -> TrainState:
        """Restore all parts and this rank's random state from ``last``.

        Random states are restored only if the world size is that of the checkpoint.

        Returns:
            The progress of the training; a new TrainState if no checkpoint exists.

        Raises:
            ValueError: the checkpoint or the metrics are missing although the run has progressed, or the checkpoint is damaged, or
                was made with other settings or other targets. All files of the run are unchanged.
        """
        path = self._folder / run_files.LAST / run_files.STATE
        if not path.is_file():
            self._refuse_progress(path)
            return TrainState()
        try:
            saved = _read(path)
        except Exception as error:  # The parsers can raise anything for damaged bytes.
            raise ValueError(
                f"{path} is damaged ({_one_line(error)}); {self._advice('restore it from a copy')}"
            ) from error
        self._check_source(path, saved)
        try:
            for name, part in self._parts.items():
                part.load_state_dict(saved["parts"][name])
            state = TrainState(**{"shuffle": "full"} | saved["state"])  # Earlier versions had no other order.
            random = saved["random"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of this training ({_one_line(error)}); {self._advice('use its settings')}"
            ) from error
        refuse_missing_metrics(self._folder, state.step)
        if state.best and not (best := self._folder / run_files.step_folder(state.best[0][1])).is_dir():
            raise ValueError(f"{best}, the best student so far, is missing; {self._advice('restore it from a copy')}")
        if len(random) == self._rank.world_size:
            mine = random[self._rank.index]
            torch.set_rng_state(mine["cpu"])
            if self._rank.device.type == "cuda" and mine["cuda"] is not None:
                torch.cuda.set_rng_state(mine["cuda"], self._rank.device)
        return state

    def _refuse_progress(self, path: Path) -> None:
        """Raise ValueError if the run has steps or rows beyond step 0, which a start from the beginning would replace."""
        last = max(
            (*self._steps().values(), *(row["step"] for row in read_rows(self._run / run_files.METRICS))), default=0
        )
        if last > 0:  # A run that is killed during its first checkpoint has step 0 only.
            raise ValueError(
                f"{path}, from which the training would continue, is missing, but {self._run} has results up to step {last}; "
                + self._advice("restore it from a copy")
            )

    def _check_source(self, path: Path, saved: dict[str, Any]) -> None:
        recorded = saved.get("source")  # Earlier versions did not record it.
        if recorded is None or self._source is None:
            self._source = self._source or recorded
        elif recorded["key"] != self._source["key"]:
            raise ValueError(
                f"{path} was trained with {recorded['name']}, but now the targets come from {self._source['name']}, which "
                f"differ; {self._advice('use the former')}"
            )

    @property
    def _run(self) -> Path:
        return self._folder.parent

    def _advice(self, first: str) -> str:
        return _advice(first, self._run)

    def _steps(self) -> dict[Path, int]:
        """Return the folders of students with their steps. A copy with another name, such as step-000040-old, is none."""
        found = ((path, re.fullmatch(r"step-(\d{6,})", path.name)) for path in self._folder.glob("step-*"))
        return {path: int(match[1]) for path, match in found if match}

    def save(self, state: TrainState) -> None:
        """Write ``last``, with the random state of every rank.

        Raises:
            CheckpointError: it can't be written; the previous one is unchanged.
        """
        device = self._rank.device
        mine = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        everyone = self._rank.gather(mine)

        def write() -> None:
            buffer = io.BytesIO()  # torch.save's own error does not mention a full disk.
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            content = {"parts": parts, "state": asdict(state), "random": everyone, "source": self._source}
            torch.save(content, buffer)
            folder = self._folder / run_files.LAST
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / run_files.STATE, durable=True) as temporary:
                temporary.write_bytes(buffer.getbuffer())
            sync(folder)

        self._on_rank_0(write, state.step)

    def save_best(self, student: Student, state: TrainState, loss: float, keep: int) -> None:
        """Save the student if its validation loss is among the ``keep`` lowest, and add it to ``state.best``.

        Students that are no longer among the best stay on the disk until `remove_old`.

        Raises:
            CheckpointError: it can't be written; the previous ones are unchanged.
        """
        best = sorted([*state.best, (loss, state.step)])[:keep]
        if (loss, state.step) not in best:
            return

        def write() -> None:
            # The folder exists only if a run was killed after it was written and before `last` was.
            with replacing(self._folder / run_files.step_folder(state.step), durable=True) as temporary:
                save_student(student, temporary, {"step": state.step, "validation_loss": loss})
            link = self._folder / f".{run_files.BEST}.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(run_files.step_folder(best[0][1]))
            link.replace(self._folder / run_files.BEST)
            sync(self._folder)

        self._on_rank_0(write, state.step)
        state.best = best

    def remove_old(self, state: TrainState) -> None:
        """Remove the students that are not in ``state.best``. To be called after `save` has written that list."""
        if self._rank.index == 0:
            best = {step for _, step in state.best}
            for path, step in self._steps().items():
                if step not in best:
                    shutil.rmtree(path)

    def _on_rank_0(self, write: Callable[[], None], step: int) -> None:
        problem = None
        if self._rank.index == 0:
            try:
                write()
            except OSError as error:
                problem = (
                    f"the checkpoint of step {step} can't be written to {self._folder} ({error.strerror or error}); the "
                    "previous checkpoint is unchanged, and once this is put right, the same command continues from it"
                )
        problem = self._rank.gather(problem)[0]
        if problem is not None:
            raise CheckpointError(problem)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint. An error of any kind is raised if a byte that matters was changed."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # It compares the CRC-32 of each record, which torch.load does not.
        folders = [record.filename for record in archive.infolist() if record.external_attr & _FOLDER]
    if damaged is not None:
        raise ValueError(f"the CRC-32 of {damaged} differs")
    if folders:
        raise ValueError(f"{folders[0]} is marked as a folder")
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise ValueError(f"it contains a {type(saved).__name__}")
    return saved


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _advice(first: str, run: Path) -> str:
    return f"{first}, give the run another name, or remove {run} to start again"


def refuse_missing_metrics(folder: Path, step: int) -> None:
    """Raise ValueError if a run that continues from a step beyond 0 has no metrics.

    Args:
        folder: Folder of the checkpoints.
        step: Step of the last checkpoint.
    """
    metrics = folder.parent / run_files.METRICS
    if step and not metrics.is_file():
        advice = "restore it from a copy, create an empty file of this name to continue without its rows"
        raise ValueError(
            f"{metrics} is missing, but {folder / run_files.LAST / run_files.STATE} continues from step {step}; "
            + _advice(advice, folder.parent)
        )


def saved_step(folder: Path) -> int | None:
    """Return the step from which a training resumes, or None if it has no readable checkpoint. The weights are not read.

    Args:
        folder: Folder of the checkpoints.
    """
    state = _saved_state(folder)
    return None if state is None else state.step


def _saved_state(folder: Path) -> TrainState | None:
    path = folder / run_files.LAST / run_files.STATE
    try:
        return TrainState(**torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
        return None  # A damaged checkpoint is reported when the training loads it.


def resume_step(run: Path) -> tuple[int | None, bool]:
    """Return the step from which a training resumes, or None, and whether that is a step of the pruning before it.

    Args:
        run: Folder of the run.
    """
    if (step := saved_step(run / run_files.CHECKPOINTS)) is not None:
        return step, False
    step = saved_step(run / run_files.PRUNING / run_files.CHECKPOINTS)
    return step, step is not None


def saved_batch_seconds(run: Path) -> float | None:
    """Return the seconds of audio per batch and rank of a training that has begun, or of the pruning before it. None with batch_size.

    Args:
        run: Folder of the run.
    """
    folders = (run / run_files.CHECKPOINTS, run / run_files.PRUNING / run_files.CHECKPOINTS)
    state = next(filter(None, map(_saved_state, folders)), None)
    return None if state is None else state.batch_seconds
