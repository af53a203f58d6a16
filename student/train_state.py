"""Resumable training state: everything the loop needs to go on as if it had not stopped."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler

from student.model import Student

if TYPE_CHECKING:
    from student.training import Rank


@dataclass
class TrainState:
    """Progress of a training. Steps are optimiser steps done; losses are None until measured; seconds are wall time."""

    step: int = 0
    logged_step: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    first_validation_loss: float | None = None
    last_validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int = 0


def save_train_state(
    folder: Path,
    student: Student,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    state: TrainState,
    rank: "Rank",
) -> None:
    """Rank 0 writes student, optimiser, scaler, progress and every rank's random state; the old one is replaced whole."""
    mine = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if rank.device.type == "cuda" else None}
    everyone: list[Any] = [mine]
    if rank.world_size > 1:
        everyone = [None] * rank.world_size
        dist.all_gather_object(everyone, mine)
    if rank.index == 0:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save(
            {
                "student": student.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "state": asdict(state),
                "random": everyone,
            },
            temporary / "state.pt",
        )
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    if rank.world_size > 1:
        dist.barrier()


def load_train_state(
    folder: Path, student: Student, optimizer: torch.optim.Optimizer, scaler: GradScaler, rank: "Rank"
) -> TrainState:
    """Restores what `save_train_state` wrote; a fresh TrainState where there is nothing.

    Random states are restored only where the world size is the one of the checkpoint.
    """
    # A kill between the two renames of a save leaves only the old one, under its other name.
    candidates = [folder / "state.pt", folder.with_name(f".{folder.name}.old") / "state.pt"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return TrainState()
    saved = torch.load(path, map_location="cpu", weights_only=True)
    student.load_state_dict(saved["student"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    if len(saved["random"]) == rank.world_size:
        mine = saved["random"][rank.index]
        torch.set_rng_state(mine["cpu"])
        if rank.device.type == "cuda" and mine["cuda"] is not None:
            torch.cuda.set_rng_state(mine["cuda"])
    return TrainState(**saved["state"])
