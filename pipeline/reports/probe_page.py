"""Results of linear probes as a table for the terminal and as a section of an HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from ray_distill.pipeline.probing.linear_probe import Outcome
from ray_distill.pipeline.reports.charts import Chart, Series, category_colors, line_chart
from ray_distill.pipeline.reports.html_page import render_page


@dataclass(frozen=True)
class ProbeSection:
    """A probe's part of a page.

    Attributes:
        title: Heading.
        headings: Headings of the table's columns.
        rows: Cells of each feature source.
        chart: Learnt layer weights; None if every source has a single layer.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    chart: Chart | None


def probe_section(title: str, outcomes: Sequence[Outcome]) -> ProbeSection:
    """Return the section of a probe, with one row for each outcome."""
    headings = ("features", outcomes[0].metric, f"difference from {outcomes[0].source}")
    rows = [(o.source, _interval(o), _difference(o)) for o in outcomes]
    layered = [o for o in outcomes if len(o.layer_weights) > 1]
    # Depth as a fraction and weight relative to a uniform one, so that models of different depth can be compared.
    series = [
        Series(
            o.source,
            np.linspace(0, 1, len(o.layer_weights)).tolist(),
            [weight * len(o.layer_weights) for weight in o.layer_weights],
            color,
        )
        for o, color in zip(layered, category_colors(len(layered)), strict=True)
    ]
    chart = line_chart(
        "Learnt layer weights",
        series,
        "weight x number of layers",
        x_title="relative depth (0: first layer, 1: last layer)",
    )
    return ProbeSection(title, headings, rows, chart if series else None)


def probe_page(title: str, outcomes: Sequence[Outcome], note: str) -> str:
    """Return the HTML page of one probe.

    Args:
        title: Title of the task.
        outcomes: One outcome for each feature source.
        note: A sentence about the task.
    """
    return render_page("probe.html", title=title, section=probe_section(title, outcomes), note=note)


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """Return a table of outcomes for the terminal."""
    metric = outcomes[0].metric
    table = Table(title=f"{metric} of linear probes with 95 % confidence intervals")
    for column in ("features", metric, f"difference from {outcomes[0].source}", "heaviest layer"):
        table.add_column(column)
    for outcome in outcomes:
        heaviest = int(np.argmax(outcome.layer_weights))
        share = f"{heaviest + 1} ({outcome.layer_weights[heaviest]:.0%})" if len(outcome.layer_weights) > 1 else ""
        table.add_row(outcome.source, _interval(outcome), _difference(outcome), share)
    return table


def _interval(outcome: Outcome) -> str:
    return f"{outcome.value:.1%} ({outcome.low:.1%} to {outcome.high:.1%})"


def _difference(outcome: Outcome) -> str:
    if outcome.difference is None:
        return ""
    value, low, high = (100 * x for x in outcome.difference)
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"
