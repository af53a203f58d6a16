"""The typed configuration of a run, read from YAML, changed by ``section.key=value``, and checked before any work.

The keys of ``corpus``, ``teacher`` and ``cache`` are defined here, those of ``train`` in ``student/training/train_settings.py``
and ``student/objectives/``, those of ``student`` in ``student/model/student_config.py``, and those of ``masks`` in
``teacher_cache/masks.py``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml

from ray_distill.pipeline.composition.config_tree import ConfigError as ConfigError  # Exported here too.
from ray_distill.pipeline.composition.config_tree import compose, default_cache
from ray_distill.pipeline.composition.explanation import explain
from ray_distill.pipeline.composition.teacher_entries import check_teachers, with_teacher_entries
from ray_distill.pipeline.corpus.formats import check_format
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.objective_keys import ObjectiveKeys
from ray_distill.student.objectives.several_teachers import (
    TEACHER_OBJECTIVES,
    SeveralTeachers,
    TeacherObjective,
    TeacherTerm,
)
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING, CHANGES_NO_RESULT, SAME_IN_ABLATION
from ray_distill.student.training.train_settings import SeveralTeacherSettings, TrainSettings
from ray_distill.teacher_cache.codecs import DEFAULT_CODEC, check_codec
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.patch_geometry import PatchGeometry
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.storage.cache_spec import Targets
from ray_distill.teacher_cache.storage.failed_utterances import DEFAULT_MAX_FAILED


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _check_format(name: str | None) -> str | None:
    return None if name is None else check_format(name)


class CorpusSection(_Section):
    """Location of the audio, and which of it is used."""

    path: Path
    """Folder in LibriSpeech's layout, any other folder of audio, a manifest (CSV, TSV, Parquet or JSON lines) with a column ``path``,
    or a corpus in another format; see ``format``."""
    format: Annotated[str | None, pydantic.AfterValidator(_check_format)] = None
    """Format of the corpus: ``folder``, ``manifest``, ``nemo``, ``fairseq``, ``kaldi``, ``lhotse``, ``huggingface``, ``webdataset``,
    ``common_voice`` or ``voxpopuli``. None looks at the files."""
    channel: int | Literal["mix"] | None = None
    """Channel to use of audio with several, counted from 0, or ``mix`` for their mean. None also takes the mean, and says how many
    utterances have several channels. A channel that the corpus itself names counts first."""
    train_splits: list[str] | None = None
    """Splits or folders to train on; ``.`` means the files in no split's folder. None takes those with a word that begins with
    ``train``; see `ray_distill.pipeline.corpus.index`."""
    validation_splits: list[str] | None = None
    """Splits or folders to validate on. None takes those with a word such as ``dev``, ``val``, ``valid``, ``validation`` or
    ``heldout``. Splits with a word that begins with ``test`` or ``eval`` are not used unless they are named."""
    validation_fraction: float = pydantic.Field(default=0.05, gt=0, lt=1)
    """Fraction of the utterances to hold out if the corpus has no validation split."""
    min_seconds: float = pydantic.Field(default=0.025, ge=0.025)
    """Shortest audio in seconds. Shorter files are skipped and listed. The default, also the minimum, is 400 samples (one frame)."""
    max_seconds: float = pydantic.Field(default=40.0, gt=0)
    """Longest utterance in seconds. Longer audio is skipped and listed, or cut; see ``long_audio``."""
    long_audio: Literal["skip", "cut"] = "skip"
    """What becomes of audio longer than ``max_seconds``: ``skip`` it, or ``cut`` it at pauses into windows that cover it."""

    @pydantic.field_validator("channel")
    @classmethod
    def _possible(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and not 0 <= value < 64:
            raise ValueError(f"there is no channel {value}; channels are counted from 0, up to 63")
        return value


class TeacherSection(_Section):
    """The teacher."""

    checkpoint: Annotated[str, SAME_IN_ABLATION]
    """Checkpoint of the teacher: a ``.pt`` file, a Hugging Face folder, the name of a model on the Hugging Face Hub such as
    ``facebook/hubert-base-ls960`` or ``OWNER/NAME@REVISION`` (an existing path of that name comes first; ``hf://OWNER/NAME`` always
    means the hub), the folder of a run or an exported student, ``torchaudio:NAME``, ``builtin:phone-hubert`` for the small HuBERT
    in this package (see `ray_distill.teacher_cache.teachers.builtin`), or ``random:LxD`` for random weights.
    The prefix ``mean-mask:`` gives a teacher without a mask embedding a substitute, so that it has masked targets. The prefix
    ``layer-norm:`` normalises each frame of each layer, as teachers with layer norms before their blocks need."""
    layers: Annotated[list[int] | None, CHANGES_LOSS_MEANING] = None
    """Layers to learn from, counted from 1. None takes all of them."""


class CacheSection(_Section):
    """The teacher cache, and how it is built."""

    path: Annotated[str, SAME_IN_ABLATION]
    """Folder of the cache, or a URI such as ``s3://bucket/prefix``. A configuration that names none takes
    ``caches/TEACHER-CORPUS``."""
    codec: Annotated[str, pydantic.AfterValidator(check_codec), SAME_IN_ABLATION] = DEFAULT_CODEC
    """Storage format of the features: ``pca``, ``layer-pca``, ``int8``, ``fp16`` or ``fp32``. ``pca:STEP`` and
    ``layer-pca:STEP`` set the quantisation step. ``units:CLUSTERS`` and ``mvq:CODEBOOKS`` store discrete targets, for the objectives
    ``units`` and ``mvq``."""
    targets: Targets = "clean_and_masked"
    """Targets to store: ``clean_and_masked``, ``composite_only`` or ``clean_only``; see `CacheSpec`."""
    precision: Annotated[Precision | None, SAME_IN_ABLATION] = None
    """Precision of the teacher's forward passes; ``fp16`` needs GPUs. None takes the precision of an existing cache, or else
    ``fp16`` on GPUs and ``fp32`` on CPUs."""
    audio: Annotated[Literal["flac", "pcm"], SAME_IN_ABLATION] = "flac"
    """Storage format of the audio: ``flac`` (smaller) or ``pcm`` (faster to read)."""
    shard_minutes: Annotated[float, SAME_IN_ABLATION] = pydantic.Field(default=10.0, gt=0)
    """Minutes of audio per shard, the unit of work, retry and resume."""
    batch_seconds: Annotated[float, SAME_IN_ABLATION] = pydantic.Field(default=120.0, gt=0)
    """Seconds of audio per teacher batch, padding included."""
    actors: Annotated[int, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=1, ge=1)
    """Number of teachers that run in parallel."""
    gpus_per_actor: Annotated[float, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=0.0, ge=0)
    """GPUs per teacher. 0 runs the teacher on CPU."""
    cpus_per_actor: Annotated[int, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=1, ge=1)
    """CPU cores per teacher."""
    max_failed: Annotated[float, CHANGES_NO_RESULT, SAME_IN_ABLATION] = pydantic.Field(default=DEFAULT_MAX_FAILED, ge=0)
    """Number of utterances that may fail while the cache is built, because their audio can't be decoded or a hidden state is not
    finite; below 1 their share, at least 3 utterances; 0 allows none. They are left out and listed with reasons in
    ``corpus/failed.csv``. If more fail, the build stops."""
    verify: Annotated[bool, CHANGES_NO_RESULT, SAME_IN_ABLATION] = True
    """Whether to read the whole cache and compare its checksums before training."""

    @property
    def location(self) -> str:
        """Absolute path of the cache, or its URI."""
        return self.path if "://" in self.path else str(Path(self.path).absolute())

    @property
    def is_absolute(self) -> bool:
        """Whether the location does not depend on a process's working directory."""
        return "://" in self.path or Path(self.path).is_absolute()

    @pydantic.field_validator("max_failed")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value:g} is neither a share below 1 nor a whole number of utterances")
        return value

    @pydantic.field_validator("path", mode="before")
    @classmethod
    def _text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path


class TeacherEntry(TeacherSection):
    """One of several teachers."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Name of the teacher, by which metrics and reports call it."""
    cache: CacheSection
    """Cache of this teacher. Keys that are not given are those of the section ``cache``, and the path is ``caches/TEACHER-CORPUS``. A
    text is its path."""
    objective: TeacherObjective | None = None
    """Objective with this teacher: a table with ``objective`` (its name) and its keys as in ``train``, or the name alone. None takes
    the objective of ``train``."""
    weight: Annotated[float, CHANGES_LOSS_MEANING] = pydantic.Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of this teacher's loss. 0 leaves the teacher out of the loss."""
    start_step: int = pydantic.Field(default=0, ge=0)
    """First optimiser step, counted from 0, at which the teacher takes part. Validation always counts all teachers."""
    stop_step: int | None = pydantic.Field(default=None, ge=1)
    """First optimiser step at which the teacher takes no more part. None for the end of the training."""


class Config(_Section):
    """The configuration of a run."""

    name: Annotated[str, SAME_IN_ABLATION] = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run. Its files are stored in the folder ``runs/name``."""
    runs: Annotated[Path, CHANGES_NO_RESULT, SAME_IN_ABLATION] = Path("runs")
    """Folder of all runs."""
    corpus: Annotated[CorpusSection, SAME_IN_ABLATION]
    """Location of the audio, and which of it is used."""
    teacher: TeacherSection
    """The teacher. With ``teachers`` this section is not given."""
    teachers: Annotated[tuple[TeacherEntry, ...], CHANGES_LOSS_MEANING] = ()
    """Several teachers, in place of ``teacher``: a list of tables with the keys of ``teacher`` and those below. Each has a cache of
    its own, from the same corpus and with the same masks, and its own heads or predictors; see
    ``docs/how-to/several-teachers.md``."""
    masks: MaskDraws = MaskDraws()
    """Random masks that the student is trained with."""
    cache: CacheSection
    """The teacher cache, and how it is built."""
    student: dict[str, Any] = {}
    """Architecture of the student: fields of `StudentConfig`. If ``encoder_layers`` (``split_heads`` for split heads) and
    ``target_dim`` are missing or ``teacher``, they become the number of layers to learn from and the teacher's width."""
    train: TrainSettings
    """Training settings."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.runs / self.name

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_entries(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not tree.get("teachers"):
            return tree
        if isinstance(common := tree.get("cache", {}), dict):
            try:
                CacheSection.model_validate(common | {"path": "caches"})
            except pydantic.ValidationError as error:  # Once, and not for each teacher.
                raise ValueError(explain(error, CacheSection, "cache.")) from error
        return with_teacher_entries(tree)

    @pydantic.model_serializer(mode="wrap")
    def _without_copies(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what `with_teacher_entries` adds, and an empty list of teachers."""
        tree: dict[str, Any] = dump(self)
        if not self.teachers:
            tree.pop("teachers", None)
            return tree
        cache = {key: value for key, value in tree["cache"].items() if key != "path"}
        return {key: cache if key == "cache" else value for key, value in tree.items() if key != "teacher"}

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> Self:
        pattern = self.student.get("attention_reuse")
        chosen = (self.teachers or (self.teacher,))[self.owner].layers
        placeholder = len(pattern) if isinstance(pattern, (list, tuple)) else len(chosen or range(12))
        dim = StudentConfig.model_fields["target_dim"].default
        training = self.training([(len(entry.layers or range(12)), dim) for entry in self.teachers])
        student = self.resolve_student(placeholder, dim)
        training.check_student(student)
        fresh = self.train.masks == "fresh"
        if fresh and self.masks.draws:
            raise ValueError(
                f"train.masks fresh draws a mask for each epoch, so the {self.masks.draws} mask draws of the cache are not used; set "
                "masks.draws=0"
            )
        if self.train.mask_embedding == "teacher" and not self.masks.draws and not fresh:
            raise ValueError("train.mask_embedding teacher needs masks.draws; without masks no embedding is used")
        objective = training.chosen_objective
        parts = [("", objective, self.cache)]
        if isinstance(objective, SeveralTeachers):
            pairs = zip(objective.terms, self.teachers, strict=True)
            parts = [(f"teachers.{term.name}: ", term.settings, entry.cache) for term, entry in pairs]
        for name, settings, cache in parts:
            try:
                settings.check_source(
                    cache.codec, cached=self.train.targets == "cached", draws=self.masks.draws, fresh_masks=fresh
                )
            except ValueError as error:
                raise ValueError(f"{name}{error}") from error
        return self

    @pydantic.model_validator(mode="after")
    def _check_teachers(self) -> Self:
        check_teachers(self.teachers, self.train)
        return self

    @property
    def owner(self) -> int:
        """Number of the teacher that the student's own heads predict: the first whose objective uses heads, or else the first."""
        default = self.train.objective == "prediction"
        uses = [default if entry.objective is None else entry.objective.uses_heads for entry in self.teachers]
        return uses.index(True) if True in uses else 0

    @property
    def objectives(self) -> tuple[str, ...]:
        """Name of the objective with each teacher."""
        given = [entry.objective.objective if entry.objective else self.train.objective for entry in self.teachers]
        return tuple(given) or (self.train.objective,)

    def of_teacher(self, entry: TeacherEntry) -> "Config":
        """Return the configuration of a run of one of several teachers, with which its cache is planned and built."""
        teacher = TeacherSection(checkpoint=entry.checkpoint, layers=entry.layers)
        return self.model_copy(update={"teacher": teacher, "cache": entry.cache, "teachers": ()})

    @property
    def parts(self) -> "list[Config]":
        """The configuration of a run of each of several teachers; this one if there is one teacher."""
        return [self.of_teacher(entry) for entry in self.teachers] or [self]

    def training(self, sizes: Sequence[tuple[int, int]] = ()) -> TrainSettings:
        """Return the settings of the training, with an objective for each of several teachers.

        Args:
            sizes: For each of several teachers the number of layers to learn from and its width.

        Raises:
            ValueError: The objectives or the schedules of the teachers are impossible.
        """
        if not self.teachers:
            return self.train
        default = self.train.chosen_objective
        if all(entry.objective is not None for entry in self.teachers):
            fields = ObjectiveKeys.model_fields
            unused = [key for key in fields if getattr(self.train, key) != fields[key].default]
            if unused:
                raise ValueError(
                    f"train.{unused[0]} does nothing, since every teacher has an objective of its own; remove it, or give it there"
                )
        elif not isinstance(default, TEACHER_OBJECTIVES):
            raise ValueError(
                f"train.objective {default.objective} is for one teacher; give each of teachers an objective of its own"
            )
        terms = tuple(
            TeacherTerm.model_validate(
                {
                    "name": entry.name,
                    "settings": entry.objective or default,
                    **{key: getattr(entry, key) for key in ("weight", "start_step", "stop_step")},
                    "num_layers": num_layers,
                    "dim": dim,
                }
            )
            for entry, (num_layers, dim) in zip(self.teachers, sizes, strict=True)
        )
        return SeveralTeacherSettings(**dict(self.train), terms=terms)

    def resolve_student(self, num_layers: int, dim: int, patches: PatchGeometry | None = None) -> StudentConfig:
        """Return the student's configuration with the values that it takes from the teacher filled in.

        Args:
            num_layers: Number of teacher layers to learn from.
            dim: Width of the teacher.
            patches: Patch geometry of the teacher, if it cuts its input into patches. Default: None.

        Raises:
            ConfigError: A student's key is unknown or has an impossible value.
        """
        values = dict(self.student)
        predictions = "split_heads" if values.get("heads") == "split" else "encoder_layers"
        for key, value in ((predictions, num_layers), ("target_dim", dim), ("patches", patches)):
            if values.get(key, "teacher") == "teacher":
                values[key] = value
        try:
            return StudentConfig.model_validate(values)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, StudentConfig, "student.")) from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration from a YAML file with its bases, apply overrides, and check the result.

    Args:
        path: YAML file; see `ray_distill.pipeline.composition.config_tree` for ``base:`` and short keys.
        overrides: Changes of the form ``section.key=value``, where the value is YAML. Default: none.

    Raises:
        ConfigError: The file can't be read, an override is malformed, a key is unknown, or a value has the wrong type or can't
            be combined with another.
    """
    return check_config(compose(path, overrides).tree)


def check_config(tree: dict[str, Any]) -> Config:
    """Return the typed configuration of a tree of sections. A missing ``cache.path`` becomes `default_cache`.

    Raises:
        ConfigError: A key is unknown or missing, or a value is wrong.
    """
    cache = tree.get("cache", {})
    if isinstance(cache, dict) and "path" not in cache and _names_teacher_and_corpus(tree):
        tree = tree | {"cache": cache | {"path": default_cache(tree)}}
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, Config, "")) from error


def _names_teacher_and_corpus(tree: dict[str, Any]) -> bool:
    keys = (("teacher", "checkpoint"), ("corpus", "path"))
    return all(isinstance(tree.get(section), dict) and tree[section].get(key) for section, key in keys)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, the format stored in a run's folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
