"""The report of an ablation: one HTML page, tables as CSV, and a short summary as JSON."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_distill.pipeline.ablation.definition import Ablation
from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.probing.probe_record import ProbeRecord, distinct_titles
from ray_distill.pipeline.reports.ablation_results import RunResult
from ray_distill.pipeline.reports.ablation_summary import AblationSummary, layer_range
from ray_distill.pipeline.reports.ablation_tables import write_tables
from ray_distill.pipeline.reports.charts import Chart, Series, category_colors, dot_chart, line_chart
from ray_distill.pipeline.reports.html_page import render_page
from ray_distill.pipeline.reports.teacher_time import teacher_time_sentences


def write_ablation_report(
    ablation: Ablation, results: Sequence[RunResult], reference_probes: Sequence[ProbeRecord] = ()
) -> Path:
    """Write ``report.html``, ``table.csv`` (a row per variant), ``runs.csv`` (a row per run) and ``summary.json``.

    Args:
        ablation: The ablation's definition.
        results: Results of its runs, in the order of the definition.
        reference_probes: Probes of the teacher and of log-mel bands, shown beside those of the students.

    Returns:
        Path of the page.
    """
    summary = AblationSummary(ablation, results)
    folder = ablation.folder.absolute()
    write_tables(summary, folder)
    teacher_time = teacher_time_sentences(ablation, results)
    write_text(folder / "report.html", _page(summary, teacher_time, reference_probes))
    short = {"name": ablation.settings.name, "said": summary.sentences(), "saved": teacher_time}
    write_text(folder / "summary.json", json.dumps(short, indent=2) + "\n")
    return folder / "report.html"


def _page(summary: AblationSummary, teacher_time: str, reference_probes: Sequence[ProbeRecord]) -> str:
    ablation = summary.ablation
    return render_page(
        "ablation.html",
        settings=ablation.settings,
        variants=ablation.variants,
        warnings=_warnings(summary),
        sentences=summary.sentences(),
        comparisons=len(summary.metrics) * (len(ablation.variants) - 1),
        dots=_dot_charts(summary),
        curves=_curve_charts(summary),
        columns=summary.columns(),
        probes=zip(reference_probes, distinct_titles(reference_probes), strict=True),
        teacher_time=teacher_time,
        results=summary.results,
    )


def _warnings(summary: AblationSummary) -> list[str]:
    """Return what a reader must know before reading the numbers."""
    found = [f"{result.name} failed: {result.failure}" for result in summary.results if result.state == "failed"]
    unfinished = [result.name for result in summary.results if result.state == "not finished"]
    if unfinished:
        found.append(f"These runs are not finished: {', '.join(unfinished)}.")
    if summary.configs[summary.baseline].teacher.checkpoint.startswith("random:"):
        found.append(
            "The teacher has seeded random weights, so the features mean nothing; this ablation only shows that the pipeline works."
        )
    if not summary.losses_comparable:
        found.append(
            "The variants have different losses or layers, so their validation losses can't be compared; compare other metrics."
        )
    return found


def _dot_charts(summary: AblationSummary) -> list[Chart]:
    """Return a chart for each metric, with a dot per seed."""
    variants = [variant.name for variant in summary.ablation.variants]
    return [
        dot_chart(
            f"{metric.name} ({'lower' if metric.lower_is_better else 'higher'} is better)",
            {
                variant: {f"seed {summary.seeds[run]}": value for run, value in summary.values(variant, metric).items()}
                for variant in variants
            },
            category_colors(len(variants)),
        )
        for metric in summary.metrics
    ]


def _curve_charts(summary: AblationSummary) -> list[Chart]:
    charts = []
    if summary.losses_comparable:
        series = _mean_curves(summary, lambda row: row["loss"])
        charts.append(line_chart("Validation loss, mean over seeds", series, "weighted loss"))
    if summary.layers:
        keys = [f"cosine_unmasked_layer_{layer}" for layer in summary.layers]
        series = _mean_curves(summary, lambda row: statistics.mean(row.get(key, math.nan) for key in keys))
        title = "Cosine similarity, validation, mean over seeds"
        charts.append(line_chart(title, series, f"cosine, {layer_range(summary.layers)}"))
    return charts


def _mean_curves(summary: AblationSummary, value_of: Callable[[Mapping[str, Any]], float]) -> list[Series]:
    """Return a curve for each variant: the mean over seeds at the steps where all of its runs were validated."""
    curves = []
    for (variant, results), color in zip(
        summary.by_variant.items(), category_colors(len(summary.by_variant)), strict=True
    ):
        runs = [{row["step"]: value_of(row) for row in result.validations} for result in results]
        runs = [run for run in runs if run]
        steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
        curves.append(Series(variant, steps, [statistics.mean(run[step] for run in runs) for step in steps], color))
    return curves
