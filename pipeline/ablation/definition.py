"""An ablation: a grid of configurations that train from one cache, read from YAML and checked before any work.

name: reuse-pattern
base: ../armhubert-s-100.yaml         # a run's configuration, beside this file; or the sections themselves
set: {train.epochs: 50}               # for all runs
variants:                             # named changes; the first is what the others are compared with
  alternate: {}
  none: {student.attention_reuse: none, train.learning_rate: 5.0e-4}
grid:                                 # and every combination of these with them
  student.encoder_embed_dim: [240, 432]
seeds: [0, 1, 2]                      # of each
"""

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pydantic

from ray_distill.pipeline.config import Config, ConfigError, check_config, explain, parse_override, read_tree, set_key

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_SECTIONS = ("corpus", "teacher", "masks", "cache", "student", "train")
_ONE_FOR_ALL = ("name", "runs", "corpus", "teacher.checkpoint", "cache")
"""Sections and keys that all runs share, but for `cache.targets`: one corpus, one teacher, one cache."""


class ProbeSection(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Linear probes of every trained student, and once of the teacher and of log-mel bands; see `probing.probe`.

    Attributes:
        manifest: CSV of labelled utterances; relative paths start at the ablation's file.
        units: of transcripts: ``characters`` or ``words``.
        epochs: passes over the training utterances.
        seed: of the probes.
    """

    manifest: Path
    units: Literal["characters", "words"] = "characters"
    epochs: int = pydantic.Field(default=20, ge=1)
    seed: int = 0


class AblationSettings(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The YAML of an ablation.

    Attributes:
        name: its folder is ``runs/name``, with a run's folder for each variant and seed.
        question: one sentence for the report.
        base: file of a run's configuration, relative to this one, or its sections.
        set: dotted keys and their values, for all runs.
        variants: by name: dotted keys and their values. The first is what the others are compared with.
        grid: dotted keys, each with a list of values; all combinations, with each variant.
        seeds: ``train.seed`` of the runs of each variant.
        concurrent: runs at a time; default as many as there is room for when the training begins. Give it where a cluster
            grows on demand.
        cpus_per_worker: cores of each training worker; default one beside a GPU, else all of a machine's, shared by the
            workers of a run, so that one machine trains one run after another.
        probe: what the students are probed for. Default nothing.
    """

    name: str = pydantic.Field(pattern=_NAME)
    question: str = ""
    base: str | dict[str, Any]
    set: dict[str, Any] = {}
    variants: dict[str, dict[str, Any]] = {}
    grid: dict[str, list[Any]] = {}
    seeds: list[int] = pydantic.Field(default=[0, 1, 2], min_length=1)
    concurrent: int | None = pydantic.Field(default=None, ge=1)
    cpus_per_worker: int | None = pydantic.Field(default=None, ge=1)
    probe: ProbeSection | None = None

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if not self.variants and not self.grid:
            raise ValueError("give variants, a grid, or both: there is nothing to compare")
        for name in self.variants:
            if not re.match(_NAME, name):
                raise ValueError(f"variants: {name!r} can't name a folder; use letters, digits, '.', '_' and '-'")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid: {key} has no values")
        for seed in self.seeds:
            if self.seeds.count(seed) > 1:
                raise ValueError(f"seeds: {seed} is given twice")
        for key in self.set:
            _refuse_for_all(key)
        varied = sorted({key for changes in (self.grid, *self.variants.values()) for key in changes})
        for key in varied:
            _refuse_for_all(key)
            if key == "train.targets":
                raise ValueError("train.targets: all runs of an ablation train from one cache")
            if key != "cache.targets" and any(key == one or key.startswith(f"{one}.") for one in _ONE_FOR_ALL):
                raise ValueError(f"{key}: can't differ between runs, which share corpus, teacher and cache; use `set`")
            clash = next((variant for variant in self.variants.values() if key in variant and key in self.grid), None)
            if clash is not None:
                raise ValueError(f"{key}: is in the grid and in a variant; give it in one of them")
        return self


def _refuse_for_all(key: str) -> None:
    """ValueError of a key that neither all runs nor some can be given."""
    if key == "train.seed":
        raise ValueError("train.seed: give the seeds of all variants as `seeds`")
    if key == "name":
        raise ValueError("name: runs are named after their variants; the ablation has its own `name`")
    if key in _SECTIONS:  # It would take the place of the whole section, and nobody would see what else it changes.
        raise ValueError(f"{key}: is a section; name its keys, with dots, as in {key}.KEY")


@dataclass(frozen=True)
class Variant:
    """One cell of the grid: its name, and its values by dotted key."""

    name: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """One training.

    Attributes:
        variant: its variant's name.
        seed: of the training.
        config: of the run; its name is the variant's with the seed.
    """

    variant: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.config.name


@dataclass(frozen=True)
class Ablation:
    """A checked ablation.

    Attributes:
        settings: as given.
        variants: the first is what the others are compared with.
        runs: all variants with the first seed, then all with the second, ...: what is done first can be compared.
        needs: a configuration that needs what all runs need of the cache.
    """

    settings: AblationSettings
    variants: list[Variant]
    runs: list[PlannedRun]
    needs: Config

    @property
    def folder(self) -> Path:
        """With the runs' folders and the report."""
        return self.needs.runs


def load_ablation(path: Path, overrides: Sequence[str] = (), probe: ProbeSection | None = None) -> Ablation:
    """Reads an ablation.

    Args:
        path: of the YAML.
        overrides: ``section.key=value`` for all runs; ``name=...`` names the ablation.
        probe: taken instead of the file's.

    Raises:
        ConfigError: unreadable file, a key that can't be varied, a combination that no run could have, or needs that one
            cache can't meet; it names the variant and the key.
    """
    tree = read_tree(path)
    for_all = []
    for key, value in map(parse_override, overrides):
        if key == "name":
            tree["name"] = value
            continue
        try:
            _refuse_for_all(key)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for_all.append((key, value))
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
    base = copy.deepcopy(settings.base) if isinstance(settings.base, dict) else read_tree(path.parent / settings.base)
    for key, value in settings.set.items():
        set_key(base, key, value)
    for key, value in for_all:
        if any(key in variant.changes for variant in variants):
            raise ConfigError(f"{key}: is what the ablation varies; change it in {path}")
        set_key(base, key, value)
    base["name"] = settings.name
    folder = check_config(base).folder  # Before the variants: what is wrong here is not theirs.
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
    _refuse_twins(runs)
    if len({run.config.train.objective for run in runs}) > 1 and settings.probe is None:
        raise ConfigError(
            "train.objective: neither losses nor similarities of different objectives can be compared; give `probe` too"
        )
    return Ablation(settings, variants, runs, _needs(runs))


def _variants(settings: AblationSettings) -> list[Variant]:
    found: dict[str, Variant] = {}
    for name, changes in settings.variants.items() or {"": {}}.items():
        for values in itertools.product(*settings.grid.values()):
            cell = dict(zip(settings.grid, values, strict=True))
            parts = [name, *(f"{key.split('.')[-1]}-{_text(key, value)}" for key, value in cell.items())]
            label = "-".join(part for part in parts if part)
            if label in found:
                raise ConfigError(f"two variants would be called {label}; name them under `variants`")
            found[label] = Variant(label, changes | cell)
    return list(found.values())


def _text(key: str, value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, list) and value and all(isinstance(item, bool) for item in value):
        return "".join(str(int(item)) for item in value)
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, dict) or not re.match(r"^[A-Za-z0-9._-]+$", text):
        raise ConfigError(f"grid: the value {value!r} of {key} can't be a part of a name; name it under `variants`")
    return text


def _refuse_twins(runs: list[PlannedRun]) -> None:
    first: dict[str, str] = {}
    for run in runs:
        content = run.config.model_copy(update={"name": ""}).model_dump_json()
        if content in first:
            raise ConfigError(f"variants {first[content]} and {run.variant} are the same configuration")
        first[content] = run.variant


def _needs(runs: list[PlannedRun]) -> Config:
    """All layers and draws of any run; ConfigError where no cache has them together."""
    most = max(runs, key=lambda run: run.config.masks.draws).config
    targets = {run.config.cache.targets for run in runs}
    for run in runs:
        masks = run.config.masks
        if run.config.train.targets != "cached":
            raise ConfigError("train.targets: all runs of an ablation train from one cache; leave it at cached")
        for draw in range(masks.draws):
            if (masks.seed, masks.policy_of(draw)) != (most.masks.seed, most.masks.policy_of(draw)):
                raise ConfigError(
                    f"variant {run.variant}: masks: its mask draw {draw} has another policy or seed than variants with more "
                    "draws, and one cache holds one of each; give it an ablation and a cache of its own"
                )
        if "composite_only" in targets and (len(targets) > 1 or (most.masks.draws and not masks.draws)):
            raise ConfigError(
                f"variant {run.variant}: cache.targets composite_only keeps no clean targets, which some runs need; "
                "set cache.targets to clean_and_masked"
            )
    layers = {tuple(run.config.teacher.layers or ()) for run in runs}
    union = None if () in layers else sorted({layer for chosen in layers for layer in chosen})
    return most.model_copy(
        update={
            "name": "cache",
            "teacher": most.teacher.model_copy(update={"layers": union}),
            "cache": most.cache.model_copy(
                update={"targets": "clean_and_masked" if len(targets) > 1 else targets.pop()}
            ),
        }
    )
