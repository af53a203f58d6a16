"""A run: its configuration, and what its stages share."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.markup import escape

from ray_distill.pipeline.composition.explanation import for_teacher
from ray_distill.pipeline.composition.sections import TeacherEntry
from ray_distill.pipeline.config import Config, ConfigError
from ray_distill.pipeline.corpus.cached_corpus import known_fingerprint
from ray_distill.pipeline.corpus.hub_dataset import dataset_of_run, download_dataset, keep_dataset, parse_hub_dataset
from ray_distill.pipeline.corpus.index import INDEX, CorpusIndex
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.stages.progress import Position, ProgressUpdate, shown
from ray_distill.pipeline.stages.run_audio import audio_spec_of, check_reference, shard_seconds_of
from ray_distill.pipeline.stages.run_device import batch_seconds_of, check_device
from ray_distill.pipeline.stages.run_teacher import keep_checkpoint, other_commit, run_checkpoint
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.train_state import resume_step
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterances
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import Teacher, is_path, load_teacher, split_options


class Run:
    """The state of a run that its stages share. Teacher, corpus and cache are opened when a stage first needs them.

    Args:
        config: Configuration.
        console: Console for progress and messages.

    Attributes:
        config: Configuration.
        console: Console for progress and messages.
        folder: Folder of the run.
        parts: The run as each of its teachers sees it, with one cache each; the run itself if it has one teacher. With several, the
            teacher, the layers and the cache of the run itself are those of `main`.
        cache: Location of the cache.
        position: How far the current stage is.

    Raises:
        ConfigError: A path is relative inside a Ray job.
    """

    def __init__(self, config: Config, console: Console) -> None:
        teacher_path = split_options(config.teacher.checkpoint)[1]
        refuse_relative("runs", config.runs, config.runs.is_absolute())
        refuse_relative("cache.path", config.cache.path, config.cache.is_absolute)
        if (audio := config.cache.audio_path) is not None:
            refuse_relative("cache.audio_path", audio, audio == config.cache.audio_location)
        if (start := config.train.init_from) is not None:
            refuse_relative("train.init_from", start, Path(start).is_absolute())
        corpus = config.corpus.path
        refuse_relative("corpus.path", corpus, corpus.is_absolute() or parse_hub_dataset(corpus) is not None)
        refuse_relative(
            "teacher.checkpoint", teacher_path, Path(teacher_path).is_absolute() or not is_path(teacher_path)
        )
        self.config = config
        self.console = console
        self.folder = RunFolder(config.folder.absolute())
        self.cache = Store(config.cache.location)
        self.position = Position("first")
        self._given_teacher: Teacher | None = None  # See `sibling`.
        self.teacher_file = self.folder.teacher_file
        self.failed_file = self.folder.failed_file
        self.parts: tuple[Run, ...] = tuple(TeacherRun(self, entry) for entry in config.teachers) or (self,)

    @property
    def main(self) -> "Run":
        """The part of the teacher that the student's own heads predict."""
        return self.parts[self.config.owner]

    def sibling(self, config: Config, console: Console, teachers: Sequence[Teacher | None] | None = None) -> "Run":
        """Return a run of another configuration with the same teachers, which are not loaded again.

        Args:
            config: Its configuration.
            console: Its console.
            teachers: Teacher of each part; None for one that is not loaded. Default: those of this run.
        """
        other = Run(config, console)
        given = [part.teacher for part in self.parts] if teachers is None else teachers
        for part, mine, teacher in zip(other.parts, self.parts, given, strict=True):
            part._given_teacher, part.checkpoint = teacher, mine.checkpoint
        return other

    def settings(self) -> TrainSettings:
        """Return the settings of the training, with an objective for each of several teachers."""
        return self.config.training([(len(part.layers), part.teacher.dim) for part in self.parts])

    @property
    def target_dim(self) -> int:
        """Width of the targets: that of the teacher, or of several side by side."""
        return self.config.target_dim([part.teacher.dim for part in self.parts])

    def named(self) -> AbstractContextManager[None]:
        """Name the teacher in errors of the block, if there are several."""
        return nullcontext()

    def say(self, text: str) -> None:
        """Print one line for the user."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @cached_property
    def checkpoint(self) -> str:
        """Specification of the teacher for any process of any node; see `run_checkpoint`."""
        if self.config.teachers:
            return self.main.checkpoint
        return run_checkpoint(self.teacher_file, self.config.teacher.checkpoint)

    def keep_checkpoint(self) -> None:
        """Keep the commits of teachers on the hub in the run's folder, for when the run is resumed."""
        for part in self.parts:
            keep_checkpoint(part.teacher_file, part.config.teacher.checkpoint, part.checkpoint)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, on the CPU.

        Raises:
            ConfigError: It lacks a layer or the mask embedding that the configuration needs.
        """
        if self.config.teachers:
            return self.main.teacher
        teacher = self._given_teacher or load_teacher(self.checkpoint, "cpu")
        if self._given_teacher is None and self.teacher_is_random:
            self.say(
                "[yellow]The teacher has RANDOM weights: this run only shows that everything works, and its features are "
                "meaningless. Choose a real teacher for real features.[/yellow]"
                if not isinstance(self, TeacherRun)
                else "[yellow]teacher has RANDOM weights, so there is nothing to learn from it.[/yellow]"
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
        """Whether all teachers have random weights."""
        return all(split_options(part.config.teacher.checkpoint)[1].startswith("random:") for part in self.parts)

    def layers_of(self, teacher: Teacher) -> tuple[int, ...]:
        """Return the layers of a teacher to learn from, counted from 1."""
        return tuple(self.config.teacher.layers or range(1, teacher.num_layers + 1))

    @property
    def layers(self) -> tuple[int, ...]:
        """Teacher layers to learn from, counted from 1."""
        if self.config.teachers:
            return self.main.layers
        return self.layers_of(self.teacher)

    @cached_property
    def corpus_path(self) -> Path:
        """The corpus: a file or folder. A dataset on the hub is downloaded, and the run keeps its commit.

        Raises:
            ValueError: The hub has no such dataset, or it can't be downloaded.
        """
        requested, file = parse_hub_dataset(self.config.corpus.path), self.folder.dataset_file
        if requested is None:
            keep_dataset(file, None, None)
            return self.config.corpus.path
        resolved = dataset_of_run(file, requested)
        self.say(f"index   {escape(str(resolved))}: files that are missing in the hub's cache are downloaded")
        found = download_dataset(resolved)
        keep_dataset(file, requested, resolved)
        return found

    @cached_property
    def corpus(self) -> CorpusIndex:
        """The corpus index that the index stage made."""
        return CorpusIndex.load(self.folder.corpus)

    @property
    def utterances(self) -> Utterances:
        """All utterances of the corpus index."""
        return self.corpus.utterances

    @property
    def audio(self) -> str | None:
        """Where the audio of the run's cache is, as for `CacheReader`; None if the cache holds it."""
        cache = self.config.cache
        return str(self.folder.corpus / INDEX) if cache.audio == "source" else cache.audio_location

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
        if self.config.teachers:
            return self.main.spec
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
            corpus = known_fingerprint(found, self.corpus, cache.audio_location)
            check_reference(found, cache)
        audio = self.audio_spec
        return CacheSpec(
            teacher=teacher,
            num_layers=self.teacher.num_layers,
            dim=self.teacher.dim,
            layers=self.layers,
            masks=self.config.masks,
            codec=cache.codec,
            targets=cache.targets,
            corpus=corpus,
            shard_seconds=shard_seconds_of(cache, audio, self.seconds),
            batch_seconds=batch_seconds_of(cache),
            precision=self.precision,
            audio=cache.audio,
            audio_store=None if audio is None else audio.audio_fingerprint,
            frame_rate=self.teacher.stated_rate,
        )

    @cached_property
    def audio_spec(self) -> CacheSpec | None:
        """Specification of what the run's cache refers to for its audio; None if the cache holds it. See `audio_spec_of`."""
        return audio_spec_of(self.config.cache, self.whole.corpus if isinstance(self, TeacherRun) else self.corpus)

    @cached_property
    def precision(self) -> Precision:
        """Precision of the teacher's arithmetic."""
        if self.config.teachers:
            return self.main.precision
        settings = self.config.cache
        if settings.precision is not None:
            return settings.precision
        if Cache.exists(self.cache):  # It may have been built on another kind of machine.
            return Cache.open(self.cache).spec.precision
        return "fp16" if settings.gpus_per_actor else "fp32"

    def check_device(self) -> None:
        """Check that the teacher can run as configured on its device; see `run_device.check_device`."""
        check_device(self.config, self.precision)

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
            step, _ = resume_step(self.folder.path)
            advice = (
                "the same command starts the training again, since it has no checkpoint yet"
                if step is None
                else f"the same command resumes from step {step}"
            )
        return f"interrupted in the {at.stage} stage{far}; {advice}"


class TeacherRun(Run):
    """A run as one of its several teachers sees it: with that teacher, its cache, and the utterances that it can take.

    Args:
        whole: The run.
        entry: The teacher in the configuration.

    Attributes:
        whole: The run.
        name: Name of the teacher.
        entry: The teacher in the configuration.
    """

    def __init__(self, whole: Run, entry: TeacherEntry) -> None:
        self.whole, self.name, self.entry = whole, entry.name, entry
        with self.named():
            super().__init__(whole.config.of_teacher(entry), whole.console)
        self.teacher_file = self.folder.teacher_file_of(entry.name)
        self.failed_file = self.folder.failed_file_of(entry.name)

    def say(self, text: str) -> None:
        """Print one line for the user, with the teacher's name after the first word."""
        super().say(re.sub(r"^((?:\[\w+\])?\w+ {2,})", rf"\g<1>{self.name}: ", text))

    @contextmanager
    def named(self) -> Iterator[None]:
        """See `Run.named`."""
        try:
            yield
        except ConfigError as error:
            if str(error).startswith(f"teachers.{self.name}"):  # A block inside has named it.
                raise
            raise ConfigError(for_teacher(self.name, str(error))) from error

    @cached_property
    def teacher(self) -> Teacher:
        """See `Run.teacher`."""
        with self.named():
            return super().teacher

    @cached_property
    def corpus(self) -> CorpusIndex:
        """The corpus index without the utterances that are too short or too long for the teacher, which the others may take.

        Raises:
            ConfigError: The teacher can take no utterance of the training or of the validation split.
        """
        index, teacher = self.whole.corpus, self.teacher
        samples = index.utterances.num_samples
        fits = (samples >= teacher.min_samples) & (samples <= (teacher.max_samples or math.inf))
        if fits.all():
            return index
        fitting = Utterances(index.utterances.table.filter(pa.array(fits)))
        for split in ("train", "validation"):
            if not fitting.of_split(split):
                raise ConfigError(
                    f"corpus.max_seconds: {teacher.name} can take no utterance of the split {split}, because of their lengths; leave "
                    "this teacher out, or use another corpus"
                )
        return replace(index, utterances=fitting)

    @contextmanager
    def progress(self, name: str, unit: str) -> Iterator[ProgressUpdate]:
        """See `Run.progress`."""
        with self.whole.progress(name, unit) as update:
            yield update


def refuse_relative(key: str, path: Path | str, absolute: bool) -> None:
    """Raise a ConfigError in a Ray job, whose working directory is a temporary copy, if a path is not absolute."""
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not absolute:
        raise ConfigError(
            f"{key}: {path} is relative, but a Ray job runs in a copy of its folder; give an absolute path"
        )
