"""What an ablation found: the metrics by which its variants can be compared, their values over seeds, and the comparisons."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ray_distill.pipeline.ablation.common_goals import absent_teachers, share_targets
from ray_distill.pipeline.ablation.definition import Ablation
from ray_distill.pipeline.composition.suggestions import enumerated
from ray_distill.pipeline.config import Config
from ray_distill.pipeline.probing.probe_record import distinct_titles
from ray_distill.pipeline.reports.ablation_results import RunResult
from ray_distill.pipeline.reports.seed_statistics import Comparison, compare
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING, keys_with

_COSINE = "cosine_unmasked_layer_"
_NOT_TESTABLE = "not testable (one seed each)"


@dataclass(frozen=True)
class Metric:
    """A number by which variants are compared.

    Attributes:
        name: Heading.
        value_of: Function that returns the value of a finished run; None if the run has no such value.
        lower_is_better: Whether lower values are better.
        digits: Digits after the decimal point; a percentage is shown with two fewer.
        percent: Whether values are shown as percentages.
    """

    name: str
    value_of: Callable[[RunResult], float | None]
    lower_is_better: bool
    digits: int = 4
    percent: bool = False

    def format(self, value: float) -> str:
        """Return a value as text."""
        return f"{value:.{max(0, self.digits - 2)}%}" if self.percent else f"{value:.{self.digits}f}"

    def format_difference(self, value: float) -> str:
        """Return a difference as text with its sign; that of percentages in points."""
        if self.percent:
            return f"{100 * value:+.{max(0, self.digits - 2)}f} points"
        return f"{value:+.{self.digits}f}"


@dataclass(frozen=True)
class Column:
    """A column of the table of variants.

    Attributes:
        heading: Heading.
        cells: Text for each variant.
        comparisons: Comparison of each variant with the baseline as text; empty if there is none.
    """

    heading: str
    cells: Sequence[str]
    comparisons: Sequence[str]


class AblationSummary:
    """Results of an ablation by variant. The first variant is the baseline.

    Args:
        ablation: The ablation's definition.
        results: Results of its runs, in the order of the definition.
    """

    def __init__(self, ablation: Ablation, results: Sequence[RunResult]) -> None:
        self.ablation = ablation
        self.results = results
        self.by_variant: dict[str, list[RunResult]] = {variant.name: [] for variant in ablation.variants}
        self.seeds = {result.name: planned.seed for planned, result in zip(ablation.runs, results, strict=True)}
        for planned, result in zip(ablation.runs, results, strict=True):
            self.by_variant[planned.variant].append(result)
        self.configs = {planned.variant: planned.config for planned in reversed(ablation.runs)}
        self.baseline = ablation.variants[0].name
        self.layers = self._common_layers()
        keys = keys_with(Config, CHANGES_LOSS_MEANING)
        self.losses_comparable = len({str([_config_value(c, key) for key in keys]) for c in self.configs.values()}) == 1
        self.metrics = self._metrics()

    def _common_layers(self) -> list[str]:
        """Return the layers that all finished runs learned and were validated on, as `layer_names` has them."""
        if not share_targets(self.configs.values()):
            return []  # Such as the similarities of the objective STaR, which are between relations and not between features.
        absent = absent_teachers(self.configs.values())
        finished = [result for result in self.results if result.training is not None]
        found = [
            {key.removeprefix(_COSINE) for key in result.best_validation if key.startswith(_COSINE)}
            for result in finished
        ]
        common = sorted(set.intersection(*found)) if found else []
        return [layer for layer in common if layer.rpartition("_")[0] not in absent]

    def _metrics(self) -> list[Metric]:
        """Return the metrics that mean the same for all variants, the most important first."""
        found = [Metric("validation loss", lambda r: r.loss, True)] if self.losses_comparable else []
        if self.layers:
            # Variants with different weights on the hints share the last layer as their goal.
            for layers in by_teacher(self.layers):
                last = [] if self.losses_comparable else [layers[-1:]]
                found += [_cosine_metric(group) for group in [*last, layers]]
        # Runs may lack a probe's result for their student, so the names come from one that has it.
        probes = {p.key: p for result in self.results for p in result.probes if p.student is not None}
        for probe, title in zip(probes.values(), distinct_titles(list(probes.values())), strict=True):

            def value_of(result: RunResult, key: str = probe.key) -> float | None:
                return next((p.student.value for p in result.probes if p.key == key and p.student), None)

            name = probe.outcomes[0].metric
            found.append(Metric(f"{title}, {name}", value_of, name != "accuracy", percent=True, digits=3))
        return found

    def values(self, variant: str, metric: Metric) -> dict[str, float]:
        """Return the values of a variant's finished runs, by the names of the runs."""
        found = {result.name: metric.value_of(result) for result in self.by_variant[variant] if result.training}
        return {name: value for name, value in found.items() if value is not None}

    def comparison(self, variant: str, metric: Metric) -> Comparison | None:
        """Compare a variant with the baseline; None for the baseline itself, or if either has no values."""
        if variant == self.baseline:
            return None
        groups = (list(self.values(name, metric).values()) for name in (variant, self.baseline))
        return compare(*groups)

    def sentences(self) -> list[str]:
        """Return one sentence for each variant that can be compared with the baseline."""
        found = (self._sentence(variant.name) for variant in self.ablation.variants[1:])
        return [sentence for sentence in found if sentence]

    def _sentence(self, variant: str) -> str:
        changes: dict[str, list[str]] = {}
        for metric in self.metrics:
            comparison = self.comparison(variant, metric)
            if comparison is not None:
                change = metric.format_difference(comparison.difference)
                if comparison.deviations is not None:
                    change += f", {abs(comparison.deviations):.1f} SD"
                changes.setdefault(_conclusion(metric, comparison), []).append(f"{metric.name} ({change})")
        text = "; ".join(
            f"{conclusion}{':' if conclusion == _NOT_TESTABLE else ' in'} {', '.join(parts)}"
            for conclusion, parts in changes.items()
        )
        return f"{variant} compared with {self.baseline}: {text}." if text else ""

    def layer_groups(self) -> list[list[str]]:
        """Return the common layers in up to three groups for each teacher, lowest first."""
        return [part.tolist() for layers in by_teacher(self.layers) for part in np.array_split(layers, 3) if len(part)]

    def columns(self) -> list[Column]:
        """Return the columns of the table of variants."""
        metrics = list(self.metrics)
        if not self.losses_comparable:
            metrics.append(Metric("own validation loss", lambda r: r.loss, True))
        if len(self.layers) > 1:
            metrics += [_cosine_metric(group) for group in self.layer_groups()]
        metrics.append(Metric("best step", lambda r: r.best_step, True, digits=0))
        metrics.append(Metric("seconds per step", lambda r: r.seconds_per_step, True, digits=3))
        names = [variant.name for variant in self.ablation.variants]
        empty = [""] * len(names)
        columns = [Column("seeds", [self._seed_count(name) for name in names], empty)]
        for metric in metrics:
            cells = [_mean_and_deviation(metric, list(self.values(name, metric).values())) for name in names]
            compared = [_comparison_text(metric, self.comparison(name, metric)) for name in names]
            columns.append(Column(metric.name, cells, compared if metric in self.metrics else empty))
        return [*columns, Column("parameters", [self._parameters(name) for name in names], empty)]

    def _parameters(self, variant: str) -> str:
        counts = {result.parameters for result in self.by_variant[variant] if result.parameters is not None}
        return ", ".join(f"{count:,}" for count in sorted(counts))

    def _seed_count(self, variant: str) -> str:
        runs = self.by_variant[variant]
        done = sum(result.training is not None for result in runs)
        return str(done) if done == len(runs) else f"{done} of {len(runs)}"


def by_teacher(layers: Sequence[str]) -> list[list[str]]:
    """Return the layers of each of several teachers; all layers as one list if there is one teacher."""
    return [list(group) for _, group in groupby(layers, key=lambda layer: layer.rpartition("_")[0])]


def layer_range(layers: Sequence[str]) -> str:
    """Return the name of a group of layers, as in ``layers 1-4``, or ``hubert layers 1-4`` with several teachers."""
    ranges = []
    for group in by_teacher(layers):
        teacher = group[0].rpartition("_")[0]
        numbers = [int(layer.rpartition("_")[2]) for layer in group]
        contiguous = numbers == list(range(numbers[0], numbers[-1] + 1))
        listed = f"{numbers[0]}-{numbers[-1]}" if contiguous else ", ".join(map(str, numbers))
        text = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {listed}"
        ranges.append(f"{teacher} {text}".lstrip())
    return enumerated(ranges)


def _cosine_metric(layers: Sequence[str]) -> Metric:
    return Metric(f"cosine, {layer_range(layers)}", lambda r: r.cosine(layers), False, digits=3)


def _config_value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


def _mean_and_deviation(metric: Metric, values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {metric.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{metric.format(statistics.mean(values))}{deviation}"


def _conclusion(metric: Metric, comparison: Comparison) -> str:
    if comparison.deviations is None:
        return _NOT_TESTABLE
    if not comparison.significant:
        return "no significant difference"
    return "better" if (comparison.difference < 0) == metric.lower_is_better else "worse"


def _comparison_text(metric: Metric, comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    deviations = "" if comparison.deviations is None else f" ({comparison.deviations:+.1f} SD)"
    return f"{metric.format_difference(comparison.difference)}{deviations}, {_conclusion(metric, comparison)}"
