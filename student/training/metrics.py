"""Metrics of a training: rows of JSON, TensorBoard, and Weights & Biases or MLflow where configured."""

import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ray_distill.student.objectives.objective import DistillationLoss
from ray_distill.student.training import run_files
from ray_distill.student.training.metric_rows import read_rows
from ray_distill.student.training.rank import Rank
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.targets.several_caches import TeacherTargets, layer_names, loss_names
from ray_distill.teacher_cache.targets.target_batch import TargetReader


def empty_agreement(reader: TargetReader, device: torch.device) -> Tensor:
    """Return zeros in the shape of the `DistillationLoss.agreement` of a reader's targets."""
    count = len(reader.layers) + max(1, len(getattr(reader, "teachers", ())))
    return torch.zeros(2, 2, count, dtype=torch.float64, device=device)


def agreement_fields(sums: Tensor, reader: TargetReader) -> dict[str, float]:
    """Return `DistillationLoss.agreement` as means for a row, with the layers named as in `layer_names`."""
    names = layer_names(reader, reader.layers)
    teachers: tuple[TeacherTargets, ...] = getattr(reader, "teachers", ())
    counts = [len(teacher.layers) for teacher in teachers] or [len(names)]
    row: dict[str, float] = {}
    for block, count in zip(sums.split_with_sizes([count + 1 for count in counts], -1), counts, strict=True):
        row |= agreement_row(block, names[:count])
        names = names[count:]
    return row


def agreement_row(sums: Tensor, layers: Sequence[str]) -> dict[str, float]:
    """Return the agreement of one teacher as means for a row, without the kinds of frames that do not occur."""
    row: dict[str, float] = {}
    for measure, of_measure in zip(("cosine", "accuracy"), sums.tolist(), strict=True):
        for kind, (*values, frames) in zip(("masked", "unmasked"), of_measure, strict=True):
            if frames:
                row |= {
                    f"{measure}_{kind}_layer_{layer}": value / frames
                    for layer, value in zip(layers, values, strict=True)
                }
    return row


class MetricWindow:
    """Sums of one rank between two training rows.

    Args:
        reader: Reader of the training split.
        rank: This process.

    Attributes:
        loss: () float64, sum of this rank's losses over steps with a finite loss.
        waited: Seconds spent waiting for the reader.
        agreement, teachers: `DistillationLoss.agreement` and `DistillationLoss.teachers` of the step at which the row is written.
    """

    def __init__(self, reader: TargetReader, rank: Rank) -> None:
        self._reader = reader
        self._rank = rank
        self.loss = torch.zeros((), dtype=torch.float64, device=rank.device)
        self._reset()

    def _reset(self) -> None:
        self.loss.zero_()
        self.waited = 0.0
        self.forget_step()
        self._real = self._padded = 0
        self._read = self._bytes_read()
        self._started = time.monotonic()

    def add_step(self, loss: DistillationLoss) -> None:
        """Add the agreement and the teachers' losses of a batch."""
        self.agreement += loss.agreement()
        self.teachers += loss.teachers()

    def forget_step(self) -> None:
        """Set agreement and the teachers' losses to zero, as at the beginning of a step."""
        self.agreement = empty_agreement(self._reader, self._rank.device)
        self.teachers = torch.zeros(len(loss_names(self._reader)), dtype=torch.float64, device=self._rank.device)

    def _bytes_read(self) -> int | None:
        return getattr(self._reader, "bytes_read", None)

    def count(self, num_samples: np.ndarray) -> None:
        """Count a batch of utterances with these lengths (B,)."""
        self._real += int(num_samples.sum())
        self._padded += int(num_samples.max()) * len(num_samples)

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not spent training, such as a validation."""
        self._started += seconds

    def take_loss(self) -> float:
        """Return the summed loss of all ranks and reset it. Every rank must call this."""
        total = float(self._rank.sum(self.loss))
        self.loss.zero_()
        return total

    def close(self) -> dict[str, float]:
        """Return the fields of a row, the same on every rank, and start a new window. Every rank must call this."""
        elapsed = time.monotonic() - self._started
        read = self._bytes_read()
        read_here = 0 if read is None or self._read is None else read - self._read
        mine = self.loss.new_tensor([self._real, self._padded, self.waited / elapsed, read_here])
        cells = self._rank.sum(torch.cat([mine, self.teachers, self.agreement.flatten()])).cpu()
        names = loss_names(self._reader)
        totals, losses, agreement = cells.split_with_sizes([len(mine), len(names), self.agreement.numel()])
        real, padded, waited, total_read = totals.tolist()
        row = {
            "audio_hours_per_minute": real / SAMPLE_RATE / 60 / elapsed,
            "data_wait": waited / self._rank.world_size,
            "padding_waste": 1 - real / padded,
        }
        if read is not None:
            row["bytes_per_second"] = total_read / elapsed
        row |= {f"teacher_loss_{name}": loss for name, loss in zip(names, losses.tolist(), strict=True)}
        row |= agreement_fields(agreement.reshape(2, 2, -1), self._reader)
        self._reset()
        return row


class Tracker(Protocol):
    """An experiment tracker. ``id`` is its name for this run, with which a restart continues the same run."""

    id: str

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class WeightsAndBiases:
    """Weights & Biases, configured by its own environment variables for project, entity and mode (``WANDB_PROJECT``, ...)."""

    package = "wandb"

    def __init__(self, folder: Path, known_id: str | None, configuration: dict[str, Any]) -> None:
        self._run = _import(self.package).init(
            id=known_id, resume="allow", name=folder.name, dir=str(folder), config=configuration
        )
        self.id: str = self._run.id

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """MLflow, configured by its own environment variables for server and experiment (``MLFLOW_TRACKING_URI``, ...)."""

    package = "mlflow"

    def __init__(self, folder: Path, known_id: str | None, configuration: dict[str, Any]) -> None:
        self._mlflow = _import(self.package)
        if known_id is not None:
            self.id = known_id
            self._mlflow.start_run(run_id=known_id)
        else:
            self.id = self._mlflow.start_run(run_name=folder.name).info.run_id
            self._mlflow.log_params(configuration)

    def log(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[WeightsAndBiases] | type[MLflow]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    for name in names:
        _import(TRACKERS[name].package)


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"train.trackers has {package}, which is not installed; `pip install {package}`, or remove it from train.trackers"
        ) from error


def _read_ids(path: Path) -> dict[str, str]:
    """Return the run ids by tracker that an earlier start of the run stored; none if there is no such file."""
    try:
        ids = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        ids = None
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise ValueError(
            f"{path} is damaged, so the runs of the trackers are unknown; restore it from a copy, or remove it to continue in "
            "new runs of the trackers"
        )
    return ids


class Metrics:
    """The metrics of a run, written by rank 0: each row goes to ``metrics.jsonl``, TensorBoard and the trackers.

    Rows have ``kind`` and ``step`` (optimiser steps done). The other fields depend on the kind:

    - ``train``: loss (mean since the last row), learning_rate, gradient_norm (before clipping), audio_hours_per_minute,
      data_wait (share of the time), padding_waste (share of the samples), skipped_steps (so far), and
      cosine_KIND_layer_NN or, for discrete targets, accuracy_KIND_layer_NN (of this step only). With several teachers also
      teacher_loss_NAME (of this step only, before it is balanced) and teacher_weight_NAME (the factor of that loss), and the layers
      are NAME_NN. With weights by domain, both are there for NAME.DOMAIN too.
    - ``validation``: loss, layer_NN (unweighted), cosine_unmasked_layer_NN; in the first row also constant_loss and
      constant_layer_NN, the losses of the best constant prediction, if the error is the squared one.
    - ``skipped``: cause of a skipped step, and its utterances.
    - ``batch``: with ``train.batch_seconds`` auto, batch_seconds, and the bytes that a step needs (peak_bytes) and may need.
    - ``resumed``: time at which the training continued from a checkpoint.

    After a restart, rows beyond the checkpoint are dropped and written again.

    Args:
        folder: Folder of the run.
        resumed_step: Optimiser steps of the checkpoint from which the run continues; None for a new run.
        trackers: Names in TRACKERS. Default none.
        configuration: Configuration shown by the trackers.
        enabled: Whether to write anything; False on all ranks but 0.

    Raises:
        ValueError: a tracker is not installed, or a file of the run is damaged, which is then unchanged.
    """

    def __init__(
        self,
        folder: Path,
        resumed_step: int | None,
        trackers: Sequence[str] = (),
        configuration: dict[str, Any] | None = None,
        *,
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._path = folder / run_files.METRICS
        folder.mkdir(parents=True, exist_ok=True)
        first = 0 if resumed_step is None else resumed_step + 1
        self._drop_rows_from(first)
        self._board = SummaryWriter(str(folder / run_files.TENSORBOARD), purge_step=first)
        ids_path = folder / run_files.TRACKERS
        ids = _read_ids(ids_path) if resumed_step is not None else {}
        self._trackers: list[Tracker] = [
            TRACKERS[name](folder, ids.get(name), configuration or {}) for name in trackers
        ]
        if trackers:
            ids |= {name: tracker.id for name, tracker in zip(trackers, self._trackers, strict=True)}
            run_files.replace_text(ids_path, json.dumps(ids))

    def _drop_rows_from(self, step: int) -> None:
        rows = [row for row in read_rows(self._path) if row["step"] < step]
        run_files.replace_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, row: dict[str, Any]) -> None:
        """Write a row.

        Raises:
            OSError: the row can't be written.
        """
        if not self._enabled:
            return
        numbers = {
            f"{row['kind']}/{name}": float(value)
            for name, value in row.items()
            if isinstance(value, (int, float)) and name not in ("step", "steps")
        }
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
            for name, value in numbers.items():
                self._board.add_scalar(name, value, row["step"])
            self._board.flush()
        except OSError as error:
            raise OSError(
                f"the metrics of step {row['step']} can't be written to {self._path.parent} ({error.strerror or error}); once "
                "this is put right, the same command continues from the last checkpoint"
            ) from error
        for tracker in self._trackers if numbers else ():
            tracker.log(numbers, row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._enabled:
            self._board.close()
            for tracker in self._trackers:
                tracker.close(failed=kind is not None)
