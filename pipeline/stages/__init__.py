"""The stages of a run, in order: index, plan, cache, train, export and report. Each skips work that is already done."""

from collections.abc import Callable, Sequence
from typing import Any

from ray_distill.pipeline.stages.cache import cache_targets
from ray_distill.pipeline.stages.export import export_best
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.plan import plan_cache
from ray_distill.pipeline.stages.report import report_run, summary_table
from ray_distill.pipeline.stages.run import Run
from ray_distill.pipeline.stages.train import train_student

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
    with run.folder.begin(run.config) as previous:
        if previous is not None:
            run.say(f"resume  {previous} was stopped before it finished; continuing its run")
        summary = None
        for name, stage in _STAGES.items():
            if name in stages:
                summary = stage(run)
        return summary
