"""A run's checkpoints: the state it goes on from, and its best students."""

import io
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ray_distill.student.checkpoints import save_student
from ray_distill.student.model.student import Student
from ray_distill.student.training.rank import Rank


class CheckpointError(OSError):
    """A checkpoint that can't be written; the message is for the user."""


@dataclass
class TrainState:
    """Progress of a training.

    Attributes:
        step: optimiser steps done, skipped ones included.
        seconds: wall time.
        loss_sum, loss_steps: of the steps since the last training row that had a finite loss, all ranks together.
        first_loss, last_loss: of training rows; None until there is one.
        gradient_norm: before clipping, at the last step that was taken.
        skipped_steps: steps whose loss or gradient was not finite.
        skipped_in_a_row: up to now, leaving out those by which fp16 looks for its loss scale.
        first_validation_loss, last_validation_loss: None until measured.
        best: (validation loss, step) of the students that are kept, best first.
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


class Stateful(Protocol):
    """What a checkpoint holds: a student, an optimiser, a loss scaler, an average of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """The checkpoints of a run.

    ``last/state.pt`` is all that a run needs to go on as if it had not stopped. ``step-000123/`` hold the best students
    (see `save_student`), and ``best`` is a link to the best of them. Whatever is replaced stays until what replaces it is
    safe on the disk.

    Args:
        folder: of the checkpoints.
        parts: what there is to keep, by name; the same on every rank.
        rank: this process. Only rank 0 writes; a failure is raised on all.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Stateful], rank: Rank) -> None:
        self._folder = folder
        self._parts = parts
        self._rank = rank

    def load(self) -> TrainState:
        """Restores all parts and this rank's random state from ``last``; a fresh TrainState where there is none.

        Random states are restored only where the world size is the one of the checkpoint.

        Raises:
            ValueError: the checkpoint can't be read, or was made with other parts.
        """
        path = self._folder / "last" / "state.pt"
        if not path.is_file():
            return TrainState()
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(saved["parts"][name])
            state = TrainState(**saved["state"])
            random = saved["random"]
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of this training ({' '.join(str(error).split())[:200]}); remove "
                f"{self._folder} to start again, or choose another run"
            ) from error
        if len(random) == self._rank.world_size:
            mine = random[self._rank.index]
            torch.set_rng_state(mine["cpu"])
            if self._rank.device.type == "cuda" and mine["cuda"] is not None:
                torch.cuda.set_rng_state(mine["cuda"], self._rank.device)
        return state

    def save(self, state: TrainState) -> None:
        """Writes ``last``, with every rank's random state.

        Raises:
            CheckpointError: it can't be written; the one before is untouched.
        """
        device = self._rank.device
        mine = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        everyone = self._rank.gather(mine)

        def write() -> None:
            buffer = io.BytesIO()  # torch.save's own error on a full disk says nothing of the disk.
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            torch.save({"parts": parts, "state": asdict(state), "random": everyone}, buffer)
            temporary = self._folder / "last" / ".state.pt.tmp"
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(buffer.getbuffer())
            _sync(temporary)
            temporary.replace(temporary.with_name("state.pt"))
            _sync(temporary.parent)

        self._on_rank_0(write, state.step)

    def save_best(self, student: Student, state: TrainState, loss: float, keep: int) -> None:
        """Keeps this student where its validation loss is among the ``keep`` lowest, and enters it in ``state.best``.

        Students that fall behind stay on the disk until `remove_old`.

        Raises:
            CheckpointError: it can't be written; those before are untouched.
        """
        best = sorted([*state.best, (loss, state.step)])[:keep]
        if (loss, state.step) not in best:
            return

        def write() -> None:
            name = f"step-{state.step:06d}"
            temporary = self._folder / f".{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            save_student(student, temporary, {"step": state.step, "validation_loss": loss})
            for path in (*temporary.iterdir(), temporary):
                _sync(path)
            # There only where a run was killed right after this save, before `last` told of it.
            shutil.rmtree(self._folder / name, ignore_errors=True)
            temporary.rename(self._folder / name)
            link = self._folder / ".best.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(f"step-{best[0][1]:06d}")
            link.replace(self._folder / "best")
            _sync(self._folder)

        self._on_rank_0(write, state.step)
        state.best = best

    def remove_old(self, state: TrainState) -> None:
        """Removes the students that are not in ``state.best``; to be called once ``last`` tells of those that are."""
        if self._rank.index == 0:
            kept = {f"step-{step:06d}" for _, step in state.best}
            for path in self._folder.glob("step-*"):
                if path.name not in kept:
                    shutil.rmtree(path)

    def _on_rank_0(self, write: Callable[[], None], step: int) -> None:
        problem = None
        if self._rank.index == 0:
            try:
                write()
            except OSError as error:
                problem = (
                    f"the checkpoint of step {step} can't be written to {self._folder} ({error.strerror or error}); the one "
                    "before it is kept, and the same command goes on from there once this is put right"
                )
        problem = self._rank.gather(problem)[0]
        if problem is not None:
            raise CheckpointError(problem)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
