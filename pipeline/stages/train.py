"""The train stage: train the student from the cache, or with the teacher in the loop."""

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ray_distill.pipeline.corpus.labels import LABELS
from ray_distill.pipeline.files import read_json_object
from ray_distill.pipeline.initialise import initial_tensors, tensors_of_student, write_initial
from ray_distill.pipeline.ray_session import init_ray, owns_ray, quiet_ray, require_resources
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.run_starts import record_start
from ray_distill.pipeline.stages.cache import check_cache
from ray_distill.pipeline.stages.domains import check_domains
from ray_distill.pipeline.stages.progress import ProgressUpdate
from ray_distill.pipeline.stages.run import Run, TeacherRun
from ray_distill.student import Student, StudentConfig
from ray_distill.student.checkpoints import CONFIG as STUDENT_CONFIG
from ray_distill.student.objectives.mixture import Mixture
from ray_distill.student.pruning.gates import Gates
from ray_distill.student.training.metric_rows import read_last_train_row, read_rows
from ray_distill.student.training.ray_training import train_on_ray
from ray_distill.student.training.run_files import METRICS, PRUNED, PRUNING
from ray_distill.student.training.target_source import TeacherCache
from ray_distill.student.training.train_state import refuse_missing_metrics, resume_step, saved_batch_seconds
from ray_distill.teacher_cache.shapes_only import shapes_only

_FAR = 0.02
"""Difference of the sparsity from that of the gates at the end of a pruning that is worth a word."""


def train_student(run: Run) -> None:
    """Train the student, from its last checkpoint if it has one. Do nothing if its training is finished.

    Raises:
        ConfigError: Ray has no resources for the workers, or a teacher has no weight for a domain.
        CacheError: The cache lacks something or is damaged.
        ValueError: The run's files are damaged, or can't be continued from.
        TrainingError: The workers can't be started, or failed too often.
        FloatingPointError: The loss diverged.
    """
    finished = run.folder.result()
    if finished is not None:
        run.say(f"train   finished before ({finished['steps']} steps), reused")
        return
    step, in_pruning = resume_step(run.folder.path)
    run.folder.metrics()  # Damaged and missing metrics are refused before Ray starts.
    refuse_missing_metrics(run.folder.checkpoints, 0 if in_pruning else step or 0)
    settings = run.config.train
    if settings.targets == "cached":
        check_domains(run)
        check_cache(run)
    if settings.max_steps is not None:
        say_unused(run, settings.max_steps)
    training = prepare_training(run, max(1, (os.cpu_count() or 1) // settings.workers))
    auto = settings.batch_seconds == "auto"
    prunes = settings.prune is not None and pruning_record(run.folder) is None
    if auto and (seconds := saved_batch_seconds(run.folder.path)) is not None:
        run.say(f"train   batches of {settings.describe_batch(seconds)}, as at the start of the training")
    if step is not None and run.folder.finished_before:
        run.say(
            f"train   continuing from step {step} beyond a finished training; the learning rate follows the schedule of the new length"
        )
    elif step is not None:
        run.say(f"train   resuming from step {step}{' of the pruning' if in_pruning else ''}, the last checkpoint")
    with quiet_ray(run.folder.ray_log), run.progress("train", "steps") as update:
        init_ray()
        require_resources("train.workers, train.use_gpu", settings.workers, 1, float(settings.use_gpu), run.say)
        record_start(run.folder.starts_file, first=step is None)
        done = threading.Event()
        watcher = threading.Thread(
            target=_show_metrics,
            args=(run, update, done, 0 if in_pruning else step or 0, auto and step is None, prunes),
            daemon=True,
        )
        watcher.start()
        try:
            training()
        finally:
            done.set()
            watcher.join()
    result = run.folder.result()
    assert result is not None, "a training that returns has written its result"
    run.say(
        f"train   {result['steps']} steps in {result['seconds']:.0f} s: training loss {result['first_loss']:.4f} -> "
        f"{result['last_loss']:.4f}, validation {result['first_validation_loss']:.4f} -> {result['last_validation_loss']:.4f}"
    )
    if settings.max_steps is None or result["steps"] < settings.max_steps:
        say_unused(run, result["steps"])


def _say_pruned(run: Run, record: Mapping[str, Any]) -> None:
    """Say what the first phase of a pruning has left."""
    run.say(
        f"train   pruning has left {record['parameters']:,} of {record['parameters_before']:,} parameters without heads "
        f"(sparsity {record['sparsity']:.3f})"
    )
    if record["sparsity"] - record["expected_sparsity"] > _FAR:
        run.say(
            f"[yellow]train   the gates themselves had only reached a sparsity of {record['expected_sparsity']:.3f}; a larger "
            "train.prune.steps or gate_learning_rate lets the student adapt to the rest[/yellow]"
        )


def say_unused(run: Run, steps: int) -> None:
    """Name the teachers and the parts of a mixture that begin after the last of ``steps`` optimiser steps."""
    for part in run.parts:
        if isinstance(part, TeacherRun) and part.entry.weight and part.entry.start_step >= steps:
            part.say(f"[yellow]train   {_not_reached(part.entry.start_step, steps)}[/yellow]")
    objective = run.config.train.chosen_objective
    for one in objective.parts if isinstance(objective, Mixture) else ():
        if one.from_step >= steps:
            name = one.settings.objective
            run.say(f"[yellow]train   objective {name}: {_not_reached(one.from_step, steps)}[/yellow]")


def _not_reached(start: int, steps: int) -> str:
    return f"takes part from step {start:,}, which a training of {steps:,} steps does not reach; it has no effect"


def prepare_training(
    run: Run, cpu_threads: int, reserved_cpus: int = 1, *, in_process: bool = False
) -> Callable[[], None]:
    """Return the training as a function that can be sent to another node, and write the initial weights that it reads.

    Args:
        run: The run.
        cpu_threads: PyTorch threads of a worker without a GPU.
        reserved_cpus: Cores that Ray reserves for each worker. Default: 1.
        in_process: Whether a single worker trains in the process that calls the function, which then must have the resources.
            Default: False, which starts Ray Train workers; Ray must be initialised where the function is called.

    Raises:
        ConfigError: The student can't start from the teacher's weights as configured.
    """
    settings = run.settings()
    cached = settings.targets == "cached"
    config, tensors = initial_student(run)
    initial = None
    if tensors:
        initial = run.folder.initial_weights
        write_initial(initial, tensors)
    if settings.init_from is not None:
        with shapes_only():
            names = Student(config).state_dict().keys()
        anew = f"; {len(names) - len(tensors)} tensors of its heads start anew" if len(tensors) < len(names) else ""
        run.say(f"train   the student starts from {settings.init_from} ({len(tensors)} tensors{anew})")
    return partial(
        train_on_ray,
        config,
        settings,
        run.folder.path,
        layers=run.layers,
        cache=run.cache.location if cached else None,
        teacher=run.checkpoint,
        teachers=teacher_caches(run),
        masks=run.config.masks,
        utterances=[] if cached else list(run.utterances),
        cache_targets=run.config.cache.targets,
        audio=run.audio,
        frames=run.config.teacher.frames,
        local=run.config.cache.local,
        local_gb=run.config.cache.local_gb,
        precision="fp32" if cached else run.precision,
        initial=initial,
        cpu_threads=cpu_threads,
        reserved_cpus=reserved_cpus,
        in_process=in_process,
        # A cluster may have to grow first, and Ray Train waits for that with a limit.
        as_task=owns_ray(),
    )


def teacher_caches(run: Run) -> list[TeacherCache]:
    """Return the caches of those of several teachers that have a weight; nothing if there is one teacher."""
    return [
        TeacherCache(
            part.name,
            part.cache.location,
            part.layers,
            part.config.cache.targets,
            part.audio,
            part.config.cache.local,
            part.config.cache.local_gb,
            part.config.teacher.frames,
            part.entry.weight,
            str(run.folder.corpus / LABELS) if isinstance(part.entry.weight, dict) else None,
        )
        for part in run.parts
        if isinstance(part, TeacherRun) and part.entry.weight
    ]


def initial_student(run: Run) -> tuple[StudentConfig, dict[str, Tensor]]:
    """Return the student's configuration, and its initial weights that are copied from the teacher or another student, by name.

    Raises:
        ConfigError: The student's configuration is impossible, or it can't start from the given weights.
        ValueError: The student can't be pruned to the sparsity.
    """
    config = run.config.resolve_student(len(run.layers), run.target_dim, run.teacher.patches)
    settings = run.config.train
    named = [part for part in run.parts if isinstance(part, TeacherRun) and part.name == settings.init_teacher]
    origin = (named or run.parts)[0]
    if settings.prune is not None:
        Gates(config, settings.prune, settings.seed)  # Refuses a sparsity that can't be reached.
    if settings.init_from is not None:
        return config, tensors_of_student(settings.init_from, config)
    return config, initial_tensors(origin.teacher, config, settings) if settings.starts_from_teacher else {}


def training_progress(folder: RunFolder, since: float = 0) -> tuple[int, int, str] | None:
    """Return the last logged step of a training, the number of steps, and what is said of it. ValueError if a row is damaged.

    Until a student that is pruned goes on without gates, they are those of the first phase.

    Args:
        folder: Folder of the run.
        since: Time from which on its metrics must have been written. Default: any.

    Returns:
        None if it has no such row.
    """
    for path in (folder.metrics_file, folder.path / PRUNING / METRICS):
        if path.is_file() and path.stat().st_mtime >= since and (row := read_last_train_row(path)) is not None:
            phase = f"pruning, sparsity {row['sparsity']:.3f}, " if path.parent != folder.path else ""
            return row["step"], row.get("steps", row["step"]), f"{phase}loss {row['loss']:.4f}"
    return None


def pruning_record(folder: RunFolder) -> dict[str, Any] | None:
    """Return the record of `save_pruned` on what the pruning of a run has left. None if it has not pruned."""
    described = read_json_object(folder.path / PRUNING / PRUNED / STUDENT_CONFIG)
    return None if described is None else dict(described["metadata"])


def _found_batch(folder: RunFolder) -> dict[str, Any] | None:
    """Return the row about the batch that a new training has found, or None if it has none yet. ValueError if a row is damaged."""
    rows = [row for path in (folder.path / PRUNING / METRICS, folder.metrics_file) for row in read_rows(path)]
    return next((row for row in rows if row["kind"] == "batch"), None)


def _show_metrics(
    run: Run, update: ProgressUpdate, done: threading.Event, start: int, measures: bool, prunes: bool = False
) -> None:
    """Show the last logged step after ``start``, once a second.

    Say once what was measured if the training ``measures`` its batches first, and what is left by the first phase if it ``prunes``.
    """
    while True:
        ended = done.wait(1.0)
        try:
            if prunes and (record := pruning_record(run.folder)) is not None:
                prunes = False
                _say_pruned(run, record)
            if ended:
                return
            if measures and (found := _found_batch(run.folder)) is not None:
                measures = False
                run.say(
                    f"train   batches of {run.config.train.describe_batch(found['batch_seconds'])}; a step needs "
                    f"{found['peak_bytes'] / 1e9:.1f} of the {found['limit_bytes'] / 1e9:.1f} GB that it may use"
                )
            progress = training_progress(run.folder)
        except ValueError as error:
            run.say(f"train   the progress is no longer shown: {error}")
            return
        if progress is not None and progress[0] > start:
            update(*progress)
