"""The stages of a run, in order: index, plan, cache, train, export and report. Each skips work that is already done."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape

from ray_distill.interruption import described
from ray_distill.memory import memory_named
from ray_distill.pipeline.ray_session import check_ray, require_gpus
from ray_distill.pipeline.run_plugins import needed_plugins, unused_plugins
from ray_distill.pipeline.stages.cache import cache_targets
from ray_distill.pipeline.stages.export import export_best
from ray_distill.pipeline.stages.frame_rates import check_frame_rates, check_student_frames
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.plan import plan_cache
from ray_distill.pipeline.stages.progress import Position
from ray_distill.pipeline.stages.report import report_run, summary_table
from ray_distill.pipeline.stages.run import Run
from ray_distill.pipeline.stages.train import initial_student, train_student
from ray_distill.student.training.metrics import check_trackers
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.create import check_location

__all__ = ["STAGES", "Run", "run_stages", "summary_table"]

_STAGES: dict[str, Callable[[Run], dict[str, Any] | None]] = {
    "index": index_audio,
    "plan": plan_cache,
    "cache": cache_targets,
    "train": train_student,
    "export": export_best,
    "report": report_run,
}
STAGES = tuple(_STAGES)
_LOWER = {
    "index": "lower corpus.max_seconds",
    "plan": "lower corpus.max_seconds",
    "cache": "lower corpus.max_seconds",
    "train": "lower corpus.max_seconds",
    "export": "run it on a machine with more memory",
    "report": "lower corpus.max_seconds",
}
"""What to do if memory runs out in the process of the run itself; the workers of the stages name keys of their own."""


def run_stages(run: Run, stages: Sequence[str]) -> dict[str, Any] | None:
    """Run some stages in the order of `STAGES`, holding the lock of the run's folder.

    Args:
        run: The run.
        stages: Names of the stages.

    Returns:
        The run's summary, or None without the report stage.

    Raises:
        RunInUseError: Another process is working on the run.
        ConfigError: The run's folder contains results of another configuration, or a stage can't be run as configured.
        ValueError, FloatingPointError, OSError: A stage failed.
    """
    with described(run.interruption), run.folder.begin(run.config) as previous:
        if previous is not None:
            run.say(f"resume  {previous} was stopped before it finished; continuing its run")
        _tell_plugins(run)
        _check_start(run, set(stages))
        summary = None
        for name, stage in _STAGES.items():
            if name in stages:
                run.position = Position(name)
                with memory_named(f"the {name} stage", _LOWER[name]):
                    summary = stage(run)
        return summary


def _tell_plugins(run: Run) -> None:
    """Say what the run takes from other packages, and which installed plug-ins can't be used because of their names."""
    if plugins := needed_plugins(run.config):
        run.say(f"plugin  {escape('; '.join(map(str, plugins)))}")
    for sentence in unused_plugins():
        run.say(f"[yellow]plugin  {escape(sentence)}[/yellow]")


def _check_start(run: Run, stages: set[str]) -> None:
    """Check what would otherwise stop the run only after its audio is indexed or its cache is built.

    Raises:
        ConfigError, ValueError: The teacher, the student, a tracker, the cache's location or this machine can't be used.
    """
    training = "train" in stages and not run.folder.is_trained
    cached = run.config.train.targets == "cached"
    if training or ("cache" in stages and cached):
        check_ray()
        require_gpus(run.config)
    if training:
        check_trackers(run.config.train.trackers)
    if stages & {"plan", "cache", "train"}:
        for part in run.parts:
            with part.named():
                if not cached:
                    part.check_device()
                elif "cache" in stages and not Cache.exists(part.cache):
                    check_location(part.cache)
                    part.check_device()
                part.layers  # noqa: B018 (loads the teacher)
        check_frame_rates(run)
        run.config.check_aggregate([(len(part.layers), part.teacher.dim) for part in run.parts])
        if training:
            student, _ = initial_student(run)
            check_student_frames(student, run.teacher)
            run.settings().chosen_objective.check_targets(student, len(run.layers), run.target_dim)
        run.keep_checkpoint()
