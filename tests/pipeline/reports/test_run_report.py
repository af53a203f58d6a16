"""The report: one file that needs nothing else, right whatever a run recorded."""

import base64
import io
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_distill.pipeline.reports.charts import Line, heatmap, line_chart
from ray_distill.pipeline.reports.run_report import (
    FeatureMaps,
    LayerMap,
    feature_maps,
    layer_color,
    read_metrics,
    write_report,
)
from ray_distill.student import Student
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec

from ...tiny import tiny_student

SUMMARY: dict[str, Any] = {
    "name": "a <run> & more",
    "teacher": "teacher",
    "teacher_is_random": False,
    "teacher_parameters": 95_000_000,
    "student_parameters": 22_000_000,
    "cache_bytes_per_second": 18_000.0,
    "training": {
        "steps": 40,
        "skipped_steps": 2,
        "seconds": 4000.0,
        "first_validation_loss": 2.0,
        "best_validation_loss": 0.5,
    },
}
MAPS = FeatureMaps("u-1", 3.0, [LayerMap(n, np.zeros((150, 8)), np.ones((150, 8)), 0.25 + n / 100) for n in (1, 12)])


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, 41):
        found.append(
            {
                "kind": "train",
                "step": step,
                "loss": 2 / step,
                "learning_rate": step * 1e-4,
                "gradient_norm": 1.0,
                "audio_hours_per_minute": 3.0,
                "data_wait": 0.01,
                "padding_waste": 0.02,
                "cosine_masked_layer_01": 0.5,
            }
        )
    found += [
        {"kind": "validation", "step": step, "loss": 1.0, "layer_01": 1.0, "layer_02": 2.0} for step in (0, 20, 40)
    ]
    return [
        *found,
        {"kind": "skipped", "step": 7, "cause": "loss"},
        {"kind": "skipped", "step": 30, "cause": "gradient"},
    ]


def write(folder: Path, metrics: list[dict[str, Any]], **changes: Any) -> str:
    path = folder / "report.html"
    facts = {"corpus": "12 h <of> speech"}
    write_report(path, summary=SUMMARY | changes, facts=facts, metrics=metrics, maps=MAPS, config="name: <b>\n")
    return path.read_text()


class WellFormed(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "line", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line",):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    page = write(tmp_path, rows())
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    assert "http:" not in page and "https:" not in page and "<script" not in page and "@import" not in page
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
    titles = ("Training and validation loss", "skipped step", "Validation loss of each layer", "Throughput", "Padding")
    for title in (*titles, "Layer 12", "0.37"):
        assert title in page
    assert "Nothing was recorded" not in page
    assert "a &lt;run&gt; &amp; more" in page and "12 h &lt;of&gt; speech" in page and "name: &lt;b&gt;" in page
    assert "<run>" not in page
    assert "1 h 6 min" in page and "18 kB" in page and "1/4.32 of the teacher" in page
    assert "RANDOM" not in page and "random weights" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_random_teacher_is_said(tmp_path: Path) -> None:
    assert "seeded random weights" in write(tmp_path, rows(), teacher_is_random=True)


def test_a_run_that_recorded_little_has_an_honest_page(tmp_path: Path) -> None:
    page = write(tmp_path, [], cache_bytes_per_second=None)
    assert page.count("Nothing was recorded") >= 4
    assert "of cache per second" not in page
    one = write(tmp_path, rows()[:1])
    assert "<circle" in one and "nan" not in one


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert read_metrics(path) == [{"kind": "train", "step": 1}]


def points(chart: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline points="([^"]+)"', chart)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in lines]


def test_a_line_stands_where_its_values_are() -> None:
    (line,) = points(line_chart("t", [Line("a", [0, 10, 20], [0.0, 5.0, 10.0], "red")], "y"))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1) and x2 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.1) and y2 < y0
    (line,) = points(line_chart("t", [Line("a", [1, 2, 3], [0.01, 1.0, 100.0], "red")], "y"))
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.1), "decades are equally far apart"


def test_gaps_and_equal_values() -> None:
    broken = points(line_chart("t", [Line("a", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 2.0, 1.0], "red")], "y"))
    assert [len(piece) for piece in broken] == [2, 2]
    for values in ([3.0, 3.0], [0.0, 0.0], [-1.0, -1.0]):
        (line,) = points(line_chart("t", [Line("a", [1, 2], values, "red")], "y"))
        assert line[0][1] == line[1][1] and 0 < line[0][1] < 250


def test_layers_have_colours_of_their_own() -> None:
    assert len({layer_color(n, 12) for n in range(12)}) == 12
    assert re.fullmatch("#[0-9a-f]{6}", layer_color(0, 1))


def test_a_heatmap_is_a_picture_of_the_values() -> None:
    values = np.array([[-9.0, 0.0, 9.0], [-9.0, 0.0, 0.0]])
    data = re.search(r"base64,([^\"]+)", heatmap(values, 2.5))
    assert data is not None
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGB")).astype(int)
    assert picture.shape == (3, 2, 3)  # Channels upwards, time to the right.
    (red, blue, white) = (picture[0, 0], picture[2, 0], picture[1, 0])
    assert red[0] > red[2] + 100 and blue[2] > blue[0] + 100 and (white > 240).all()
    assert (picture[0, 1] == white).all()


def test_maps_come_from_teacher_and_student(tmp_path: Path, make_cache: Callable[..., CacheSpec]) -> None:
    make_cache(tmp_path / "cache", "random:4x32")
    reader = CacheReader(tmp_path / "cache", "validation", [2, 3, 4])
    torch.manual_seed(0)
    student = Student(tiny_student(encoder_layers=3))
    maps = feature_maps(student, reader)
    assert [layer.layer for layer in maps.layers] == [2, 3, 4]
    for teacher, ours in ((layer.teacher, layer.student) for layer in maps.layers):
        assert teacher.shape == ours.shape
        assert teacher.shape[1] == 32
        np.testing.assert_allclose(teacher.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(teacher.std(0, ddof=1), 1, atol=1e-3)
    longest = int(reader.num_samples.argmax())  # All are shorter than what is looked for.
    assert maps.utterance == reader.ids[longest]
