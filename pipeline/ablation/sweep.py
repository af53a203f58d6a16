"""``run.py ablate --config configs/ablations/NAME.yaml``: all runs of an ablation from one cache, through Ray Tune.

Index and cache are made once, by the ordinary stages, for what all runs need together; the cache is verified once. Then Tune runs the
trainings, side by side where there is room. A run that fails is reported and the others go on. The same command goes on where it
was: finished runs are not repeated, others go on from their last checkpoint, and a corrected file may have more variants or seeds.
"""

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

from ray_distill.pipeline.ablation.definition import Ablation, ProbeSection, load_ablation
from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.probe_record import probe_folder, probe_settings, read_probes, write_outcomes
from ray_distill.pipeline.probing.task import Task, read_task
from ray_distill.pipeline.reports.ablation_report import write_ablation_report
from ray_distill.pipeline.reports.ablation_results import read_results
from ray_distill.pipeline.reports.ablation_tables import results_table
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.stages import Run, described, fitting, init_ray, node_resources, ray_is_own
from ray_distill.student import load_student
from ray_distill.student.training.metrics import check_trackers
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.teachers import Teacher

_TRIAL_MEMORY = 512 << 20
"""Of the process that starts a run's several workers and probes its student; the workers' cores and GPUs are theirs."""


@dataclass(frozen=True)
class Probing:
    """What students are probed for.

    Attributes:
        task: labelled utterances.
        title: of the task.
        settings: what decides the figures, so that finished probes are known again.
    """

    task: Task
    title: str
    settings: dict[str, Any]

    def of_student(self, folder: Path) -> None:
        """Probes a run's best student."""
        student = load_student(folder / "checkpoints" / "best")
        self._run(folder, [FeatureSource.of_student(student, "student")], {"run": folder.name}, own=0)

    def of_others(self, folder: Path, teacher: Teacher) -> None:
        """Probes the teacher and log-mel bands, unless the folder has it already."""
        if not read_probes(folder, self.settings):
            self._run(folder, [FeatureSource.of_teacher(teacher), FeatureSource.log_mel()], {}, own=None)

    def _run(self, folder: Path, sources: Sequence[FeatureSource], origin: dict[str, Any], own: int | None) -> None:
        epochs, seed = self.settings["epochs"], self.settings["seed"]
        outcomes = run_probes(self.task, sources, epochs=epochs, seed=seed, on_progress=lambda text: None)
        place = probe_folder(folder, self.title, self.settings)
        write_outcomes(place, outcomes, self.task, self.title, origin, self.settings, own)

    def is_done(self, folder: Path) -> bool:
        """Whether a run's folder has its student's figures, whoever probed it."""
        return any(probed.student is not None for probed in read_probes(folder, self.settings))


@dataclass(frozen=True)
class Job:
    """What a trial does: train, unless it is done, and probe.

    Attributes:
        training: see `Run.training`; None where it is done.
        folder: of the run.
        probing: None probes nothing.
        cpus: PyTorch threads of the probe.
        resources: that Tune sets aside for the trial. A run of one worker is the trial itself; one of several starts Ray Train
            workers, which have resources of their own.
    """

    training: Callable[[], None] | None
    folder: Path
    probing: Probing | None
    cpus: int
    resources: dict[str, float]

    def __call__(self) -> None:
        if self.training is not None:
            self.training()
        if self.probing is not None and not self.probing.is_done(self.folder):
            torch.set_num_threads(self.cpus)
            self.probing.of_student(self.folder)


def cores(nodes: Sequence[Mapping[str, float]], settings: TrainSettings) -> int:
    """Cores for each training worker: one beside a GPU, else all of a machine's, shared by the workers of a run.

    Args:
        nodes: resources of each node.
        settings: of the training.
    """
    counts = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    return 1 if settings.use_gpu or not counts else max(1, min(counts) // settings.workers)


def room(nodes: Sequence[Mapping[str, float]], settings: TrainSettings, cpus: int) -> int:
    """How many such trainings fit side by side, with ``cpus`` cores for each worker."""
    return fitting(nodes, cpus, float(settings.use_gpu)) // settings.workers


class Ablating:
    """An ablation under way.

    Args:
        ablation: checked.
        console: where progress goes.

    Raises:
        ConfigError, CacheError, ValueError: a run that can't be, or whose folder holds another; nothing was done then.
    """

    def __init__(self, ablation: Ablation, console: Console) -> None:
        self.ablation = ablation
        self.console = console
        self.settings = ablation.settings
        self.shared = Run(ablation.needs, console, claim=False)
        silent = Console(quiet=True)
        self.runs: dict[str, Run] = {}
        for planned in ablation.runs:
            run = Run(planned.config, silent, self.shared.teacher)
            try:
                run.first_student()
            except ValueError as error:
                raise ConfigError(f"variant {planned.variant}: {error}") from error
            check_trackers(planned.config.train.trackers)
            self.runs[planned.name] = run
        self.probing = self._probing()
        dumped = self.settings.model_dump(mode="json")
        write_text(ablation.folder / "ablation.yaml", yaml.safe_dump(dumped, sort_keys=False))

    def _probing(self) -> Probing | None:
        probe = self.settings.probe
        if probe is None:
            return None
        task = read_task(probe.manifest.absolute(), probe.units)
        settings = probe_settings(probe.manifest, probe.units, probe.epochs, probe.seed)
        return Probing(task, probe.manifest.stem, settings)

    def work(self) -> dict[str, str]:
        """Does what is not done; returns why runs failed, by their names."""
        if all(self._is_done(run.folder) for run in self.runs.values()):
            self.shared.say(f"train   all {len(self.runs)} runs are finished, reused")
            failures: dict[str, str] = {}
        else:
            with self.shared.quiet():
                init_ray()
            cpus, concurrent = self._places()
            if not all(_is_trained(run.folder) for run in self.runs.values()):  # A probe needs none of this.
                self.shared.index()
                self.shared.plan()
                self.shared.cache_targets()
                self.shared.check_cache()
                for run in self.runs.values():
                    _copy_index(self.shared.folder / "corpus", run.folder / "corpus")
            failures = self._train(self._jobs(cpus), concurrent)
        if self.probing is not None:
            self.probing.of_others(self.ablation.folder, self.shared.teacher)
        for run in self.runs.values():
            if _is_trained(run.folder) and not _is_reported(run.folder):
                run.export()
                run.report()
        return failures

    def _is_done(self, folder: Path) -> bool:
        """Whether a run has nothing left to do."""
        return _is_trained(folder) and (self.probing is None or self.probing.is_done(folder))

    def _jobs(self, cpus: Mapping[str, int]) -> dict[str, Job]:
        """What there is to do, with the cores of each worker."""
        jobs = {}
        for name, run in self.runs.items():
            if self._is_done(run.folder):
                continue
            count = cpus[name]
            resources: dict[str, float] = {"memory": _TRIAL_MEMORY}
            training = None
            if _is_trained(run.folder):
                resources["CPU"] = count
            else:
                training = run.training(count, count, in_process=True)
                if run.config.train.workers == 1:
                    resources |= {"CPU": count, "GPU": float(run.config.train.use_gpu)}
            jobs[name] = Job(training, run.folder, self.probing, count, resources)
        return jobs

    def _places(self) -> tuple[dict[str, int], int]:
        """Cores of each worker of each run, and how many runs go side by side. ConfigError where a training fits nowhere."""
        nodes = node_resources()
        cpus, places = {}, []
        for name, run in self.runs.items():
            train = run.config.train
            if _is_trained(run.folder):  # What is left is to probe it, on any machine.
                cpus[name] = cores(nodes, train)
                continue
            cpus[name] = self.settings.cpus_per_worker or cores(nodes, train)
            places.append(room(nodes, train, cpus[name]))
            if not places[-1] and (self.settings.concurrent is None or ray_is_own()):
                raise ConfigError(
                    f"{name}: its {train.workers} workers need {cpus[name]} cores each{' and a GPU' if train.use_gpu else ''}; "
                    f"{described(nodes)}; change train.workers, train.use_gpu or cpus_per_worker, or give `concurrent` where more "
                    "machines join a cluster on demand"
                )
        return cpus, self.settings.concurrent or min(places, default=len(self.runs))

    def _train(self, jobs: dict[str, Job], concurrent: int) -> dict[str, str]:
        """Runs the jobs through Tune; returns why some failed."""
        import ray.tune

        # Tune's result files and signal handler would only get in the way of the runs' own.
        os.environ |= {
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
        }
        failures: dict[str, str] = {}
        done, say = len(self.runs) - len(jobs), self.shared.say
        together = min(concurrent, len(jobs))
        side = f"{together} side by side" if together > 1 else "one after another"
        say(f"train   {len(jobs)} runs, {side}" + (f"; {done} are finished, reused" if done else ""))

        def trial(config: dict[str, Any]) -> None:
            problem = ""
            try:
                jobs[config["run"]]()
            except (ValueError, FloatingPointError, OSError) as error:
                problem = str(error)  # Trying again would only end the same.
            ray.tune.report({"problem": problem})

        class Told(ray.tune.Callback):  # type: ignore[misc]
            """Says of each run how it ended."""

            def __reduce__(self) -> tuple[Any, ...]:
                return ray.tune.Callback, ()  # Tune keeps its callbacks on disk, for a restore that is not used here.

            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                nonlocal done
                name = trial.config["run"]
                if problem := (trial.last_result or {}).get("problem"):
                    failed(name, problem)
                    return
                done += 1
                [result] = read_results([RunFolder(jobs[name].folder)])
                say(f"train   {result.name}: {result.outcome}  ({done} of {total})")

            def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                failed(trial.config["run"], _reason(trial.get_pickled_error() or trial.get_error()))

        def failed(name: str, why: str) -> None:
            failures[name] = why
            self.console.print(f"train   {name} failed: {why}", style="red", markup=False, soft_wrap=True)

        total = len(self.runs)
        retries = max(run.config.train.max_failures for run in self.runs.values())
        with self.shared.quiet(), redirect_stdout(sys.stderr):
            ray.tune.Tuner(
                ray.tune.with_resources(trial, lambda config: jobs[config["run"]].resources),
                param_space={"run": ray.tune.grid_search(list(jobs))},
                tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=True),
                # Our own checkpoints carry the progress; a name of its own keeps Tune from resuming some other state.
                run_config=ray.tune.RunConfig(
                    name=uuid.uuid4().hex[:12],
                    storage_path=str(self.ablation.folder.absolute() / "ray"),
                    verbose=0,
                    callbacks=[Told()],
                    # Of a trial whose process died; its run goes on from its last checkpoint.
                    failure_config=ray.tune.FailureConfig(max_failures=retries),
                ),
            ).fit()
        return failures

    def report(self, failures: Mapping[str, str]) -> None:
        """Writes the report, and shows its table."""
        settings = None if self.probing is None else self.probing.settings
        results = read_results([RunFolder(run.folder) for run in self.runs.values()], failures, settings)
        others = read_probes(self.ablation.folder, settings)
        page = write_ablation_report(self.ablation, results, others)
        self.console.print(results_table(self.ablation, results))
        self.shared.say(f"report  {page}")


def _reason(error: BaseException | None) -> str:
    """One line of what a trial raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


def _copy_index(source: Path, target: Path) -> None:
    """A run's folder has an index of its own, as any run's; a killed copy is made again."""
    state = source / "state.json"
    if (target / state.name).is_file() and (target / state.name).read_bytes() == state.read_bytes():
        return
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _is_trained(folder: Path) -> bool:
    """Whether a run's training is finished."""
    return (folder / "train.json").is_file()


def _is_reported(folder: Path) -> bool:
    """Whether a run's summary and page are younger than what they tell of."""
    outputs = [folder / "summary.json", folder / "report.html"]
    inputs = [folder / "train.json", *folder.glob("probes/*/probe.json")]
    youngest = max(path.stat().st_mtime for path in inputs)
    return all(path.is_file() and path.stat().st_mtime >= youngest for path in outputs)


def runs_table(ablation: Ablation) -> Table:
    """What would be run."""
    table = Table(title=f"{ablation.settings.name}: {len(ablation.runs)} runs")
    for column in ("variant", "changes", "seeds"):
        table.add_column(column)
    for variant in ablation.variants:
        changes = "\n".join(f"{key}={value}" for key, value in variant.changes.items()) or "(none)"
        table.add_row(variant.name, changes, ", ".join(map(str, ablation.settings.seeds)))
    return table


def command(
    config: Annotated[Path, typer.Option(help="YAML of the ablation; configs/ablations/ has some.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, for all runs.")] = None,
    probe: Annotated[
        Path | None, typer.Option(help="Manifest that students are probed on, instead of the file's; see probe --help.")
    ] = None,
    units: Annotated[
        str | None, typer.Option(help="Of the transcripts of --probe: characters (default), or words.")
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Only check the file and show the runs.")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="Only report on what is there.")] = False,
) -> None:
    """Train a grid of students from one cache, and compare them over seeds. The same command goes on where it was."""
    console = Console(file=sys.stdout)  # The very stream, which stays where it is when Tune's tables are led away.
    failures: dict[str, str] = {}
    try:
        if units not in (None, "characters", "words"):
            raise ConfigError(f"--units must be characters or words, not {units!r}")
        if units is not None and probe is None:
            raise ConfigError("--units is of --probe, which is not given; the file's own probe has its own `units`")
        section = None
        if probe is not None:
            section = ProbeSection(manifest=probe, units="words" if units == "words" else "characters")
        ablation = load_ablation(config, overrides or [], section)
        if only_list:
            console.print(runs_table(ablation))
            return
        ablating = Ablating(ablation, console)
        if not only_report:
            failures = ablating.work()
        ablating.report(failures)
    except (ValueError, FloatingPointError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if failures:
        console.print(
            f"{len(failures)} of {len(ablation.runs)} runs failed; the same command tries them again", style="red"
        )
        raise typer.Exit(1)
