"""Tables of an ablation: CSV files of its runs and variants, and a table for the terminal."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ray_distill.pipeline.ablation.definition import Ablation
from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.reports.ablation_results import RunResult
from ray_distill.pipeline.reports.ablation_summary import AblationSummary


def write_tables(summary: AblationSummary, folder: Path) -> None:
    """Write ``runs.csv``, with a row for each run, and ``table.csv``, with a row for each variant."""
    _write_csv(folder / "runs.csv", _run_rows(summary))
    _write_csv(folder / "table.csv", _variant_rows(summary))


def results_table(ablation: Ablation, results: Sequence[RunResult]) -> Table:
    """Return a table of the main metrics for the terminal."""
    summary = AblationSummary(ablation, results)
    table = Table(title=f"{ablation.settings.name}: mean ± standard deviation over seeds")
    headings = ["seeds", *(metric.name for metric in summary.metrics)]
    columns = [column for column in summary.columns() if column.heading in headings]
    table.add_column("variant")
    for column in columns:
        table.add_column(column.heading)
    for n, variant in enumerate(ablation.variants):
        cells = (f"{column.cells[n]}\n{column.comparisons[n]}".strip() for column in columns)
        table.add_row(variant.name, *cells, end_section=True)
    return table


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _varied_keys(summary: AblationSummary) -> list[str]:
    """Return the configuration keys in which variants differ."""
    return list(dict.fromkeys(key for variant in summary.ablation.variants for key in variant.changes))


def _run_rows(summary: AblationSummary) -> list[dict[str, Any]]:
    changes = {variant.name: variant.changes for variant in summary.ablation.variants}
    rows = []
    for planned, result in zip(summary.ablation.runs, summary.results, strict=True):
        row: dict[str, Any] = {"run": result.name, "variant": planned.variant}
        row |= {key: changes[planned.variant].get(key, "") for key in _varied_keys(summary)} | {"seed": planned.seed}
        row["state"] = result.state
        if result.training is not None:
            row |= result.training
            row |= {m.name: m.value_of(result) for m in summary.metrics if m.name != "validation loss"}
            best = result.best_validation
            row |= {key: value for key, value in best.items() if key.startswith(("layer_", "cosine_"))}
            row["parameters"] = result.parameters
        rows.append(row | {"failure": result.failure})
    return rows


def _variant_rows(summary: AblationSummary) -> list[dict[str, Any]]:
    """Return numbers rather than text: for each metric the mean, standard deviation and comparison with the baseline."""
    cells = {column.heading: column.cells for column in summary.columns()}
    rows = []
    for n, variant in enumerate(summary.ablation.variants):
        row: dict[str, Any] = {"variant": variant.name}
        row |= {key: variant.changes.get(key, "") for key in _varied_keys(summary)}
        row["seeds"] = sum(result.training is not None for result in summary.by_variant[variant.name])
        for metric in summary.metrics:
            values = list(summary.values(variant.name, metric).values())
            comparison = summary.comparison(variant.name, metric)
            tested = comparison is not None and comparison.deviations is not None
            row[f"{metric.name}: mean"] = statistics.mean(values) if values else ""
            row[f"{metric.name}: standard deviation"] = statistics.stdev(values) if len(values) > 1 else ""
            row[f"{metric.name}: difference"] = "" if comparison is None else comparison.difference
            row[f"{metric.name}: difference in SD"] = comparison.deviations if comparison and tested else ""
            row[f"{metric.name}: significant"] = comparison.significant if comparison and tested else ""
        row |= {heading: cells[heading][n] for heading in ("best step", "seconds per step", "parameters")}
        rows.append(row)
    return rows
