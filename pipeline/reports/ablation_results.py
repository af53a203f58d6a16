"""Results of an ablation's runs, read from their folders."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_distill.pipeline.probing.probe_record import ProbeRecord, read_probes
from ray_distill.pipeline.reports.training_charts import rows_of_kind
from ray_distill.pipeline.run_folder import RunFolder


@dataclass(frozen=True)
class RunResult:
    """Results of one run so far.

    Attributes:
        name: Name of the run.
        training: Content of ``train.json``; None if the training is not finished.
        failure: Reason why the last attempt failed; empty if it did not fail.
        validations: Validation rows of ``metrics.jsonl``.
        parameters: Number of the student's parameters; None if the run has no summary yet.
        probes: Probes of the run with the requested settings.
    """

    name: str
    training: Mapping[str, Any] | None
    failure: str
    validations: Sequence[Mapping[str, Any]]
    parameters: int | None
    probes: Sequence[ProbeRecord]

    @property
    def best_validation(self) -> Mapping[str, Any]:
        """Validation row of the best student; empty if it was not recorded. The training must be finished."""
        assert self.training is not None
        return next((row for row in self.validations if row["step"] == self.training["best_step"]), {})

    def cosine(self, layers: Sequence[str]) -> float | None:
        """Return the cosine similarity to the teacher of the best student, without masks, averaged over layers.

        Args:
            layers: Layers as `layer_names` has them.
        """
        values = [self.best_validation.get(f"cosine_unmasked_layer_{layer}") for layer in layers]
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known and len(known) == len(values) else None

    @property
    def loss(self) -> float | None:
        """Best validation loss."""
        return None if self.training is None else float(self.training["best_validation_loss"])

    @property
    def best_step(self) -> float | None:
        """Step of the best validation loss."""
        return None if self.training is None else float(self.training["best_step"])

    @property
    def seconds_per_step(self) -> float | None:
        """Training time per step, with validations, on a machine that may have run other trainings at the same time."""
        return None if self.training is None else float(self.training["seconds"] / self.training["steps"])

    @property
    def state(self) -> str:
        """State of the run: ``finished``, ``failed`` or ``not finished``."""
        return "finished" if self.training is not None else "failed" if self.failure else "not finished"

    @property
    def outcome(self) -> str:
        """One line about the training: its steps, duration and loss, or why there are none."""
        if self.training is None:
            return self.failure or "not finished"
        loss, steps = self.training["best_validation_loss"], self.training["steps"]
        return f"{steps} steps in {self.training['seconds']:.0f} s, validation loss {loss:.4f}"


def read_results(
    folders: Sequence[RunFolder],
    failures: Mapping[str, str] | None = None,
    probe_settings: dict[str, Any] | None = None,
) -> list[RunResult]:
    """Read the results of runs from their folders.

    Args:
        folders: Folders of the runs.
        failures: Reasons of failures by the names of the runs.
        probe_settings: Settings of the probes to read, as from `probe_record.probe_settings`; by default, all probes are read.
    """
    results = []
    for folder in folders:
        summary = folder.summary()
        results.append(
            RunResult(
                folder.name,
                folder.result(),
                (failures or {}).get(folder.name, ""),
                rows_of_kind(folder.metrics(), "validation"),
                None if summary is None else summary["student_parameters"],
                read_probes(folder.path, probe_settings),
            )
        )
    return results
