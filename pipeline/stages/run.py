"""A run: its configuration, and what its stages share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from rich.console import Console

from ray_distill.pipeline.config import Config, ConfigError
from ray_distill.pipeline.corpus.cached_corpus import known_fingerprint
from ray_distill.pipeline.corpus.index import CorpusIndex
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.stages.progress import Position, ProgressUpdate, shown
from ray_distill.pipeline.stages.run_teacher import keep_checkpoint, other_commit, run_checkpoint
from ray_distill.student.training.train_state import saved_step
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterances, default_shard_seconds
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import Teacher, is_path, load_teacher, split_options


class Run:
    """The state of a run that its stages share. Teacher, corpus and cache are opened when a stage first needs them.

    Args:
        config: Configuration.
        console: Console for progress and messages.
        teacher: Teacher of the configuration on the CPU, if it is already loaded. Default: None.
        checkpoint: Specification of that teacher; see `checkpoint`. Default: None.

    Attributes:
        config: Configuration.
        console: Console for progress and messages.
        folder: Folder of the run.
        cache: Location of the cache.
        position: How far the current stage is.

    Raises:
        ConfigError: A path is relative inside a Ray job.
    """

    def __init__(
        self, config: Config, console: Console, teacher: Teacher | None = None, checkpoint: str | None = None
    ) -> None:
        teacher_path = split_options(config.teacher.checkpoint)[1]
        refuse_relative("runs", config.runs, config.runs.is_absolute())
        refuse_relative("cache.path", config.cache.path, config.cache.is_absolute)
        if (start := config.train.init_from) is not None:
            refuse_relative("train.init_from", start, Path(start).is_absolute())
        refuse_relative("corpus.path", config.corpus.path, config.corpus.path.is_absolute())
        refuse_relative(
            "teacher.checkpoint", teacher_path, Path(teacher_path).is_absolute() or not is_path(teacher_path)
        )
        self.config = config
        self.console = console
        self.folder = RunFolder(config.folder.absolute())
        self.cache = Store(config.cache.location)
        self.position = Position("first")
        self._given_teacher = teacher
        if checkpoint is not None:
            self.checkpoint = checkpoint

    def say(self, text: str) -> None:
        """Print one line for the user."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @cached_property
    def checkpoint(self) -> str:
        """Specification of the teacher for any process of any node; see `run_checkpoint`."""
        return run_checkpoint(self.folder.teacher_file, self.config.teacher.checkpoint)

    def keep_checkpoint(self) -> None:
        """Keep the commit of a teacher on the hub in the run's folder, for when the run is resumed."""
        keep_checkpoint(self.folder.teacher_file, self.config.teacher.checkpoint, self.checkpoint)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, on the CPU.

        Raises:
            ConfigError: It lacks a layer or the mask embedding that the configuration needs.
        """
        teacher = self._given_teacher or load_teacher(self.checkpoint, "cpu")
        if self._given_teacher is None and self.teacher_is_random:
            self.say(
                "[yellow]The teacher has RANDOM weights: this run only shows that everything works, and its features are "
                "meaningless. Choose a real teacher for real features.[/yellow]"
            )
        for layer in self.layers_of(teacher):
            if not 1 <= layer <= teacher.num_layers:
                raise ConfigError(
                    f"teacher.layers: there is no layer {layer}; {teacher.name} has layers 1 to {teacher.num_layers}"
                )
        if self.config.masks.draws and not teacher.has_mask_embedding:
            raise ConfigError(
                f"masks.draws: {teacher.name} has no mask embedding, so it has no masked targets; set masks.draws=0 for clean "
                f"targets, teacher.checkpoint=mean-mask:{self.config.teacher.checkpoint} for a substitute embedding, or use a "
                "checkpoint with a mask embedding"
            )
        return teacher

    @property
    def teacher_is_random(self) -> bool:
        """Whether the teacher has random weights."""
        return split_options(self.config.teacher.checkpoint)[1].startswith("random:")

    def layers_of(self, teacher: Teacher) -> tuple[int, ...]:
        """Return the layers of a teacher to learn from, counted from 1."""
        return tuple(self.config.teacher.layers or range(1, teacher.num_layers + 1))

    @property
    def layers(self) -> tuple[int, ...]:
        """Teacher layers to learn from, counted from 1."""
        return self.layers_of(self.teacher)

    @cached_property
    def corpus(self) -> CorpusIndex:
        """The corpus index that the index stage made."""
        return CorpusIndex.load(self.folder.corpus)

    @property
    def utterances(self) -> Utterances:
        """All utterances of the corpus index."""
        return self.corpus.utterances

    @property
    def seconds(self) -> float:
        """Duration of all utterances, in seconds."""
        return self.utterances.seconds

    @cached_property
    def spec(self) -> CacheSpec:
        """Specification of the cache that the run needs.

        Raises:
            ConfigError: The cache was made with another commit of the same teacher on the hub, which has other weights.
        """
        cache = self.config.cache
        teacher, corpus = self.teacher.fingerprint, self.corpus.fingerprint
        if Cache.exists(self.cache):  # It may have been made on another kind of machine, or by an earlier version.
            found = Cache.open(self.cache)
            if found.is_of_teacher(self.teacher.name, teacher):
                teacher = found.spec.teacher
            elif (other := other_commit(found.record["teacher_spec"], self.checkpoint)) is not None:
                raise ConfigError(
                    f"teacher.checkpoint: {self.teacher.name} has other weights than commit {other.revision} of it, with which the "
                    f"cache at {self.cache.location} was made; set teacher.checkpoint={other.repository}@{other.revision}, or "
                    "cache.path to another folder"
                )
            corpus = known_fingerprint(found, self.corpus)
        return CacheSpec(
            teacher=teacher,
            num_layers=self.teacher.num_layers,
            dim=self.teacher.dim,
            layers=self.layers,
            masks=self.config.masks,
            codec=cache.codec,
            targets=cache.targets,
            corpus=corpus,
            shard_seconds=self._shard_seconds,
            batch_seconds=cache.batch_seconds,
            precision=self.precision,
            audio=cache.audio,
        )

    @property
    def _shard_seconds(self) -> float:
        minutes = self.config.cache.shard_minutes
        if minutes is not None:
            return minutes * 60
        return (
            Cache.open(self.cache).spec.shard_seconds
            if Cache.exists(self.cache)
            else default_shard_seconds(self.seconds)
        )

    @cached_property
    def precision(self) -> Precision:
        """Precision of the teacher's arithmetic."""
        settings = self.config.cache
        if settings.precision is not None:
            return settings.precision
        if Cache.exists(self.cache):  # It may have been built on another kind of machine.
            return Cache.open(self.cache).spec.precision
        return "fp16" if settings.gpus_per_actor else "fp32"

    def check_precision(self) -> None:
        """Check that the teacher can run at the configured precision, in the cache's actors or in the training's workers.

        Raises:
            ConfigError: The precision is fp16, and the teacher runs on CPU.
        """
        if self.precision != "fp16":
            return
        found = Cache.exists(self.cache) and Cache.open(self.cache).spec.precision == "fp16"
        origin = f", and the cache at {self.cache.location} was computed in fp16" if found else ""
        if self.config.train.targets == "online" and not self.config.train.use_gpu:
            raise ConfigError(
                f"cache.precision fp16 needs GPUs{origin}; set train.use_gpu=true, or set cache.precision=fp32"
            )
        if self.config.train.targets == "cached" and not self.config.cache.gpus_per_actor:
            raise ConfigError(
                f"cache.precision fp16 needs GPUs{origin}; set cache.gpus_per_actor, or set cache.precision=fp32"
                f"{' and a new cache.path' if found else ''}"
            )

    @contextmanager
    def progress(self, name: str, unit: str) -> Iterator[ProgressUpdate]:
        """Show the progress of a stage while the block runs, as a bar or as lines.

        Args:
            name: Name of the stage.
            unit: Plural noun of what is counted.

        Yields:
            A function that moves the bar.
        """
        self.position = Position(name, unit)
        with shown(self.position, self.console) as update:
            yield update

    def interruption(self) -> str:
        """Return the sentence for a user who interrupts the run: how far it is, and what the same command does then."""
        at = self.position
        far = f" after {at.done:,} of {at.total:,} {at.unit}" if at.total else ""
        advice = "the same command runs this stage again"
        if at.stage in ("index", "cache"):
            advice = "the same command resumes from there"
        elif at.stage == "train":
            step = saved_step(self.folder.checkpoints)
            advice = (
                "the same command starts the training again, since it has no checkpoint yet"
                if step is None
                else f"the same command resumes from step {step}"
            )
        return f"interrupted in the {at.stage} stage{far}; {advice}"


def refuse_relative(key: str, path: Path | str, absolute: bool) -> None:
    """Raise a ConfigError in a Ray job, whose working directory is a temporary copy, if a path is not absolute."""
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not absolute:
        raise ConfigError(
            f"{key}: {path} is relative, but a Ray job runs in a copy of its folder; give an absolute path"
        )
