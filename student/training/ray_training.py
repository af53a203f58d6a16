"""The training loop on Ray Train workers."""

import logging
import uuid
from pathlib import Path
from typing import Any

import torch

from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.metrics import check_trackers
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import CheckpointError
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import Targets
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.target_batch import TargetReader

_LOG = logging.getLogger(__name__)
_START_TRIES = 30
"""How often Ray waits a minute for the workers' cores and GPUs: long enough for a cluster to grow, and not for ever."""


class TrainingError(ValueError):
    """Workers that could not be had, or failed too often; the message is for the user."""


def _readers(job: dict[str, Any], device: torch.device) -> tuple[TargetReader, TargetReader]:
    layers = job["layers"]
    if job["settings"]["targets"] == "cached":
        return (
            CacheReader(job["cache"], "train", layers, job["masks"]["draws"], targets=job["cache_targets"]),
            CacheReader(job["cache"], "validation", layers),
        )
    from ray_distill.teacher_cache.targets.online_targets import OnlineReader
    from ray_distill.teacher_cache.teachers import load_teacher

    teacher = load_teacher(job["teacher"], device)
    masks = MaskDraws.model_validate(job["masks"])
    utterances = [Utterance(**utterance) for utterance in job["utterances"]]
    by_split = {
        split: OnlineReader(
            [u for u in utterances if u.split == split],
            teacher,
            masks,
            layers,
            job["cache_targets"] or "clean_and_masked",
            job["precision"],
        )
        for split in ("train", "validation")
    }
    return by_split["train"], by_split["validation"]


class _RowMetrics:
    """The last row of a training, for the exporter of the node of rank 0. Ray puts ``ray_`` before each name.

    Args:
        run: name of the run, a tag of each value.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        # Kind and field of a row; the metric, what it is, and the factor between the two.
        fields = {
            ("train", "step"): ("step", "Optimiser steps done", 1),
            ("train", "steps"): ("steps", "Optimiser steps of the whole training", 1),
            ("train", "loss"): ("loss", "Loss per frame, mean since the last row", 1),
            ("train", "learning_rate"): ("learning_rate", "Of the last step", 1),
            ("train", "gradient_norm"): ("gradient_norm", "Before clipping", 1),
            ("train", "skipped_steps"): ("skipped_steps", "Steps left out because something was not finite", 1),
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
        """A row of ``metrics.jsonl``."""
        for (kind, field), (gauge, factor) in self._fields.items():
            if row["kind"] == kind and field in row:
                gauge.set(row[field] * factor, self._tags)


def _worker(job: dict[str, Any]) -> Exception | None:
    """Trains; returns what went wrong where starting again would only end the same."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(job["threads"])
    else:
        torch.cuda.set_device(device)
    rank = Rank(context.get_world_rank(), context.get_world_size(), device)
    try:
        _train(
            job,
            rank,
            wrap=lambda distiller: ray.train.torch.prepare_model(distiller, move_to_device=False),
            on_row=_RowMetrics(Path(job["folder"]).name).set if rank.index == 0 else lambda row: None,
            on_validation=lambda row: ray.train.report(row),
        )
    except (FloatingPointError, CheckpointError) as error:
        return error  # Every rank raises these at the same step.
    return None


def _train(job: dict[str, Any], rank: Rank, **options: Any) -> None:
    train_reader, validation_reader = _readers(job, rank.device)
    train(
        StudentConfig.model_validate(job["student"]),
        TrainSettings.model_validate(job["settings"]),
        train_reader,
        validation_reader,
        Path(job["folder"]),
        rank=rank,
        initial=None if job["initial"] is None else Path(job["initial"]),
        cache_fingerprint=train_reader.cache.fingerprint if isinstance(train_reader, CacheReader) else None,
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
    masks: MaskDraws,
    utterances: list[Utterance],
    cache_targets: Targets | None = None,
    precision: Precision = "fp32",
    initial: Path | None = None,
    cpu_threads: int = 1,
    reserved_cpus: int = 1,
    in_process: bool = False,
) -> None:
    """Trains on ``settings.workers`` Ray Train workers; Ray must be initialised. Goes on from the run's last checkpoint.

    Args:
        config, settings, folder: as in `training_loop.train`; the folder must be reachable from every node.
        layers: 1-based teacher layers to learn from.
        cache: location of the cache, for cached targets.
        teacher, masks, utterances: for online targets.
        cache_targets: which targets to read or compute, as `CacheSpec.targets`; default what the cache was made
            for, online ``clean_and_masked``.
        precision: Precision of the teacher's arithmetic, for online targets. Default ``fp32``.
        initial: as `ray_distill.student.training.training_loop.train` takes it.
        cpu_threads: PyTorch threads of a worker without a GPU.
        reserved_cpus: cores that Ray sets aside for each worker.
        in_process: a single worker is this process, which has its cores and GPU already, and restarts are the caller's.

    Raises:
        TrainingError: Ray has no room for the workers, or they failed more than ``settings.max_failures`` times.
        ValueError, FloatingPointError, OSError: as `training_loop.train` does, from whichever worker it came.
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
        "precision": precision,
        "teacher": teacher,
        "masks": masks.model_dump(mode="json"),
        "utterances": [vars(u) for u in utterances] if settings.targets == "online" else [],
        "initial": None if initial is None else str(initial),
        "threads": cpu_threads,
    }
    if in_process and settings.workers == 1:
        device = torch.device("cuda", 0) if settings.use_gpu else torch.device("cpu")
        torch.set_num_threads(cpu_threads)
        _train(job, Rank(device=device))
        return
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": reserved_cpus} | ({"GPU": 1} if settings.use_gpu else {}),
        ),
        # Our own checkpoints carry the progress; a name of its own keeps Ray from resuming some other run's state.
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=_START_TRIES
            ),
        ),
    )
    try:
        problem = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        problem = _reason(error, settings)
        if isinstance(problem, TrainingError):
            _LOG.error("the training failed", exc_info=error)  # The sentence leaves out what a developer needs.
    if problem is not None:
        raise problem


def _reason(error: Exception, settings: TrainSettings) -> Exception:
    """What Ray Train raised, for the user: what a worker raised where that is for the user, else a TrainingError."""
    import ray.exceptions
    import ray.train

    if not isinstance(error, ray.train.WorkerGroupError):
        cause = getattr(error, "controller_failure", error)
        return TrainingError(
            f"Ray could not start the training's {settings.workers} workers ({_first_sentence(cause)}); change train.workers or "
            "train.use_gpu, or see to machines with room for them"
        )
    # Ray wraps what the workers raised: one rank's reason, and perhaps the broken connections of the others.
    causes = [
        getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", failure)
        for failure in error.worker_failures.values()
    ]
    for cause in causes:
        if isinstance(cause, (ValueError, OSError)) and not isinstance(cause, ConnectionError):
            return cause
    died = next((cause for cause in causes if isinstance(cause, ray.exceptions.RayActorError)), None)
    memory = next((cause for cause in causes if isinstance(cause, (torch.OutOfMemoryError, MemoryError))), None)
    if memory is None and died is not None:
        why = "a worker's process died, as when the machine's memory runs out"
    else:
        why = f"a worker failed: {_first_sentence(memory or causes[0])}"
    hint = "; where memory was short, lower train.batch_size or train.batch_seconds" if memory or died else ""
    return TrainingError(
        f"the training was broken off {settings.max_failures + 1} times (train.max_failures is {settings.max_failures}), the last "
        f"time since {why}{hint}; the same command goes on from the last checkpoint"
    )


def _first_sentence(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.partition(". ")[0].removesuffix(".")
