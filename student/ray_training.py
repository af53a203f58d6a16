"""The training loop on Ray Train workers."""

import uuid
from pathlib import Path
from typing import Any

import torch

from student.config import StudentConfig
from student.metrics import check_trackers
from student.rank import Rank
from student.settings import TrainSettings
from student.train_state import CheckpointError
from student.training import train
from teacher_cache.batch import TargetReader
from teacher_cache.online import OnlineReader
from teacher_cache.reader import CacheReader
from teacher_cache.shards import SourceUtterance
from teacher_cache.spec import MaskDraws


def _readers(job: dict[str, Any], device: torch.device) -> tuple[TargetReader, TargetReader]:
    layers = job["layers"]
    if job["settings"]["targets"] == "cached":
        return (
            CacheReader(job["cache"], "train", layers, job["masks"]["draws"]),
            CacheReader(job["cache"], "validation", layers),
        )
    from teacher_cache.teachers import load_teacher

    teacher = load_teacher(job["teacher"], device)
    masks = MaskDraws.model_validate(job["masks"])
    utterances = [SourceUtterance(**utterance) for utterance in job["utterances"]]
    by_split = {
        split: OnlineReader([u for u in utterances if u.split == split], teacher, masks, layers)
        for split in ("train", "validation")
    }
    return by_split["train"], by_split["validation"]


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
    train_reader, validation_reader = _readers(job, device)
    try:
        train(
            StudentConfig.model_validate(job["student"]),
            TrainSettings.model_validate(job["settings"]),
            train_reader,
            validation_reader,
            Path(job["folder"]),
            rank=rank,
            initial=None if job["initial"] is None else Path(job["initial"]),
            wrap=lambda distiller: ray.train.torch.prepare_model(distiller, move_to_device=False),
            on_validation=lambda row: ray.train.report(row),
        )
    except (FloatingPointError, CheckpointError) as error:
        return error  # Every rank raises these at the same step.
    return None


def train_on_ray(
    config: StudentConfig,
    settings: TrainSettings,
    folder: Path,
    *,
    layers: tuple[int, ...],
    cache: str | None,
    teacher: str,
    masks: MaskDraws,
    utterances: list[SourceUtterance],
    initial: Path | None = None,
    cpu_threads: int = 1,
) -> None:
    """Trains on ``settings.workers`` Ray Train workers; Ray must be initialised. Goes on from the run's last checkpoint.

    Args:
        config, settings, folder: as in `student.training.train`; the folder must be reachable from every node.
        layers: 1-based teacher layers to learn from.
        cache: location of the cache, for cached targets.
        teacher, masks, utterances: for online targets.
        initial: as `student.training.train` takes it.
        cpu_threads: PyTorch threads of a worker without a GPU.

    Raises:
        ValueError, FloatingPointError, OSError: as `student.training.train` does, from whichever worker it came.
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
        "teacher": teacher,
        "masks": masks.model_dump(mode="json"),
        "utterances": [vars(u) for u in utterances] if settings.targets == "online" else [],
        "initial": None if initial is None else str(initial),
        "threads": cpu_threads,
    }
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(num_workers=settings.workers, use_gpu=settings.use_gpu),
        # Our own checkpoints carry the progress; a name of its own keeps Ray from resuming some other run's state.
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
    )
    try:
        problem = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        # Ray wraps what the workers raised: one rank's reason, and perhaps the broken connections of the others.
        causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
        reasons = [c for c in causes if isinstance(c, (ValueError, OSError)) and not isinstance(c, ConnectionError)]
        problem = reasons[0] if reasons else error
    if problem is not None:
        raise problem
