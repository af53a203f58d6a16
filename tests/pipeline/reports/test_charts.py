"""Charts: their data, their scales and their text alternatives."""

import base64
import io
import math
import re

import altair
import numpy as np
import pytest
from PIL import Image

from ray_distill.pipeline.reports.charts import Series, dot_chart, line_chart, ordered_color
from ray_distill.pipeline.reports.heatmap import heatmap


def y_scale(*values: float) -> dict[str, object]:
    chart = line_chart("t", [Series("a", list(range(len(values))), list(values), "red")], "y")
    assert chart.spec is not None
    found = chart.spec["layer"][0]["encoding"]["y"]["scale"]
    assert isinstance(found, dict)
    return found


def test_specifications_have_vega_lites_schema() -> None:
    lines = [Series("a", [0, 1], [0.1, 5.0], "red"), Series("b", [0, 1], [2.0, 300.0], "#0f0", "points")]
    for chart in (
        line_chart("t", lines, "loss"),
        line_chart("t", lines[:1], "loss", y_scale="linear"),
        line_chart("t", [Series("a", [1], [3.0], "red")], "loss"),
        dot_chart("t", {"a": {"seed 0": 1.0, "seed 1": 3.0}, "b": {}}, ["red", "green"]),
        dot_chart("t", {"a": {"seed 0": 1.0}}, ["light-dark(#0072b2, #56b4e9)"]),
    ):
        assert chart.spec is not None
        altair.LayerChart.from_dict(chart.spec)
        with pytest.raises(Exception, match="'tall' is not of type 'number'"):
            altair.LayerChart.from_dict(chart.spec | {"height": "tall"})


def test_a_line_has_its_values() -> None:
    chart = line_chart("t", [Series("a", [0, 10, 20.5], [0.0, 5.0, 1 / 3], "red")], "loss")
    assert chart.series == [{"label": "a", "mark": "line", "x": [0, 10, 20.5], "y": [0.0, 5.0, 0.333333]}]
    assert chart.description == "loss over optimiser step. a: 0 at 0, 0.3333 at 20.5, between 0 and 5."


def test_the_y_axis_is_logarithmic_over_more_than_a_factor_of_ten() -> None:
    assert y_scale(0.01, 1.0, 100.0)["type"] == "log"
    for values in ((1.0, 9.0), (0.0, 100.0), (-1.0, 100.0)):
        assert y_scale(*values) == {"zero": False, "padding": 6}
    chart = line_chart("t", [Series("a", [1, 2], [0.1, 100.0], "red")], "y", y_scale="linear")
    assert chart.spec is not None and chart.spec["layer"][0]["encoding"]["y"]["scale"] == {"zero": False, "padding": 6}


def test_equal_values_have_an_axis_around_them() -> None:
    for value in (3.0, 0.0, -1.0):
        low, high = y_scale(value, value)["domain"]  # type: ignore[misc]
        assert low < value < high and high - value == pytest.approx(value - low)


def test_values_that_are_not_finite_are_gaps() -> None:
    [series] = line_chart("t", [Series("a", [1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0], "red")], "y").series
    assert series["y"] == [1.0, None, None, 2.0]


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_nothing_to_draw_is_said(values: list[float]) -> None:
    chart = line_chart("t", [Series("a", [1] * len(values), values, "red")], "y")
    assert chart.spec is None and chart.description == "Nothing was recorded."
    assert dot_chart("t", {"a": {}}, ["red"]).spec is None


def test_dots_have_a_row_for_each_group() -> None:
    groups = {"a": {"seed 0": 1.0, "seed 1": 3.0}, "b": {}, "c": {"seed 0": 5.0}}
    chart = dot_chart("loss", groups, ["red", "green", "blue"])
    assert chart.spec is not None
    dots, means, reference = chart.spec["layer"]
    rows = chart.spec["datasets"][dots["data"]["name"]] if "name" in dots["data"] else dots["data"]["values"]
    assert [(row["group"], row["name"], row["value"], row["mean"]) for row in rows] == [
        ("a", "seed 0", 1.0, 2.0),
        ("a", "seed 1", 3.0, 2.0),
        ("c", "seed 0", 5.0, 5.0),
    ]
    assert dots["encoding"]["y"]["scale"]["domain"] == ["a", "b", "c"], "an empty group keeps its row"
    assert means["mark"]["type"] == "tick" and reference["mark"]["strokeDash"]
    assert chart.description == "loss, by group. a: mean 2 of 1, 3. c: mean 5 of 5."


def test_the_same_chart_has_the_same_specification() -> None:
    groups = {"a": {"seed 0": 1.0}}
    series = [Series("a", [1, 2], [1.0, 2.0], "red")]
    assert line_chart("t", series, "y") == line_chart("t", series, "y")
    assert dot_chart("t", groups, ["red"]) == dot_chart("t", groups, ["red"])


def luminance(color: str) -> float:
    channels = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_layers_have_distinct_colours_with_contrast_on_both_pages() -> None:
    assert len({ordered_color(n, 12) for n in range(12)}) == 12
    for color in (ordered_color(0, 1), *(ordered_color(n, 12) for n in range(12))):
        light, dark = re.findall("#[0-9a-f]{6}", color)
        assert (luminance("#f6f8fa") + 0.05) / (luminance(light) + 0.05) > 3
        assert (luminance(dark) + 0.05) / (luminance("#1c2127") + 0.05) > 3


def test_a_heatmap_is_a_picture_of_the_values() -> None:
    values = np.array([[-9.0, 0.0, 9.0], [-9.0, 0.0, 0.0]])
    data = heatmap(values, 2.5).removeprefix("data:image/png;base64,")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
    assert picture.shape == (3, 2, 3)  # Channels upwards, time to the right.
    (red, blue, white) = (picture[0, 0], picture[2, 0], picture[1, 0])
    assert red[0] > red[2] + 100 and blue[2] > blue[0] + 100 and (white > 240).all()
    assert (picture[0, 1] == white).all()
