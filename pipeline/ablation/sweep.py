"""The runs of an ablation, trained from one cache through Ray Tune.

The index and the cache are made once, by the ordinary stages, for what all runs need together, and the cache is verified once. Then
Tune trains the runs, in parallel if there are resources. A run that fails is reported, and the others continue. The same command
resumes an interrupted ablation: finished runs are not repeated, others continue from their last checkpoint, and the file may have
gained variants or seeds.
"""

import filecmp
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from ray_distill.interruption import described
from ray_distill.pipeline.ablation.definition import Ablation
from ray_distill.pipeline.ablation.sweep_progress import shown_runs
from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.corpus.index import STATE
from ray_distill.pipeline.corpus.labels import LABELS
from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.probe_record import probe_folder, probe_settings, read_probes, write_outcomes
from ray_distill.pipeline.probing.task import Task, read_task
from ray_distill.pipeline.ray_session import (
    count_fitting_workers,
    counted,
    describe_resources,
    init_ray,
    node_resources,
    owns_ray,
    quiet_ray,
)
from ray_distill.pipeline.reports.ablation_report import write_ablation_report
from ray_distill.pipeline.reports.ablation_results import read_results
from ray_distill.pipeline.reports.ablation_tables import results_table
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.cache import cache_targets, check_cache
from ray_distill.pipeline.stages.domains import check_domains
from ray_distill.pipeline.stages.export import export_best
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.plan import plan_cache
from ray_distill.pipeline.stages.report import report_run
from ray_distill.pipeline.stages.run import refuse_relative
from ray_distill.pipeline.stages.train import initial_student, prepare_training
from ray_distill.student import load_student
from ray_distill.student.training.metrics import check_trackers
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.teachers import Teacher

_TRIAL_MEMORY = 512 << 20
"""Bytes of memory that Tune reserves for a trial's own process, which starts the workers of its run and probes the student."""


@dataclass(frozen=True)
class Probing:
    """The probe that an ablation runs on its students.

    Attributes:
        task: Labelled utterances.
        title: Title of the task.
        settings: Settings that determine the results, by which finished probes are recognised.
    """

    task: Task
    title: str
    settings: dict[str, Any]

    def probe_student(self, folder: RunFolder) -> None:
        """Probe the best student of a run."""
        student = load_student(folder.best)
        self._run(folder.path, [FeatureSource.of_student(student, "student")], {"run": folder.name}, run_student=0)

    def probe_baselines(self, folder: Path, teachers: Sequence[Teacher]) -> None:
        """Probe the teachers and log-mel features, unless the folder already has the results."""
        if not read_probes(folder, self.settings):
            sources = [FeatureSource.of_teacher(teacher) for teacher in teachers]
            self._run(folder, [*sources, FeatureSource.log_mel()], {}, run_student=None)

    def _run(
        self, folder: Path, sources: Sequence[FeatureSource], origin: dict[str, Any], run_student: int | None
    ) -> None:
        epochs, seed = self.settings["epochs"], self.settings["seed"]
        outcomes = run_probes(self.task, sources, epochs=epochs, seed=seed, on_progress=lambda text: None)
        place = probe_folder(folder, self.title, self.settings)
        write_outcomes(place, outcomes, self.task, self.title, origin, self.settings, run_student)

    def is_done(self, folder: RunFolder) -> bool:
        """Return whether a run's folder has the results of its student, whichever command made them."""
        return any(probed.student is not None for probed in read_probes(folder.path, self.settings))


@dataclass(frozen=True)
class Job:
    """The work of one Tune trial: train a run unless that is done, and probe its student.

    Attributes:
        training: Training, as `prepare_training` returns it. None if it is finished.
        folder: Folder of the run.
        probing: Probe of the student. None for no probe.
        cpus: PyTorch threads of the probe.
        resources: Resources that Tune reserves for the trial. A run with one worker trains inside the trial. A run with several
            starts Ray Train workers, which have resources of their own.
    """

    training: Callable[[], None] | None
    folder: RunFolder
    probing: Probing | None
    cpus: int
    resources: dict[str, float]

    def __call__(self) -> None:
        if self.training is not None:
            self.training()
        if self.probing is not None and not self.probing.is_done(self.folder):
            torch.set_num_threads(self.cpus)
            self.probing.probe_student(self.folder)


def cores_per_worker(nodes: Sequence[Mapping[str, float]], settings: TrainSettings) -> int:
    """Return the cores of each training worker: one beside a GPU; without GPUs, an equal share of the smallest machine.

    Args:
        nodes: Resources of each node.
        settings: Training settings of the run.
    """
    counts = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    return 1 if settings.use_gpu or not counts else max(1, min(counts) // settings.workers)


def count_concurrent_runs(nodes: Sequence[Mapping[str, float]], settings: TrainSettings, cpus: int) -> int:
    """Return how many runs fit on Ray's nodes at the same time, with ``cpus`` cores per worker."""
    return count_fitting_workers(nodes, cpus, float(settings.use_gpu)) // settings.workers


class Sweep:
    """The execution of an ablation.

    Args:
        ablation: Checked ablation.
        console: Console for progress and messages.

    Raises:
        ConfigError, CacheError, ValueError: A run is impossible, or its folder contains another run. Nothing has been written then.
    """

    def __init__(self, ablation: Ablation, console: Console) -> None:
        self.ablation = ablation
        self.console = console
        self.settings = ablation.settings
        self.shared = Run(ablation.needs, console)
        silent = Console(quiet=True)
        self.runs: dict[str, Run] = {}
        for planned in ablation.runs:
            run = self.shared.sibling(planned.config, silent)
            run.folder.refuse_other_config(planned.config)
            try:
                initial_student(run)
            except ValueError as error:
                raise ConfigError(f"variant {planned.variant}: {error}") from error
            check_trackers(planned.config.train.trackers)
            self.runs[planned.name] = run
        self.probing = self._probing()

    def _probing(self) -> Probing | None:
        probe = self.settings.probe
        if probe is None:
            return None
        refuse_relative("probe.manifest", probe.manifest, probe.manifest.is_absolute())
        task = read_task(probe.manifest.absolute(), probe.units)
        settings = probe_settings(probe.manifest, probe.units, probe.epochs, probe.seed)
        return Probing(task, probe.manifest.stem, settings)

    def run(self) -> dict[str, str]:
        """Do all work that is not done yet, holding the locks of all runs.

        Returns:
            The reasons of the runs that failed, by the runs' names.

        Raises:
            RunInUseError: Another process is working on the ablation or on one of its runs.
            ConfigError: Ray has no resources for a run.
            CacheError: The cache can't be built, or is damaged.
        """
        with described(self._interruption), ExitStack() as locks:
            locks.enter_context(self.shared.folder.begin(self.shared.config, shared=True))
            for run in self.runs.values():
                locks.enter_context(run.folder.begin(run.config))
            for run in (self.shared, *self.runs.values()):
                run.keep_checkpoint()
            return self._run()

    def _run(self) -> dict[str, str]:
        failures: dict[str, str] = {}
        if all(self._is_done(run.folder) for run in self.runs.values()):
            self.shared.say(f"train   all {len(self.runs)} runs are finished, reused")
        else:
            with quiet_ray(self.shared.folder.ray_log):
                init_ray()
            cpus, concurrent = self._allocate()
            # Probes alone need neither corpus nor cache.
            if not all(run.folder.is_trained for run in self.runs.values()):
                index_audio(self.shared)
                plan_cache(self.shared)
                cache_targets(self.shared)
                check_cache(self.shared)
                for run in self.runs.values():
                    _copy_index(self.shared.folder.corpus, run.folder.corpus)
                    check_domains(run)
            failures = self._train(self._jobs(cpus), concurrent)
        if self.probing is not None:
            self.probing.probe_baselines(self.ablation.folder, [part.teacher for part in self.shared.parts])
        for run in self.runs.values():
            if run.folder.is_trained and not _is_reported(run.folder):
                export_best(run)
                report_run(run)
        return failures

    def _interruption(self) -> str:
        """Return the sentence for a user who interrupts the ablation."""
        if self.shared.position.stage in ("index", "cache"):
            return self.shared.interruption()
        done = sum(self._is_done(run.folder) for run in self.runs.values())
        return (
            f"interrupted with {done} of {len(self.runs)} runs finished; the same command resumes the others from their last "
            "checkpoints"
        )

    def _is_done(self, folder: RunFolder) -> bool:
        """Return whether a run needs no more training or probing."""
        return folder.is_trained and (self.probing is None or self.probing.is_done(folder))

    def _jobs(self, cpus: Mapping[str, int]) -> dict[str, Job]:
        """Return the jobs of all runs that are not done, given the cores per worker of each run."""
        jobs = {}
        for name, run in self.runs.items():
            if self._is_done(run.folder):
                continue
            count = cpus[name]
            resources: dict[str, float] = {"memory": _TRIAL_MEMORY}
            training = None
            if run.folder.is_trained:
                resources["CPU"] = count
            else:
                training = prepare_training(run, count, count, in_process=True)
                if run.config.train.workers == 1:
                    resources |= {"CPU": count, "GPU": float(run.config.train.use_gpu)}
            jobs[name] = Job(training, run.folder, self.probing, count, resources)
        return jobs

    def _allocate(self) -> tuple[dict[str, int], int]:
        """Return the cores per worker of each run, and the number of runs that train at the same time.

        Raises:
            ConfigError: A run fits on no set of Ray's nodes.
        """
        nodes = node_resources()
        cpus, fitting = {}, []
        for name, run in self.runs.items():
            train = run.config.train
            if run.folder.is_trained:  # Only its probe is left, which any machine can run.
                cpus[name] = cores_per_worker(nodes, train)
                continue
            cpus[name] = self.settings.cpus_per_worker or cores_per_worker(nodes, train)
            fitting.append(count_concurrent_runs(nodes, train, cpus[name]))
            if not fitting[-1] and (self.settings.concurrent is None or owns_ray()):
                each = counted(cpus[name], "core") + (" and 1 GPU" if train.use_gpu else "")
                raise ConfigError(
                    f"{name}: {counted(train.workers, 'worker')} with {each} each can't run; {describe_resources(nodes)}; change "
                    "train.workers, train.use_gpu or cpus_per_worker, or set `concurrent` if the cluster adds machines on demand"
                )
        return cpus, self.settings.concurrent or min(fitting, default=len(self.runs))

    def _train(self, jobs: dict[str, Job], concurrent: int) -> dict[str, str]:
        """Run the jobs through Tune and return the reasons of those that failed, by name."""
        import ray.tune

        # Tune's own result files and signal handler would interfere with those of the runs.
        os.environ |= {
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
        }
        failures: dict[str, str] = {}
        done, say = len(self.runs) - len(jobs), self.shared.say
        together = min(concurrent, len(jobs))
        order = f"{together} at a time" if together > 1 else "one after another"
        say(f"train   {counted(len(jobs), 'run')}, {order}" + (f"; {done} finished before, reused" if done else ""))

        def trial(config: dict[str, Any]) -> None:
            problem = ""
            try:
                jobs[config["run"]]()
            except (ValueError, FloatingPointError, OSError) as error:
                problem = str(error)  # A result, because Tune would retry an exception, which would not help.
            ray.tune.report({"problem": problem})

        class OutcomePrinter(ray.tune.Callback):  # type: ignore[misc]
            """Prints how each run ended."""

            def __reduce__(self) -> tuple[Any, ...]:
                return ray.tune.Callback, ()  # Tune pickles its callbacks for its own resume, which is not used here.

            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                nonlocal done
                name = trial.config["run"]
                if problem := (trial.last_result or {}).get("problem"):
                    failed(name, problem)
                    return
                done += 1
                [result] = read_results([jobs[name].folder])
                say(f"train   {result.name}: {result.outcome}  ({done} of {total})")

            def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                failed(trial.config["run"], _reason(trial.get_pickled_error() or trial.get_error()))

        def failed(name: str, why: str) -> None:
            failures[name] = why
            self.console.print(f"train   {name} failed: {why}", style="red", markup=False, soft_wrap=True)

        total = len(self.runs)
        retries = max(run.config.train.max_failures for run in self.runs.values())
        errors = sys.stderr  # The bar replaces both streams.
        with (
            shown_runs(self.shared, [run.folder for run in self.runs.values()]),
            quiet_ray(self.shared.folder.ray_log),
            redirect_stdout(errors),
        ):
            ray.tune.Tuner(
                ray.tune.with_resources(trial, lambda config: jobs[config["run"]].resources),
                param_space={"run": ray.tune.grid_search(list(jobs))},
                tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=True),
                # Progress is in the checkpoints of the runs. A unique name prevents Tune from resuming a state of its own.
                run_config=ray.tune.RunConfig(
                    name=uuid.uuid4().hex[:12],
                    storage_path=str(RunFolder(self.ablation.folder.absolute()).ray),
                    verbose=0,
                    callbacks=[OutcomePrinter()],
                    # Retries of a trial whose process died. Its run continues from its last checkpoint.
                    failure_config=ray.tune.FailureConfig(max_failures=retries),
                ),
            ).fit()
        return failures

    def report(self, failures: Mapping[str, str]) -> None:
        """Write the report on all runs, with the settings of the ablation beside it, and print its table.

        Args:
            failures: Reasons of the runs that failed in this process, by name.
        """
        self.ablation.folder.mkdir(parents=True, exist_ok=True)
        dumped = self.settings.model_dump(mode="json")
        write_text(self.ablation.folder / "ablation.yaml", yaml.safe_dump(dumped, sort_keys=False))
        settings = None if self.probing is None else self.probing.settings
        results = read_results([run.folder for run in self.runs.values()], failures, settings)
        others = read_probes(self.ablation.folder, settings)
        page = write_ablation_report(self.ablation, results, others)
        self.console.print(results_table(self.ablation, results))
        self.shared.say(f"report  {page}")


def _reason(error: BaseException | None) -> str:
    """Return the last line of what a trial raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


def _copy_index(source: Path, target: Path) -> None:
    """Copy the corpus index into a run's folder, so that the folder is complete like that of any run."""
    names = [name for name in (STATE, LABELS) if (source / name).is_file() or (target / name).is_file()]
    if filecmp.cmpfiles(source, target, names, shallow=False)[0] == names:
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _is_reported(folder: RunFolder) -> bool:
    """Return whether a run's summary and report are newer than its result and its probes."""
    outputs = [folder.summary_file, folder.report]
    inputs = [folder.result_file, *folder.probe_records]
    newest = max(path.stat().st_mtime for path in inputs)
    return all(path.is_file() and path.stat().st_mtime >= newest for path in outputs)
