"""An ablation: a grid of configurations that train from one cache, read from YAML and checked before any work.

name: reuse-pattern
base: ../armhubert-s-100.yaml         # configuration of a run, relative to this file, or its sections
set: {train.epochs: 50}               # changes to all runs
variants:                             # named changes; the others are compared with the first
  alternate: {}
  none: {student.attention_reuse: none, train.learning_rate: 5.0e-4}
grid:                                 # values whose combinations are run with each variant
  student.encoder_embed_dim: [240, 432]
seeds: [0, 1, 2]                      # training seeds of each variant
"""

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pydantic

from ray_distill.pipeline.ablation.common_goals import have_nothing_in_common
from ray_distill.pipeline.composition.config_tree import (
    SHORT_KEYS,
    ConfigTree,
    compose,
    find_base,
    long_key,
    parse_override,
    read_tree,
    set_key,
)
from ray_distill.pipeline.composition.explanation import explain
from ray_distill.pipeline.config import Config, ConfigError, check_config
from ray_distill.pipeline.recipes import other_kind
from ray_distill.student.training.field_effects import SAME_IN_ABLATION, keys_with
from ray_distill.teacher_cache.storage.cache_spec import Targets, serves

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_OWN_KEYS = ("name", "seeds", "concurrent", "cpus_per_worker")
"""Keys of an ablation that the command line may change."""
_SECTIONS = [name for name in Config.model_fields if name not in ("name", "runs")]


class ProbeSection(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Linear probes of each trained student, and once of the teacher and of log-mel features; see `probing.linear_probe`."""

    manifest: Path
    """CSV file of labelled utterances. Relative paths start at the folder of the ablation's file."""
    units: Literal["characters", "words"] = "characters"
    """Units into which transcripts are split: ``characters`` or ``words``."""
    epochs: int = pydantic.Field(default=20, ge=1)
    """Passes over the training utterances."""
    seed: int = 0
    """Random seed of the probes."""


class AblationSettings(pydantic.BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The YAML file of an ablation."""

    name: str = pydantic.Field(pattern=_NAME)
    """Name of the ablation. The folder ``runs/name`` contains the folders of its runs."""
    question: str = ""
    """Question that the ablation answers: one sentence for the report."""
    base: str | dict[str, Any]
    """Configuration of a run: its sections, the path of a YAML file relative to this one, or the name of a recipe."""
    set: dict[str, Any] = {}
    """Dotted keys and their values for all runs."""
    variants: dict[str, dict[str, Any]] = {}
    """Dotted keys and their values for each named variant. The others are compared with the first variant."""
    grid: dict[str, list[Any]] = {}
    """Dotted keys with lists of values. Each combination of values is run with each variant."""
    seeds: list[int] = pydantic.Field(default=[0, 1, 2], min_length=1)
    """Values of ``train.seed`` that each variant is trained with."""
    concurrent: int | None = pydantic.Field(default=None, ge=1)
    """Number of runs that train at the same time. None runs as many as Ray has resources for when the training begins. Set it for a
    cluster that adds machines on demand."""
    cpus_per_worker: int | None = pydantic.Field(default=None, ge=1)
    """CPU cores per training worker. None takes one core beside a GPU; without GPUs, the workers of a run share a machine's cores,
    so that a machine trains one run at a time."""
    probe: ProbeSection | None = None
    """Probes of the trained students. None runs no probes."""

    @pydantic.field_validator("variants", mode="before")
    @classmethod
    def _empty_is_no_change(cls, variants: Any) -> Any:
        """Let ``a:`` without a value stand for a variant without changes."""
        return {name: changes or {} for name, changes in variants.items()} if isinstance(variants, dict) else variants

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if not self.variants and not self.grid:
            raise ValueError("an ablation has nothing to compare without variants; give variants, a grid, or both")
        for name in self.variants:
            if not re.match(_NAME, name):
                raise ValueError(
                    f"variants: {name!r} can't name a folder; use letters, digits, '.', '_' and '-', and start with a letter or digit"
                )
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid: {key} has no values; list at least one")
        for seed in self.seeds:
            if self.seeds.count(seed) > 1:
                raise ValueError(f"seeds: {seed} is given twice; list each seed once")
        for key in self.set:
            _refuse_reserved(key)
        shared = keys_with(Config, SAME_IN_ABLATION)
        varied = sorted({key for changes in (self.grid, *self.variants.values()) for key in changes})
        for key in varied:
            _refuse_reserved(key)
            if key == "train.targets":
                raise ValueError(
                    "train.targets: can't differ between runs; all runs of an ablation train from one cache"
                )
            of_teacher = re.match(r"teachers\.[^.]+\.(name|checkpoint|cache)\b", key) is not None
            if of_teacher or any(key == one or key.startswith(f"{one}.") for one in shared):
                raise ValueError(
                    f"{key}: can't differ between runs, which share a corpus, a teacher and a cache; give one value under `set`"
                )
            clash = next((variant for variant in self.variants.values() if key in variant and key in self.grid), None)
            if clash is not None:
                raise ValueError(f"{key}: is in the grid and in a variant; give it in only one of them")
        return self


def _refuse_reserved(key: str) -> None:
    """Raise a ValueError for a key that neither `set` nor a variant may change."""
    if key == "train.seed":
        raise ValueError("train.seed: can't be set here; give the seeds of all variants as `seeds`")
    if key == "name":
        raise ValueError("name: can't be set here; runs are named after their variants")
    if key in _SECTIONS:  # Its value would replace the whole section, which silently resets the section's other keys.
        raise ValueError(f"{key}: is a section; name one of its keys, as in {key}.{SHORT_KEYS.get(key, 'KEY')}")


@dataclass(frozen=True)
class Variant:
    """One cell of the grid.

    Attributes:
        name: Name of the variant.
        changes: Values by dotted key.
    """

    name: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed.

    Attributes:
        variant: Name of the variant.
        seed: Training seed.
        config: Configuration of the run, whose name is ``VARIANT-seedSEED``.
    """

    variant: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return self.config.name


@dataclass(frozen=True)
class Ablation:
    """A checked ablation.

    Attributes:
        settings: Contents of the YAML file.
        variants: Variants. The others are compared with the first.
        runs: All variants with the first seed, then all with the second, and so on, so that an unfinished ablation can already
            be compared.
        needs: Configuration whose cache has the layers, mask draws and targets of all runs.
        notes: Sentences about values of the base that a short key replaced.
    """

    settings: AblationSettings
    variants: list[Variant]
    runs: list[PlannedRun]
    needs: Config
    notes: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        """Folder of the report, which also contains the folders of the runs."""
        return self.needs.runs


def load_ablation(path: Path, overrides: Sequence[str] = (), probe: ProbeSection | None = None) -> Ablation:
    """Read an ablation from a YAML file and check the configurations of all its runs.

    Args:
        path: YAML file.
        overrides: Changes of the form ``section.key=value`` to all runs, also by short keys such as ``corpus=...``, which have the
            effect that they have on a single run; ``name``, ``seeds``, ``concurrent`` and ``cpus_per_worker`` are the ablation's own.
            Default: none.
        probe: Probe settings that replace those of the file. Default: None, which keeps them.

    Raises:
        ConfigError: The file can't be read, a key can't be varied, a run's configuration is impossible, or one cache can't serve
            all runs. The message names the variant and the key.
    """
    tree = read_tree(path)
    if other := other_kind(tree, "ablation"):
        raise ConfigError(f"{path} {other}")
    changes = []
    for key, value in map(parse_override, overrides):
        if key in _OWN_KEYS:
            tree[key] = value
            continue
        long = long_key(key, value)
        try:
            _refuse_reserved(long)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        changes.append((key, long, value))
    try:
        settings = AblationSettings.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, AblationSettings, '')}") from error
    if settings.probe is not None:
        manifest = path.parent / settings.probe.manifest
        settings = settings.model_copy(update={"probe": settings.probe.model_copy(update={"manifest": manifest})})
    if probe is not None:
        settings = settings.model_copy(update={"probe": probe})
    variants = _variants(settings)
    if isinstance(settings.base, dict):
        composed = ConfigTree()
        composed.merge(copy.deepcopy(settings.base), str(path))
    else:
        composed = compose(find_base(path, settings.base))
    base = composed.tree
    for key, value in settings.set.items():
        set_key(base, key, value)
        composed.sources[key] = str(path)
    for key, long, value in changes:
        if any(long in variant.changes for variant in variants):
            raise ConfigError(f"{key}: is varied by the ablation; change its values in {path}")
        composed.set(key, value)
    composed.adapt_recipe([key for key, long, _ in changes if key != long])
    base["name"] = settings.name
    folder = check_config(base).folder  # Checked first, so that no variant is blamed for an error of the base.
    runs = []
    for seed, variant in itertools.product(settings.seeds, variants):
        tree = copy.deepcopy(base)
        for key, value in (variant.changes | {"train.seed": seed}).items():
            set_key(tree, key, copy.deepcopy(value))
        tree |= {"name": f"{variant.name}-seed{seed}", "runs": folder}
        try:
            runs.append(PlannedRun(variant.name, seed, check_config(tree)))
        except ConfigError as error:
            raise ConfigError(f"variant {variant.name}: {error}") from error
    _refuse_duplicates(runs)
    for run in runs:
        if run.config.train.batch_seconds == "auto":
            raise ConfigError(
                f"variant {run.variant}: train.batch_seconds: auto would measure another size for each student and GPU, so the runs "
                "could not be compared; give the seconds"
            )
    if settings.probe is None and have_nothing_in_common([run.config for run in runs]):
        raise ConfigError(
            "train.objective, train.aggregate, teachers: runs with different objectives, aggregates or teachers have neither losses "
            "nor similarities in common; give `probe` too, to compare them by their probes"
        )
    return Ablation(settings, variants, runs, _needs(runs), composed.notes)


def _variants(settings: AblationSettings) -> list[Variant]:
    """Return the variants, each combined with each cell of the grid."""
    found: dict[str, Variant] = {}
    for name, changes in settings.variants.items() or {"": {}}.items():
        for values in itertools.product(*settings.grid.values()):
            cell = dict(zip(settings.grid, values, strict=True))
            parts = [name, *(f"{key.split('.')[-1]}-{_text(key, value)}" for key, value in cell.items())]
            label = "-".join(part for part in parts if part)
            if label in found:
                raise ConfigError(
                    f"two variants would have the name {label}; give them distinct names under `variants`"
                )
            found[label] = Variant(label, changes | cell)
    return list(found.values())


def _text(key: str, value: Any) -> str:
    """Return a grid value as text for a folder's name.

    Raises:
        ConfigError: The value has characters that a name can't contain.
    """
    if isinstance(value, list) and value and all(isinstance(item, bool) for item in value):
        return "".join(str(int(item)) for item in value)
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, dict) or not re.match(r"^[A-Za-z0-9._-]+$", text):
        raise ConfigError(
            f"grid: the value {value!r} of {key} can't be a part of a name; make it a named variant under `variants`"
        )
    return text


def _refuse_duplicates(runs: list[PlannedRun]) -> None:
    """Raise a ConfigError if two runs have the same configuration."""
    first: dict[str, str] = {}
    for run in runs:
        content = run.config.model_copy(update={"name": ""}).model_dump_json()
        if content in first:
            raise ConfigError(
                f"variants {first[content]} and {run.variant} are the same configuration; remove one of them"
            )
        first[content] = run.variant


def _needs(runs: list[PlannedRun]) -> Config:
    """Return a configuration whose cache has the layers, mask draws and targets of all runs.

    Raises:
        ConfigError: No single cache can serve all runs.
    """
    most = max(runs, key=lambda run: run.config.masks.draws).config
    for run in runs:
        masks = run.config.masks
        if run.config.train.targets != "cached":
            raise ConfigError("train.targets: must be cached; all runs of an ablation train from one cache")
        for draw in range(masks.draws):
            if (masks.seed, masks.policy_of(draw)) != (most.masks.seed, most.masks.policy_of(draw)):
                raise ConfigError(
                    f"variant {run.variant}: masks: mask draw {draw} has another policy or seed than in the run with most draws, "
                    "but one cache has one mask per draw; put this variant into an ablation with a cache of its own"
                )
    needs = [_needs_of_teacher(runs, k, most) for k in range(len(most.parts))]
    teachers = [
        entry.model_copy(update={"layers": one.teacher.layers, "cache": one.cache})
        for entry, one in zip(most.teachers, needs, strict=False)
    ]
    update = {"name": "cache", "teacher": needs[0].teacher, "cache": needs[0].cache, "teachers": tuple(teachers)}
    return most.model_copy(update=update)


def _needs_of_teacher(runs: list[PlannedRun], number: int, most: Config) -> Config:
    """Return a configuration of one teacher whose cache has the layers and targets of all runs.

    Args:
        runs: The runs.
        number: Number of the teacher in `Config.parts`.
        most: Configuration of the run with most mask draws.

    Raises:
        ConfigError: No single cache can serve all runs.
    """
    parts = [run.config.parts[number] for run in runs]
    targets = {part.cache.targets for part in parts}
    for run in runs:
        if "composite_only" in targets and (len(targets) > 1 or (most.masks.draws and not run.config.masks.draws)):
            raise ConfigError(
                f"variant {run.variant}: cache.targets composite_only stores no clean targets, which some runs need; set "
                "cache.targets to clean_and_masked"
            )
    layers = {tuple(part.teacher.layers or ()) for part in parts}
    union = None if () in layers else sorted({layer for chosen in layers for layer in chosen})
    mine = most.parts[number]
    kinds: tuple[Targets, ...] = ("clean_only", "clean_and_masked", "masked_everywhere", "composite_only")
    update = {"targets": next(kind for kind in kinds if all(serves(kind, needed) for needed in targets))}
    return mine.model_copy(
        update={
            "teacher": mine.teacher.model_copy(update={"layers": union}),
            "cache": mine.cache.model_copy(update=update),
        }
    )
