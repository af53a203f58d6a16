"""What an ablation found: mean and spread over seeds of each variant, against the first, as a page and as CSV."""

import csv
import html
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ray_distill.pipeline.ablation.definition import Ablation, Variant
from ray_distill.pipeline.config import Config
from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.probing.probe import Probed, read_probes, titles_of
from ray_distill.pipeline.reports.charts import COLORS, Line, dot_chart, line_chart
from ray_distill.pipeline.reports.run_report import STYLE, layer_color, read_metrics
from ray_distill.pipeline.stages import Run
from ray_distill.student.training.prefetch import TrainingPlan
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.storage.build_statistics import TeacherTime, total_teacher_time
from ray_distill.teacher_cache.storage.cache import Cache

_LOSS = (
    *("teacher.layers", "train.objective", "train.loss", "train.cosine_weight", "train.relation_weights"),
    *("train.hint_weight", "train.final_weight"),
)
"""Keys that change what a validation loss means."""
_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Result:
    """One run, as far as it is.

    Attributes:
        name: of the run.
        training: of ``train.json``; None where it is not finished.
        failure: why it failed, if it did when last tried.
        validations: rows of ``metrics.jsonl``.
        parameters: of the student; None where it is not reported on yet.
        probes: that were made of it, with the settings asked for.
    """

    name: str
    training: Mapping[str, Any] | None
    failure: str
    validations: list[Mapping[str, Any]]
    parameters: int | None
    probes: list[Probed]

    @property
    def best(self) -> Mapping[str, Any]:
        """The validation row of the student that is kept."""
        assert self.training is not None
        return next((row for row in self.validations if row["step"] == self.training["best_step"]), {})

    def cosine(self, layers: Sequence[int]) -> float | None:
        """Mean cosine similarity to the teacher over some layers, unmasked, at the best step."""
        values = [self.best.get(f"cosine_unmasked_layer_{layer:02d}") for layer in layers]
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known and len(known) == len(values) else None

    @property
    def loss(self) -> float | None:
        """The best validation loss."""
        return None if self.training is None else float(self.training["best_validation_loss"])

    @property
    def best_step(self) -> float | None:
        """The step with it."""
        return None if self.training is None else float(self.training["best_step"])

    @property
    def seconds_per_step(self) -> float | None:
        """Of the whole training, validations and all, on whatever else ran beside it."""
        return None if self.training is None else float(self.training["seconds"] / self.training["steps"])

    @property
    def said(self) -> str:
        """One line."""
        if self.training is None:
            return f"{self.name}: {self.failure or 'not finished'}"
        loss, steps = self.training["best_validation_loss"], self.training["steps"]
        return f"{self.name}: {steps} steps in {self.training['seconds']:.0f} s, validation loss {loss:.4f}"


def read_results(
    folders: Sequence[Path], failures: Mapping[str, str] | None = None, probing: dict[str, Any] | None = None
) -> list[Result]:
    """What the runs' folders tell.

    Args:
        folders: of the runs.
        failures: why runs failed, by their names.
        probing: settings (of `ray_distill.pipeline.probing.probe.probe_settings`) that probes count with; default any.
    """
    results = []
    for folder in folders:
        trained, summary = folder / "train.json", folder / "summary.json"
        results.append(
            Result(
                folder.name,
                json.loads(trained.read_text()) if trained.is_file() else None,
                (failures or {}).get(folder.name, ""),
                [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "validation"],
                json.loads(summary.read_text())["student_parameters"] if summary.is_file() else None,
                read_probes(folder, probing),
            )
        )
    return results


@dataclass(frozen=True)
class Measure:
    """Something that variants are compared by.

    Attributes:
        name: of the column.
        of: its value for a finished run; None where the run has none.
        low_is_good: whether less is better.
        digits: after the point.
        percent: shown as such.
    """

    name: str
    of: Callable[[Result], float | None]
    low_is_good: bool
    digits: int = 4
    percent: bool = False

    def show(self, value: float) -> str:
        """For people."""
        return f"{value:.{max(0, self.digits - 2)}%}" if self.percent else f"{value:.{self.digits}f}"


@dataclass(frozen=True)
class Comparison:
    """A variant against the first.

    Attributes:
        difference: of the means.
        spreads: the same in units of the spread: the standard deviation over seeds, pooled over both variants. None with one seed.
        shown: whether it is more than chance gives in one of twenty comparisons without a difference (two-sided t test).
    """

    difference: float
    spreads: float | None
    shown: bool


def compare(values: Sequence[float], first: Sequence[float]) -> Comparison | None:
    """The comparison; None where one of them has no values."""
    if not values or not first:
        return None
    difference = statistics.mean(values) - statistics.mean(first)
    freedom = len(values) + len(first) - 2
    if freedom < 1:
        return Comparison(difference, None, False)
    squares = sum((v - statistics.mean(group)) ** 2 for group in (values, first) for v in group)
    spread = math.sqrt(squares / freedom)
    if spread == 0:
        return Comparison(difference, math.copysign(math.inf, difference) if difference else 0.0, difference != 0)
    needed = t_95(freedom) * math.sqrt(1 / len(values) + 1 / len(first))
    return Comparison(difference, difference / spread, abs(difference / spread) > needed)


def t_95(freedom: int) -> float:
    """Student's t at 97.5 %: from a table up to 10 degrees of freedom, beyond by Cornish and Fisher's expansion (to 0.01 %)."""
    if freedom <= len(_T_95):
        return _T_95[freedom - 1]
    return 1.95996 + 2.37227 / freedom + 2.8225 / freedom**2 + 2.5558 / freedom**3


class Findings:
    """All that is shown, by variant.

    Args:
        ablation: what was to be run.
        results: of its runs, in their order.
    """

    def __init__(self, ablation: Ablation, results: Sequence[Result]) -> None:
        self.ablation = ablation
        self.results = results
        self.of: dict[str, list[Result]] = {variant.name: [] for variant in ablation.variants}
        for planned, result in zip(ablation.runs, results, strict=True):
            self.of[planned.variant].append(result)
        self.configs = {planned.variant: planned.config for planned in reversed(ablation.runs)}
        self.layers = self._common_layers()
        self.same_loss = len({str(_values(config, _LOSS)) for config in self.configs.values()}) == 1
        self.measures = self._measures()

    def _common_layers(self) -> list[int]:
        """Layers that all finished runs were validated on."""
        prefix = "cosine_unmasked_layer_"
        finished = [result for result in self.results if result.training is not None]
        found = [{int(key.removeprefix(prefix)) for key in r.best if key.startswith(prefix)} for r in finished]
        return sorted(set.intersection(*found)) if found else []

    def _measures(self) -> list[Measure]:
        """The first is what is drawn first; a loss is among them only where it means the same for all."""
        loss = Measure("validation loss", lambda r: r.loss, True)
        found = [loss] if self.same_loss else []
        # Star's cosines are of relations, not of features.
        if self.layers and len({config.train.objective for config in self.configs.values()}) == 1:
            # With other weights on the hints, only the last layer is wanted of all.
            found += [self._cosine(layers) for layers in ([] if self.same_loss else [self.layers[-1:]]) + [self.layers]]
        # Of each kind of probe one that has a figure for the student, to name it after.
        kinds = {p.key: p for result in self.results for p in result.probes if p.student is not None}
        for probed, title in zip(kinds.values(), titles_of(list(kinds.values())), strict=True):

            def value(result: Result, key: str = probed.key) -> float | None:
                return next((p.student.value for p in result.probes if p.key == key and p.student), None)

            metric = probed.outcomes[0].metric
            found.append(Measure(f"{title}, {metric}", value, metric != "accuracy", percent=True, digits=3))
        return found

    def values(self, variant: str, measure: Measure) -> list[float]:
        """Of the finished runs of a variant."""
        found = [measure.of(result) for result in self.of[variant] if result.training is not None]
        return [value for value in found if value is not None]

    def comparison(self, variant: str, measure: Measure) -> Comparison | None:
        """A variant against the first; None for the first."""
        first = self.ablation.variants[0].name
        return None if variant == first else compare(self.values(variant, measure), self.values(first, measure))

    def sentences(self) -> list[str]:
        """What the figures say of each variant, and no more."""
        return [said for variant in self.ablation.variants[1:] if (said := self._sentence(variant.name))]

    def _sentence(self, variant: str) -> str:
        parts: dict[str, list[str]] = {}
        for measure in self.measures:
            compared = self.comparison(variant, measure)
            if compared is not None:
                spreads = "" if compared.spreads is None else f", {abs(compared.spreads):.1f} spreads"
                change = f"{measure.name} ({_signed(measure, compared.difference)}{spreads})"
                parts.setdefault(_verdict(measure, compared), []).append(change)
        said = "; ".join(f"{verdict} in {', '.join(changes)}" for verdict, changes in parts.items())
        return f"{variant} against {self.ablation.variants[0].name}: {said}." if said else ""

    def groups(self) -> list[list[int]]:
        """The common layers in up to three groups, from the lowest."""
        return [part.tolist() for part in np.array_split(self.layers, 3) if len(part)]

    def columns(self) -> list[tuple[str, Callable[[str], str], Callable[[str], str]]]:
        """Of the table: a name, its text for a variant, and what the comparison says, or nothing."""
        measured = list(self.measures)
        if not self.same_loss:
            measured.append(Measure("its own validation loss", lambda r: r.loss, True))
        if len(self.layers) > 1:
            measured += [self._cosine(group) for group in self.groups()]
        measured.append(Measure("best step", lambda r: r.best_step, True, digits=0))
        measured.append(Measure("seconds a step", lambda r: r.seconds_per_step, True, digits=3))
        columns: list[tuple[str, Callable[[str], str], Callable[[str], str]]] = [("seeds", self._seeds, _nothing)]
        for measure in measured:
            compared = partial(self._difference, measure) if measure in self.measures else _nothing
            columns.append((measure.name, partial(self._mean, measure), compared))
        return [*columns, ("parameters", self._parameters, _nothing)]

    @staticmethod
    def _cosine(layers: list[int]) -> Measure:
        return Measure(f"cosine, {_layers_name(layers)}", lambda r: r.cosine(layers), False, digits=3)

    def _mean(self, measure: Measure, variant: str) -> str:
        return _mean(self.values(variant, measure), measure.show)

    def _difference(self, measure: Measure, variant: str) -> str:
        return _difference(measure, self.comparison(variant, measure))

    def _parameters(self, variant: str) -> str:
        counts = {result.parameters for result in self.of[variant] if result.parameters is not None}
        return ", ".join(f"{count:,}" for count in sorted(counts))

    def _seeds(self, variant: str) -> str:
        done = sum(result.training is not None for result in self.of[variant])
        return str(done) if done == len(self.of[variant]) else f"{done} of {len(self.of[variant])}"


def _nothing(variant: str) -> str:
    return ""


def _values(config: Config, keys: Sequence[str]) -> list[Any]:
    found = []
    for key in keys:
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else getattr(node, part)
        found.append(node)
    return found


def _layers_name(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    whole = list(layers) == list(range(layers[0], layers[-1] + 1)) if layers else False
    return f"layers {layers[0]}-{layers[-1]}" if whole else f"layers {', '.join(map(str, layers))}"


def _mean(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean and spread."""
    if not values:
        return ""
    spread = f" ± {show(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{show(statistics.mean(values))}{spread}"


def _signed(measure: Measure, value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{measure.show(abs(value))}"


def _verdict(measure: Measure, compared: Comparison) -> str:
    if compared.spreads is None:
        return "not told from chance with one seed each"
    if not compared.shown:
        return "no difference shown"
    return "better" if (compared.difference < 0) == measure.low_is_good else "worse"


def _difference(measure: Measure, compared: Comparison | None) -> str:
    if compared is None:
        return ""
    spreads = "" if compared.spreads is None else f" ({compared.spreads:+.1f} spreads)"
    return f"{_signed(measure, compared.difference)}{spreads}, {_verdict(measure, compared)}"


def saved_hours(work: TeacherTime, train_seconds: float, passes: Mapping[bool, float]) -> tuple[float, float] | None:
    """Teacher hours with the teacher in the loop, and those that building the cache took.

    Args:
        work: recorded when the cache was built.
        train_seconds: audio of the training split.
        passes: epochs of all runs together that need a masked pass beside the clean one (True), and that need none (False).

    Returns:
        None where the cache was built by a version that recorded nothing, or the passes needed were not recorded.
    """
    clean, masked = work.clean.rate, work.masked.rate
    if clean is None or (passes[True] and masked is None):
        return None
    online = (sum(passes.values()) * clean + passes[True] * (masked or 0.0)) * train_seconds
    return online / 3600, work.seconds / 3600


def saved_sentence(findings: Findings, shared: Run) -> str:
    """What training from the cache saved, and how that is computed."""
    cache = Cache.open(shared.cache)
    samples = np.array([u.num_samples for shard in cache.shards if shard.split == "train" for u in shard.utterances])
    passes = {True: 0.0, False: 0.0}
    finished = 0
    for planned, result in zip(findings.ablation.runs, findings.results, strict=True):
        if result.training is not None:
            finished += 1
            masked = planned.config.masks.draws > 0 and planned.config.cache.targets != "clean_only"
            passes[masked] += TrainingPlan(samples, planned.config.train, planned.config.train.workers).passes
    seconds = float(samples.sum()) / SAMPLE_RATE
    work = total_teacher_time(shared.cache)
    hours = saved_hours(work, seconds, passes)
    if hours is None:
        return "Hours saved are not known: this cache was built before builds recorded what their teachers did."
    online, built = hours
    rates = f"{work.clean.rate:.3g} teacher seconds per second of audio for a clean pass"
    rates += f" and {work.masked.rate:.3g} for a masked one" if work.masked.rate is not None else ""
    outcome = "saved" if online > built else "not saved but spent"
    return (
        f"Teacher hours {outcome}: {_hours(abs(online - built))}. With the teacher in the loop, the {finished} finished runs would "
        f"have taken {_hours(online)} of it: {sum(passes.values()):.1f} passes over {_hours(seconds / 3600)} of audio, "
        f"{passes[True]:.1f} of them masked too, at {rates}, as measured when the cache was built, which took {_hours(built)}, once."
    )


def _hours(hours: float) -> str:
    return f"{hours:.2f} h" if hours >= 0.1 else f"{60 * hours:.1f} min"


def results_table(ablation: Ablation, results: Sequence[Result]) -> Table:
    """For the terminal: what the first measures say."""
    findings = Findings(ablation, results)
    table = Table(title=f"{ablation.settings.name}: mean ± standard deviation over seeds")
    names = ["seeds", *(measure.name for measure in findings.measures)]
    columns = [column for column in findings.columns() if column[0] in names]
    table.add_column("variant")
    for name, *_ in columns:
        table.add_column(name)
    for variant in ablation.variants:
        cells = (f"{text(variant.name)}\n{compared(variant.name)}".strip() for _, text, compared in columns)
        table.add_row(variant.name, *cells, end_section=True)
    return table


def write_ablation_report(
    ablation: Ablation, results: Sequence[Result], shared: Run, others: Sequence[Probed] = ()
) -> Path:
    """Writes ``report.html``, ``table.csv`` (a row for each variant), ``runs.csv`` (for each run) and ``summary.json``.

    Args:
        ablation: what was to be run.
        results: of its runs, in their order.
        shared: the run that indexed the corpus and built the cache.
        others: probes of the teacher and of log-mel bands, to be shown beside the students'.

    Returns:
        The page.
    """
    findings = Findings(ablation, results)
    folder = ablation.folder.absolute()
    _write_csv(folder / "runs.csv", _run_rows(findings))
    _write_csv(folder / "table.csv", _variant_rows(findings))
    saved = saved_sentence(findings, shared) if Cache.exists(shared.cache) else ""
    summary = {"name": ablation.settings.name, "said": findings.sentences(), "saved": saved}
    write_text(folder / "report.html", _page(findings, saved, others))
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return folder / "report.html"


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _varied(findings: Findings) -> list[str]:
    """Keys that variants differ by."""
    return list(dict.fromkeys(key for variant in findings.ablation.variants for key in variant.changes))


def _run_rows(findings: Findings) -> list[dict[str, Any]]:
    changes = {variant.name: variant.changes for variant in findings.ablation.variants}
    rows = []
    for planned, result in zip(findings.ablation.runs, findings.results, strict=True):
        row: dict[str, Any] = {"run": result.name, "variant": planned.variant}
        row |= {key: changes[planned.variant].get(key, "") for key in _varied(findings)} | {"seed": planned.seed}
        row["state"] = "finished" if result.training else "failed" if result.failure else "not finished"
        if result.training is not None:
            row |= result.training
            row |= {m.name: m.of(result) for m in findings.measures if m.name != "validation loss"}
            row |= {key: value for key, value in result.best.items() if key.startswith(("layer_", "cosine_"))}
            row["parameters"] = result.parameters
        rows.append(row | {"failure": result.failure})
    return rows


def _variant_rows(findings: Findings) -> list[dict[str, Any]]:
    """Numbers, not text: mean and spread of each measure, and the comparison."""
    rows = []
    for variant in findings.ablation.variants:
        row: dict[str, Any] = {"variant": variant.name}
        row |= {key: variant.changes.get(key, "") for key in _varied(findings)}
        row["seeds"] = sum(result.training is not None for result in findings.of[variant.name])
        for measure in findings.measures:
            values = findings.values(variant.name, measure)
            compared = findings.comparison(variant.name, measure)
            row[f"{measure.name}: mean"] = statistics.mean(values) if values else ""
            row[f"{measure.name}: spread"] = statistics.stdev(values) if len(values) > 1 else ""
            row[f"{measure.name}: difference"] = "" if compared is None else compared.difference
            known = compared is not None and compared.spreads is not None
            row[f"{measure.name}: difference in spreads"] = compared.spreads if compared and known else ""
            row[f"{measure.name}: difference shown"] = compared.shown if compared and known else ""
        shown = {name: text(variant.name) for name, text, _ in findings.columns()}
        row |= {name: shown[name] for name in ("best step", "seconds a step", "parameters")}
        rows.append(row)
    return rows


def _colors(count: int) -> list[str]:
    return list(COLORS[:count]) if count <= len(COLORS) else [layer_color(n, count) for n in range(count)]


def _charts(findings: Findings) -> str:
    variants = findings.ablation.variants
    colors = _colors(len(variants))
    dots = [
        dot_chart(
            f"{measure.name}: each dot a seed, each bar a mean",
            [(v.name, findings.values(v.name, measure)) for v in variants],
            measure.name + (" (less is better)" if measure.low_is_good else " (more is better)"),
            colors,
        )
        for measure in findings.measures
    ]
    charts = []
    if findings.same_loss:
        charts.append(_curves("Validation loss, mean over seeds", findings, lambda row: row["loss"], "weighted loss"))
    if findings.layers:
        keys = [f"cosine_unmasked_layer_{layer:02d}" for layer in findings.layers]
        label = f"cosine, {_layers_name(findings.layers)}"
        charts.append(
            _curves(
                "Cosine similarity, validation, mean over seeds",
                findings,
                lambda row: statistics.mean(row.get(key, math.nan) for key in keys),
                label,
            )
        )
    return f'<div class="charts dots">{"".join(dots)}</div><div class="charts">{"".join(charts)}</div>'


def _curves(title: str, findings: Findings, value: Callable[[Mapping[str, Any]], float], label: str) -> str:
    """A line for each variant: the mean over seeds wherever all of its runs were validated."""
    lines = []
    for variant, color in zip(findings.ablation.variants, _colors(len(findings.of)), strict=True):
        rows = [{row["step"]: value(row) for row in result.validations} for result in findings.of[variant.name]]
        rows = [row for row in rows if row]
        steps = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
        lines.append(Line(variant.name, steps, [statistics.mean(row[step] for row in rows) for step in steps], color))
    return line_chart(title, lines, label)


def _html_table(findings: Findings) -> str:
    escape = html.escape
    columns = findings.columns()
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("variant", *(name for name, *_ in columns)))
    body = ""
    for variant in findings.ablation.variants:
        cells = "".join(
            f'<td>{escape(text(variant.name))}<br><span class="faint">{escape(compared(variant.name))}</span></td>'
            for _, text, compared in columns
        )
        body += f'<tr><th scope="row">{escape(variant.name)}<br><span class="faint">{_changes(variant)}</span></th>{cells}</tr>'
    return (
        f'<div class="wide"><table class="variants"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _changes(variant: Variant) -> str:
    return "<br>".join(html.escape(f"{key}={value}") for key, value in variant.changes.items()) or "as the base"


_MORE_STYLE = """
body { max-width: 1280px; } .wide { overflow-x: auto; } .variants { font-size: 13px; font-variant-numeric: tabular-nums; }
.variants thead th { color: var(--faint); border: 0; } .variants tbody th { font-weight: 600; min-width: 150px; }
.variants tbody th span { font-weight: normal; font-size: 12px; } .variants td { white-space: nowrap; }
.variants td span { font-size: 12px; white-space: normal; display: block; min-width: 90px; } .said li { margin: 4px 0; }
.dots { align-items: start; margin-bottom: 18px; }
"""


def _page(findings: Findings, saved: str, others: Sequence[Probed]) -> str:
    escape = html.escape
    ablation = findings.ablation
    settings = ablation.settings
    failed = [result for result in findings.results if result.failure]
    waiting = [result for result in findings.results if not result.failure and result.training is None]
    warnings = [f"{result.name} failed: {result.failure}" for result in failed]
    if waiting:
        warnings.append(f"Not finished: {', '.join(result.name for result in waiting)}.")
    if findings.configs[ablation.variants[0].name].teacher.checkpoint.startswith("random:"):
        warnings.append("The teacher has seeded random weights: this shows the machinery, its features mean nothing.")
    if not findings.same_loss:
        warnings.append(
            "The variants have different losses or layers, so their validation losses can't be compared: look at the others."
        )
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings.sentences())
    runs = "".join(
        f'<tr><th scope="row"><a href="{escape(r.name)}/report.html">{escape(r.name)}</a></th>'
        f"<td>{escape(r.said.partition(': ')[2])}</td></tr>"
        for r in findings.results
    )
    probes = "".join(
        f"<p>{escape(title)}, {escape(p.outcomes[0].metric)} of others: "
        + "; ".join(f"{escape(o.source)} {o.value:.1%} ({o.low:.1%} to {o.high:.1%})" for o in p.outcomes)
        + ".</p>"
        for p, title in zip(others, titles_of(others), strict=True)
    )
    count = len(findings.measures) * (len(ablation.variants) - 1)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(settings.name)}: ablation</title><style>{STYLE}{_MORE_STYLE}</style></head><body><main>
<h1>{escape(settings.name)}</h1>
<p class="faint">{escape(settings.question or "Ablation")} · {len(ablation.variants)} variants, seeds
{", ".join(map(str, settings.seeds))}</p>
{"".join(f'<p class="warning">{escape(text)}</p>' for text in warnings)}
<h2>What it says</h2><ul class="said">{said}</ul>
<p class="faint">A spread is the standard deviation over seeds, pooled over the two variants. A difference counts as shown where a
two-sided t test at 5 % finds it, each by itself: of {count} comparisons, {0.05 * count:.2g} would be shown by chance alone.</p>
{_charts(findings)}
<h2>Mean and spread over seeds</h2>{_html_table(findings)}{probes}
<h2>Teacher time</h2><p>{escape(saved)}</p>
<h2>Runs</h2><table class="facts">{runs}</table>
<p class="faint">Files: <a href="table.csv">table.csv</a> · <a href="runs.csv">runs.csv</a> ·
<a href="ablation.yaml">ablation.yaml</a></p>
</main></body></html>
"""
