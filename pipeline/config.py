"""The typed configuration of a run, read from YAML, changed by ``section.key=value``, and checked before any work.

The keys of ``corpus``, ``teacher`` and ``cache`` are defined in ``composition/sections.py``, those of ``train`` in
``student/training/train_settings.py`` and ``student/objectives/``, those of ``student`` in ``student/model/student_config.py``, and
those of ``masks`` in ``teacher_cache/masks.py``.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic
import yaml

from ray_distill.local_paths import Local
from ray_distill.pipeline.composition.config_tree import ConfigError as ConfigError  # Exported here too.
from ray_distill.pipeline.composition.config_tree import compose, default_cache, with_default_audio
from ray_distill.pipeline.composition.explanation import explain, for_teacher
from ray_distill.pipeline.composition.sections import (
    CacheSection,
    CorpusSection,
    Section,
    TeacherEntry,
    TeacherSection,
    is_url,
)
from ray_distill.pipeline.composition.teacher_entries import check_teachers, with_teacher_entries
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.objectives.objective_keys import ObjectiveKeys
from ray_distill.student.objectives.several_teachers import TEACHER_OBJECTIVES, SeveralTeachers, TeacherTerm
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING, CHANGES_NO_RESULT, SAME_IN_ABLATION
from ray_distill.student.training.train_settings import SeveralTeacherSettings, TrainSettings
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.patch_geometry import PatchGeometry


class Config(Section):
    """The configuration of a run."""

    name: Annotated[str, SAME_IN_ABLATION] = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run. Its files are stored in the folder ``runs/name``."""
    runs: Annotated[Local[Path], CHANGES_NO_RESULT, SAME_IN_ABLATION] = Path("runs")
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
    student: dict[str, Any] = pydantic.Field(default={})
    """Architecture of the student: fields of `StudentConfig`. If ``encoder_layers`` (``split_heads`` for split heads) and
    ``target_dim`` are missing or ``teacher``, they become the number of layers to learn from and the teacher's width. With
    ``head_layers``, ``encoder_layers`` becomes the last of them."""
    train: TrainSettings
    """Training settings."""

    @pydantic.field_validator("runs", mode="before")
    @classmethod
    def _no_url(cls, runs: Any) -> Any:
        if is_url(runs):
            raise ValueError(
                f"{runs} is a URL, but runs are written to a local folder, which all nodes of a cluster share"
            )
        return runs

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
                f"train.masks fresh draws a mask for each epoch, so masks.draws {self.masks.draws} does nothing; set "
                "masks.draws=0"
            )
        if self.train.mask_embedding == "teacher" and not self.masks.draws and not fresh:
            raise ValueError("train.mask_embedding teacher needs masks.draws; without masks no embedding is used")
        objective = training.chosen_objective
        parts = [("", objective, self.cache)]
        if isinstance(objective, SeveralTeachers):
            terms = {term.name: term.settings for term in objective.terms}
            parts = [(entry.name, terms[entry.name], entry.cache) for entry in self.teachers if entry.name in terms]
        for name, settings, cache in parts:
            try:
                settings.check_source(
                    cache.codec, cached=self.train.targets == "cached", draws=self.masks.draws, fresh_masks=fresh
                )
                if cache.targets == "masked_everywhere" and not self.masks.draws:
                    raise ValueError(
                        "cache.targets masked_everywhere takes targets from masked passes, but masks.draws is 0; set masks.draws, or "
                        "cache.targets=clean_only"
                    )
            except ValueError as error:
                raise ValueError(for_teacher(name, str(error)) if name else str(error)) from error
        return self

    @pydantic.model_validator(mode="after")
    def _check_teachers(self) -> Self:
        check_teachers(self.teachers, self.train)
        return self

    @property
    def owner(self) -> int:
        """Number of the teacher that the student's own heads predict: the first whose objective uses heads, or else the first, both
        without those of weight 0."""
        default = self.train.objective == "prediction"
        active = [number for number, entry in enumerate(self.teachers) if entry.weight] or [0]
        for number in active:
            objective = self.teachers[number].objective if self.teachers else None
            if default if objective is None else objective.uses_heads:
                return number
        return active[0]

    def target_dim(self, dims: Sequence[int]) -> int:
        """Return the width of the targets that the student's heads predict.

        Args:
            dims: Width of each teacher, or that of the one whose layers the heads predict.
        """
        if self.train.aggregate == "concatenate":
            return sum(dims)
        return dims[self.owner] if len(dims) > 1 else dims[0]

    def check_aggregate(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Check that the layers of several teachers can be combined, if ``train.aggregate`` says so.

        Args:
            sizes: For each teacher the number of layers to learn from and its width.

        Raises:
            ConfigError: They differ in the number of layers, or for an average in their widths.
        """
        if self.train.aggregate == "heads":
            return
        (first, size), *others = [pair for pair in zip(self.teachers, sizes, strict=True) if pair[0].weight]
        for entry, (layers, dim) in others:
            if layers != size[0]:
                raise ConfigError(
                    f"teachers.{entry.name}.layers: {layers} layers can't be combined with {size[0]} of {first.name}; choose as many"
                )
            if self.train.aggregate == "average" and dim != size[1]:
                raise ConfigError(
                    f"train.aggregate average: the teachers {first.name} and {entry.name} have widths {size[1]} and {dim}; set it to "
                    "concatenate or heads"
                )

    @property
    def objectives(self) -> tuple[str, ...]:
        """Name of the objective with each teacher."""
        given = [entry.objective.objective if entry.objective else self.train.objective for entry in self.teachers]
        return tuple(given) or (self.train.objective,)

    def of_teacher(self, entry: TeacherEntry) -> "Config":
        """Return the configuration of a run of one of several teachers, with which its cache is planned and built."""
        teacher = TeacherSection(checkpoint=entry.checkpoint, layers=entry.layers, frames=entry.frames)
        return self.model_copy(update={"teacher": teacher, "cache": entry.cache, "teachers": ()})

    @property
    def parts(self) -> "list[Config]":
        """The configuration of a run of each of several teachers; this one if there is one teacher."""
        return [self.of_teacher(entry) for entry in self.teachers] or [self]

    def training(self, sizes: Sequence[tuple[int, int]] = ()) -> TrainSettings:
        """Return the settings of the training, with an objective for each of several teachers that have a weight.

        Args:
            sizes: For each of several teachers the number of layers to learn from and its width.

        Raises:
            ValueError: The objectives or the schedules of the teachers are impossible.
        """
        if not self.teachers or self.train.aggregate != "heads":
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
            if entry.weight
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
        layers = num_layers if (last := last_head(values)) is None else last
        for key, value in ((predictions, layers), ("target_dim", dim), ("patches", patches)):
            if values.get(key, "teacher") == "teacher":
                values[key] = value
        try:
            return StudentConfig.model_validate(values)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, StudentConfig, "student.")) from error


def last_head(student: Mapping[str, Any]) -> int | None:
    """Return the last layer with a head, which is the student's last, where ``head_layers`` of a student's keys say so."""
    given = student.get("head_layers")
    numbers = [layer for layer in given if isinstance(layer, int)] if isinstance(given, (list, tuple)) else []
    return max(numbers, default=None)


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
    """Return the typed configuration of a tree of sections, with the default places of the cache and its audio where it names none.

    Raises:
        ConfigError: A key is unknown or missing, or a value is wrong.
    """
    cache = tree.get("cache", {})
    if isinstance(cache, dict) and _names_teacher_and_corpus(tree):
        tree = tree | {"cache": with_default_audio({"path": default_cache(tree)} | cache, tree["corpus"])}
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(_with_names(explain(error, Config, ""), tree)) from error


def _with_names(sentence: str, tree: dict[str, Any]) -> str:
    """Return a sentence with the names of teachers in place of their places in the list."""
    entries = tree.get("teachers") or ()
    for number, entry in enumerate(entries if isinstance(entries, (list, tuple)) else ()):
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            sentence = re.sub(rf"\bteachers\.{number}\.", f"teachers.{entry['name']}.", sentence)
    return sentence


def _names_teacher_and_corpus(tree: dict[str, Any]) -> bool:
    keys = (("teacher", "checkpoint"), ("corpus", "path"))
    return all(isinstance(tree.get(section), dict) and tree[section].get(key) for section, key in keys)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, the format stored in a run's folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
