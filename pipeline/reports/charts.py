"""Interactive charts of a report, as Vega-Lite specifications that Altair makes and the page's script draws.

A chart keeps its points outside the specification, as one list of x and one of y for each series, because a row per point would
take several times the space. ``templates/charts.js`` turns them into the datasets ``lines``, ``points`` and ``hover``.

Functions import Altair themselves: it takes most of a second, and only runs that write a report need it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import altair as alt

HEIGHT = 220
"""Height of a line chart's plotting area, in pixels."""
_MARGIN = 6
"""Space between the outermost points and the edge, in pixels, so that a point there is not cut in half."""
_ROW_HEIGHT = 26
"""Height of a group's row in a dot chart, in pixels."""

COLORS = (
    *("light-dark(#0072b2, #56b4e9)", "light-dark(#d55e00, #ff9a4d)", "light-dark(#009e73, #35cfa2)"),
    *("light-dark(#b0568a, #e8a3ca)", "light-dark(#9a6f00, #e6c14a)", "light-dark(#5c6670, #b3bcc5)"),
)
"""Colours for categories on a light and on a dark page, after Okabe and Ito's palette for colour-blind readers."""
_ORDERED_LIGHT = np.array([[52, 0, 92], [60, 80, 139], [30, 130, 140], [70, 155, 70]])
_ORDERED_DARK = np.array([[196, 160, 255], [120, 170, 245], [70, 205, 205], [175, 235, 120]])


def ordered_color(number: int, count: int) -> str:
    """Return colour ``number`` (from 0) of ``count`` ordered colours, from violet over blue to green.

    Lightness changes steadily, so that the order is visible without hue. Each colour has a contrast of at least 3 to its page.
    """
    position = number / max(1, count - 1) * (len(_ORDERED_LIGHT) - 1)
    colors = []
    for stops in (_ORDERED_LIGHT, _ORDERED_DARK):
        red, green, blue = (int(np.interp(position, np.arange(len(stops)), channel)) for channel in stops.T)
        colors.append(f"#{red:02x}{green:02x}{blue:02x}")
    return f"light-dark({', '.join(colors)})"


def category_colors(count: int) -> list[str]:
    """Return a colour for each of ``count`` categories."""
    return list(COLORS[:count]) if count <= len(COLORS) else [ordered_color(n, count) for n in range(count)]


Scale = Literal["auto", "linear"]
"""Scale of an axis; see `line_chart`."""


@dataclass(frozen=True)
class Series:
    """A series of a line chart.

    Attributes:
        label: Name in the legend.
        x: Positions, in ascending order.
        y: Values; a value that is not finite interrupts the line.
        color: CSS colour.
        mark: ``line``, or ``points`` for unconnected points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    mark: Literal["line", "points"] = "line"


@dataclass(frozen=True)
class Chart:
    """A chart, ready for a template.

    Attributes:
        title: Caption.
        description: Text alternative, which also stands in for the chart where scripts are disabled.
        spec: Vega-Lite specification; None if there is nothing to draw.
        series: Points of a line chart by series: ``label``, ``mark``, ``x`` and ``y`` (None for a gap).
        x_title: Title of the x axis.
    """

    title: str
    description: str
    spec: dict[str, Any] | None = None
    series: list[dict[str, Any]] = field(default_factory=list)
    x_title: str = ""


@contextmanager
def _unchecked() -> Iterator[None]:
    """Skip Altair's checks against Vega-Lite's schema, which take longer than everything else; the tests check the specifications."""
    from altair.utils import schemapi

    with schemapi.debug_mode(False):
        yield


@_unchecked()
def line_chart(
    title: str,
    series: Sequence[Series],
    y_title: str,
    *,
    x_title: str = "optimiser step",
    y_scale: Scale = "auto",
) -> Chart:
    """Return a line chart, with a legend if it has several series.

    Args:
        title: Caption.
        series: Lines, drawn in order.
        y_title: Title of the y axis.
        x_title: Title of the x axis; it must not contain ``.`` or ``[``, which Vega-Lite reads as paths.
        y_scale: ``auto`` uses a logarithmic y axis if all values are positive and span more than a factor of 10.
    """
    values = [y for one in series for y in one.y if math.isfinite(y)]
    if not values:
        return Chart(title, "Nothing was recorded.")
    import altair as alt

    low, high = min(values), max(values)
    if y_scale == "auto" and low > 0 and high / low > 10:
        scale = alt.Scale(type="log", nice=False, padding=_MARGIN)
    elif low < high:
        scale = alt.Scale(zero=False, padding=_MARGIN)
    else:  # A scale needs an extent.
        margin = 0.1 * abs(low) or 0.1
        scale = alt.Scale(domain=[low - margin, high + margin])
    x = alt.X(field=x_title, type="quantitative", scale=alt.Scale(zero=False, nice=False, padding=_MARGIN))
    y = alt.Y(field="value", type="quantitative", title=y_title, scale=scale, axis=alt.Axis(tickCount=5))
    labels = [one.label for one in series]
    legend = alt.Legend(symbolType="stroke") if len(series) > 1 else None
    colors = alt.Scale(domain=labels, range=[one.color for one in series])
    color = alt.Color(field="label", type="nominal", title=None, scale=colors, legend=legend)
    chosen = alt.selection_point(name="chosen", fields=["label"], bind="legend")
    hovered = alt.selection_point(
        name="hovered", fields=[x_title], nearest=True, on="pointermove", clear="pointerout", empty=False
    )
    opacity = alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.12))
    lines = (
        _chart("lines", "lines")
        .mark_line(clip=True, strokeWidth=1.8, strokeJoin="round")
        .encode(x=x, y=y, color=color, opacity=opacity)
        .add_params(chosen, _zoom("x", "y"))
    )
    points = (
        _chart("points", "points")
        .mark_point(clip=True, filled=True, size=34, aria=False)
        .encode(x=x, y=y, color=color, opacity=opacity)
    )
    hover = (
        _chart("hover", "hover")
        .mark_rule(clip=True, aria=False, color="var(--faint)", tooltip=alt.TooltipContent("data"))
        .encode(x=x, opacity=alt.when(hovered).then(alt.value(0.6)).otherwise(alt.value(0)))
        .add_params(hovered)
    )
    spec = alt.layer(lines, points, hover).properties(width="container", height=HEIGHT)
    return Chart(
        title,
        _describe_lines(series, y_title, x_title),
        spec.to_dict(validate=False),
        [_compact(one) for one in series],
        x_title,
    )


@_unchecked()
def dot_chart(title: str, groups: Mapping[str, Mapping[str, float]], colors: Sequence[str]) -> Chart:
    """Return a chart with a row per group: values as dots, their mean as a bar, and the first group's mean as a dashed line.

    Args:
        title: Caption, which also names the values.
        groups: Finite values by their names, by group; a group without values has an empty row.
        colors: One CSS colour for each group.
    """
    values = [value for group in groups.values() for value in group.values()]
    if not values:
        return Chart(title, "Nothing was recorded.")
    import altair as alt

    means = {label: sum(group.values()) / len(group) for label, group in groups.items() if group}
    rows = [
        {"group": label, "name": name, "value": _rounded(value), "mean": _rounded(means[label])}
        for label, group in groups.items()
        for name, value in group.items()
    ]
    extent: dict[str, Any] = {}
    if min(values) == max(values):  # A scale needs an extent.
        margin = 0.1 * abs(values[0]) or 0.1
        extent = {"domain": [values[0] - margin, values[0] + margin]}
    axis = alt.Axis(grid=True, tickCount=6)
    x = alt.X(
        field="value",
        type="quantitative",
        title=None,
        scale=alt.Scale(zero=False, padding=_MARGIN, **extent),
        axis=axis,
    )
    order = list(groups)
    y = alt.Y(field="group", type="nominal", title=None, sort=order, scale=alt.Scale(domain=order))
    color = alt.Color(field="group", type="nominal", legend=None, scale=alt.Scale(domain=order, range=list(colors)))
    tooltip = [
        alt.Tooltip(field="group", type="nominal"),
        alt.Tooltip(field="name", type="nominal", title="run"),
        alt.Tooltip(field="value", type="quantitative", format=".6~g"),
        alt.Tooltip(field="mean", type="quantitative", format=".6~g"),
    ]
    data = alt.InlineData(values=rows)
    dots = (
        _chart("dots", data)
        .mark_point(clip=True, filled=True, size=70, opacity=0.55)
        .encode(x=x, y=y, color=color, tooltip=tooltip)
        .add_params(_zoom("x"))
    )
    bars = (
        _chart("means", data)
        .mark_tick(clip=True, thickness=2.5, size=_ROW_HEIGHT * 0.7, aria=False)
        .encode(x=alt.X(field="mean", type="quantitative"), y=y, color=color, tooltip=tooltip)
    )
    layers = [dots, bars]
    if order[0] in means:
        reference = alt.InlineData(values=[{"mean": _rounded(means[order[0]])}])
        layers.append(
            _chart("reference", reference)
            .mark_rule(clip=True, strokeDash=[3, 4], aria=False, color=colors[0])
            .encode(x=alt.X(field="mean", type="quantitative"))
        )
    spec = alt.layer(*layers).properties(width="container", height=_ROW_HEIGHT * len(groups))
    described = (
        f"{label}: mean {means[label]:.6g} of {', '.join(f'{value:.6g}' for value in group.values())}."
        for label, group in groups.items()
        if group
    )
    return Chart(title, f"{title}, by group. {' '.join(described)}", spec.to_dict(validate=False))


def _chart(name: str, data: "str | alt.InlineData") -> "alt.Chart":
    """Return a named chart; without a name, Altair numbers the charts of a process and the page's bytes would vary."""
    import altair as alt

    return alt.Chart(alt.NamedData(data) if isinstance(data, str) else data, name=name)


def _zoom(*encodings: Literal["x", "y"]) -> "alt.Parameter":
    """Return the parameter for moving and zooming. The wheel zooms only with Ctrl or Cmd, so that the page scrolls over charts."""
    import altair as alt

    wheel = "wheel![event.ctrlKey || event.metaKey]"
    return alt.selection_interval(name="zoom", bind="scales", encodings=list(encodings), zoom=wheel)


def _rounded(value: float) -> float | None:
    """Return a value with six significant digits; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _compact(series: Series) -> dict[str, Any]:
    x = [int(value) if value == int(value) else _rounded(value) for value in series.x]
    return {"label": series.label, "mark": series.mark, "x": x, "y": [_rounded(value) for value in series.y]}


def _describe_lines(series: Sequence[Series], y_title: str, x_title: str) -> str:
    sentences = [f"{y_title} over {x_title}."]
    for one in series:
        known = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
        if not known:
            continue
        (first_x, first), (last_x, last) = known[0], known[-1]
        least, most = min(y for _, y in known), max(y for _, y in known)
        if one.mark == "points":
            sentences.append(f"{one.label}: {len(known)} points from {first_x:,.12g} to {last_x:,.12g}.")
        elif len(known) == 1:
            sentences.append(f"{one.label}: {first:.4g} at {first_x:,.12g}.")
        else:
            ends = f"{first:.4g} at {first_x:,.12g}, {last:.4g} at {last_x:,.12g}"
            sentences.append(f"{one.label}: {ends}, between {least:.4g} and {most:.4g}.")
    return " ".join(sentences)
