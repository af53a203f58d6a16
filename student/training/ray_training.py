"""The training loop on Ray Train workers, or in one Ray task."""

import logging
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from ray_distill.first_line import first_line
from ray_distill.memory import memory_named, ran_out_of_memory
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.pruning.phases import train_in_phases
from ray_distill.student.training import run_files
from ray_distill.student.training.metrics import check_trackers
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.target_source import (
    TargetSource,
    TeacherCache,
    cached_source,
    online_source,
    several_readers,
)
from ray_distill.student.training.train_settings import SeveralTeacherSettings, TrainSettings
from ray_distill.student.training.train_state import CheckpointError
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.storage.cache_spec import Targets
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.frame_rate import FrameRule
from ray_distill.teacher_cache.targets.fresh_masks import FreshMasks
from ray_distill.teacher_cache.targets.student_frames import open_reader
from ray_distill.teacher_cache.targets.target_batch import TargetReader

_LOG = logging.getLogger(__name__)
_START_TRIES = 30
"""Number of minutes that Ray waits for the workers' cores and GPUs: long enough for a cluster to grow, but bounded."""


class TrainingError(ValueError):
    """Workers could not be started, or failed too often."""


def _readers(job: dict[str, Any], device: torch.device) -> tuple[TargetReader, TargetReader, TargetSource]:
    layers, masks = job["layers"], MaskDraws.model_validate(job["masks"])
    fresh = job["settings"]["masks"] == "fresh"
    if job["teachers"]:
        return several_readers(
            [TeacherCache(**one) for one in job["teachers"]], masks, fresh=fresh, aggregate=job["settings"]["aggregate"]
        )
    if job["settings"]["targets"] == "cached":
        copies = {key: job[key] for key in ("local", "local_gb", "audio")}
        draws, targets = job["masks"]["draws"], job["cache_targets"]
        reader = open_reader(job["cache"], "train", layers, draws, targets=targets, frames=job["frames"], **copies)
        validation = open_reader(job["cache"], "validation", layers, frames=job["frames"], **copies)
        if fresh:
            return FreshMasks(reader, masks), FreshMasks(validation, masks), cached_source(reader, masks)
        return reader, validation, cached_source(reader)
    from ray_distill.teacher_cache.targets.online_targets import OnlineReader
    from ray_distill.teacher_cache.teachers import load_teacher

    teacher = load_teacher(job["teacher"], device)
    utterances = [Utterance(**utterance) for utterance in job["utterances"]]
    by_split = {
        split: OnlineReader(
            [u for u in utterances if u.split == split],
            teacher,
            masks,
            layers,
            job["cache_targets"] or "clean_and_masked",
            job["precision"],
            job["frames"],
        )
        for split in ("train", "validation")
    }
    source = online_source(
        job["teacher"], teacher.fingerprint, layers, masks, job["cache_targets"], utterances, job["frames"]
    )
    if fresh:
        source = replace(source, key=f"{source.key} fresh masks")
        return FreshMasks(by_split["train"], masks), FreshMasks(by_split["validation"], masks), source
    return by_split["train"], by_split["validation"], source


class _RayMetrics:
    """Ray metrics with the last row of a training, exported by the node of rank 0. Ray prefixes each name with ``ray_``.

    Args:
        run: Name of the run, the ``run`` tag of each metric.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        # (kind, field) of a row: (name of the metric, description, factor from field to metric).
        fields = {
            ("train", "step"): ("step", "Optimiser steps done", 1),
            ("train", "steps"): ("steps", "Optimiser steps of the whole training", 1),
            ("train", "loss"): ("loss", "Loss per frame, mean since the last row", 1),
            ("train", "learning_rate"): ("learning_rate", "Learning rate of the last step", 1),
            ("train", "gradient_norm"): ("gradient_norm", "Gradient norm before clipping", 1),
            ("train", "skipped_steps"): ("skipped_steps", "Steps skipped because a loss or gradient was not finite", 1),
            ("train", "audio_hours_per_minute"): ("audio_seconds_per_second", "Audio trained on, all ranks", 60),
            ("train", "data_wait"): (
                "data_wait_share",
                "Share of the time spent waiting for data, mean of the ranks",
                1,
            ),
            ("train", "padding_waste"): ("padding_share", "Share of the samples that is padding", 1),
            ("train", "bytes_per_second"): ("read_bytes_per_second", "Read from the cache, all ranks", 1),
            ("validation", "loss"): ("validation_loss", "Loss per frame of the validation split", 1),
        }
        self._fields = {
            key: (Gauge(f"distill_train_{name}", about, tag_keys=("run",)), factor)
            for key, (name, about, factor) in fields.items()
        }
        self._tags = {"run": run}

    def set(self, row: dict[str, Any]) -> None:
        """Set the metrics from a row of ``metrics.jsonl``."""
        for (kind, field), (gauge, factor) in self._fields.items():
            if row["kind"] == kind and field in row:
                gauge.set(row[field] * factor, self._tags)


def _worker(job: dict[str, Any]) -> Exception | None:
    """Train on a worker of Ray Train; see `_train_on`."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    refusal = Path(job["refusal"])
    if refusal.is_file():  # Another rank was refused before Ray restarted the workers.
        return ValueError(refusal.read_text())
    return _train_on(
        job,
        Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()),
        wrap=lambda distiller: ray.train.torch.prepare_model(distiller, move_to_device=False),
        on_validation=lambda row: ray.train.report(row),
    )


def _task(job: dict[str, Any]) -> Exception | None:
    """Train alone in a Ray task; see `_train_on`."""
    return _train_on(job, Rank(device=_device(job)))


def _device(job: dict[str, Any]) -> torch.device:
    return torch.device("cuda", 0) if job["settings"]["use_gpu"] else torch.device("cpu")


def _train_on(job: dict[str, Any], rank: Rank, **options: Any) -> Exception | None:
    """Train as a rank in a process of Ray, and return the error if a restart would only repeat it."""
    if rank.device.type == "cpu":
        torch.set_num_threads(job["threads"])
    else:
        torch.cuda.set_device(rank.device)
    on_row = _RayMetrics(Path(job["folder"]).name).set if rank.index == 0 else lambda row: None
    try:
        _train(job, rank, on_row=on_row, **options)
    except (FloatingPointError, CheckpointError) as error:
        return error  # Every rank raises these at the same step.
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            raise  # A store that could not be reached may be reached again.
        if rank.world_size == 1:
            return error
        # The others may be waiting for this rank, so Ray has to stop them. They are not started again more than once.
        run_files.replace_text(Path(job["refusal"]), str(error))
        raise
    return None


def _train(job: dict[str, Any], rank: Rank, **options: Any) -> None:
    train_reader, validation_reader, source = _readers(job, rank.device)
    train_in_phases(
        StudentConfig.model_validate(job["student"]),
        (SeveralTeacherSettings if "terms" in job["settings"] else TrainSettings).model_validate(job["settings"]),
        train_reader,
        validation_reader,
        Path(job["folder"]),
        rank=rank,
        initial=None if job["initial"] is None else Path(job["initial"]),
        source=source,
        **options,
    )


def train_on_ray(
    config: StudentConfig,
    settings: TrainSettings,
    folder: Path,
    *,
    layers: tuple[int, ...],
    cache: str | None,
    teacher: str,
    teachers: Sequence[TeacherCache] = (),
    masks: MaskDraws,
    utterances: list[Utterance],
    cache_targets: Targets | None = None,
    audio: str | None = None,
    frames: FrameRule | None = None,
    local: str | None = None,
    local_gb: float | None = None,
    precision: Precision = "fp32",
    initial: Path | None = None,
    cpu_threads: int = 1,
    reserved_cpus: int = 1,
    in_process: bool = False,
    as_task: bool = False,
) -> None:
    """Train on ``settings.workers`` Ray Train workers, continuing from the run's last checkpoint. Ray must be initialised.

    Args:
        config, settings, folder: As for `training_loop.train`; the folder must be reachable from every node.
        layers: Teacher layers to learn from; layer k is the output of Transformer layer k, from 1.
        cache: Location of the cache; only used with cached targets.
        teacher: Teacher checkpoint; only used with online targets.
        teachers: Caches of several teachers in the order of the terms of ``settings`` if it has some, which replace ``layers``,
            ``cache`` and ``cache_targets``. Default: none.
        masks: Mask draws.
        utterances: Utterances of both splits; only used with online targets.
        cache_targets: Targets to read or compute, as `CacheSpec.targets`. Default: those that the cache was made for, and
            ``clean_and_masked`` online.
        audio: Location of the audio that the cache refers to. Default: the place that it has recorded.
        frames: How frames of a teacher with another rate than 50 become those of the student; see `StudentFrames`. Default: the
            default there.
        local, local_gb: Folder of each node for copies of the cache's files, and its limit, as for `CacheReader`. Default: none.
        precision: Precision of the teacher's arithmetic; only used with online targets. Default: ``fp32``.
        initial: As for `training_loop.train`.
        cpu_threads: Number of PyTorch threads of a worker without a GPU.
        reserved_cpus: Number of cores that Ray reserves for each worker.
        in_process: Whether a single worker runs in this process, which already has its cores and GPU. The caller then
            handles restarts.
        as_task: Whether a single worker is a plain Ray task, which starts much sooner than a worker of Ray Train, but waits without
            limit for its cores and GPU. Default: False.

    Raises:
        TrainingError: Ray cannot start the workers, or they failed more than ``settings.max_failures`` times.
        ValueError, FloatingPointError, OSError: as `training_loop.train`, from any worker.
    """
    import ray.train
    import ray.train.torch

    check_trackers(settings.trackers)
    job = {
        "student": config.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
        "folder": str(folder),
        "layers": layers,
        "cache": cache,
        "cache_targets": cache_targets,
        "audio": audio,
        "frames": frames,
        "local": local,
        "local_gb": local_gb,
        "precision": precision,
        "teacher": teacher,
        "teachers": [asdict(one) for one in teachers],
        "masks": masks.model_dump(mode="json"),
        "utterances": [vars(u) for u in utterances] if settings.targets == "online" else [],
        "initial": None if initial is None else str(initial),
        "threads": cpu_threads,
    }
    if in_process and settings.workers == 1:
        torch.set_num_threads(cpu_threads)
        with memory_named("the training", _memory_advice(settings)):
            _train(job, Rank(device=_device(job)))
        return
    if as_task and settings.workers == 1:
        if (problem := _run_task(job, settings, reserved_cpus)) is not None:
            raise problem
        return
    name = uuid.uuid4().hex[:12]
    refusal = folder / run_files.RAY / f"{name}.refusal"
    refusal.parent.mkdir(parents=True, exist_ok=True)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=job | {"refusal": str(refusal)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": reserved_cpus} | ({"GPU": 1} if settings.use_gpu else {}),
        ),
        # Progress is in our own checkpoints; a unique name keeps Ray from resuming the state of another run.
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder / run_files.RAY),
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=_START_TRIES
            ),
        ),
    )
    try:
        problem = _fit(trainer)
    except ray.train.TrainingFailedError as error:
        problem = _explain(error, settings)
        if isinstance(problem, TrainingError):
            _LOG.error("the training failed", exc_info=error)  # The message to the user has no traceback.
    finally:
        refusal.unlink(missing_ok=True)
    if problem is not None:
        raise problem


def _run_task(job: dict[str, Any], settings: TrainSettings, cpus: int) -> Exception | None:
    """Train in a Ray task, which is started again if it fails, and return the error to show, if any."""
    import ray
    import ray.exceptions

    task = ray.remote(num_cpus=cpus, num_gpus=int(settings.use_gpu), max_retries=0)(_task)
    cause: Exception = AssertionError("there is at least one attempt")
    for _ in range(settings.max_failures + 1):
        running = task.remote(job)
        try:
            return cast(Exception | None, ray.get(running))
        except ray.exceptions.RayError as error:
            _LOG.error("the training failed", exc_info=error)  # The message to the user has no traceback.
            cause = getattr(error, "cause", None) or error
        except BaseException:
            ray.cancel(running, force=True)  # An interrupted caller releases the lock of the run's folder.
            raise
    return _explain_causes([cause], settings)


def _fit(trainer: Any) -> Exception | None:
    """Run a trainer and return what its workers returned.

    It runs in another thread, since in the main one it would replace the handler of Ctrl-C by one that waits for the workers.
    """
    if threading.current_thread() is not threading.main_thread():
        return cast(Exception | None, trainer.fit().return_value)
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit().return_value)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    return cast(Exception | None, outcome.result())


def _explain(error: Exception, settings: TrainSettings) -> Exception:
    """Return the error to show for an error of Ray Train: a worker's own ValueError or OSError, or else a TrainingError."""
    import ray.train

    if not isinstance(error, ray.train.WorkerGroupError):
        cause = getattr(error, "controller_failure", error)
        return TrainingError(
            f"Ray could not start the training's {settings.workers} workers ({_first_sentence(cause)}); change train.workers or "
            "train.use_gpu, or add machines with enough free cores and GPUs"
        )
    # Ray wraps the workers' errors: the cause on one rank, and often broken connections on the others.
    causes = [
        getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", failure)
        for failure in error.worker_failures.values()
    ]
    return _explain_causes(causes, settings)


def _explain_causes(causes: list[Exception], settings: TrainSettings) -> Exception:
    """Return the error to show for the workers' errors of the last attempt."""
    import ray.exceptions

    for cause in causes:
        if isinstance(cause, (ValueError, OSError)) and not isinstance(cause, ConnectionError):
            return cause
    died = any(isinstance(cause, (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)) for cause in causes)
    if any(map(ran_out_of_memory, causes)):
        why, hint = "a worker ran out of memory", f"; {_memory_advice(settings)}"
    elif died:
        why = "a worker's process died, for example because the machine ran out of memory"
        hint = f"; if memory ran out, {_memory_advice(settings)}"
    else:
        why, hint = f"a worker failed: {_first_sentence(causes[0])}", ""
    return TrainingError(
        f"the training failed {settings.max_failures + 1} times (train.max_failures is {settings.max_failures}), the last time "
        f"because {why}{hint}; the same command continues from the last checkpoint"
    )


def _memory_advice(settings: TrainSettings) -> str:
    """Return which key to lower if memory runs out in training."""
    key = "train.batch_seconds" if settings.batch_size is None else "train.batch_size"
    key += " (a number below what auto found)" if settings.batch_seconds == "auto" else ""
    others = "" if settings.checkpoint_activations else ", set train.checkpoint_activations=true"
    return f"lower {key}{others}, or lower corpus.max_seconds if one utterance is too long"


def _first_sentence(error: BaseException) -> str:
    return first_line(error).partition(". ")[0].removesuffix(".")
