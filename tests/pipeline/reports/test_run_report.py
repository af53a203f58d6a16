"""The report of a run: one file that needs nothing else, whatever the run recorded."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_distill.pipeline.reports.explained_variance import explained_variance, shown_share
from ray_distill.pipeline.reports.feature_maps import FeatureMaps, LayerMap, feature_maps
from ray_distill.pipeline.reports.run_report import write_run_report
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.student import Student
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec

from ...tiny import tiny_student

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


def write(path: Path, metrics: list[dict[str, Any]], maps: FeatureMaps | str = MAPS, **changes: Any) -> str:
    folder = RunFolder(path)
    folder.config_file.write_text("name: <b>\n")
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    write_run_report(folder, summary=SUMMARY | changes, facts={"corpus": "12 h <of> speech"}, maps=maps)
    return folder.report.read_text()


def charts(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json">(.*?)</script>', page)
    return [json.loads(text) for text in found]


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
    # The library names addresses that it never loads.
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http:" not in markup and "https:" not in markup.replace("https://vega.github.io/schema/", "")
    assert (
        "default-src 'none'" in markup and "@import" not in page and "<script src" not in page and "<link" not in page
    )
    assert set(re.findall(r'src="(.{10})', markup)) == {"data:image"}
    titles = ("Training and validation loss", "skipped step", "Validation loss by layer", "Throughput", "Padding")
    for title in (*titles, "Layer 12", "0.37"):
        assert title in markup
    assert "Nothing was recorded" not in markup
    assert "a &lt;run&gt; &amp; more" in page and "12 h &lt;of&gt; speech" in page and "name: &lt;b&gt;" in page
    assert "<run>" not in page
    assert "1 h 6 min" in page and "18 kB" in page and "1/4.32 of the teacher" in page
    assert "RANDOM" not in page and "random weights" not in page
    assert 'href="config.yaml"' in page and 'href="metrics.jsonl"' in page and 'href="summary.json"' not in page
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "config.yaml", "metrics.jsonl"}


def test_every_chart_has_its_values_in_words(tmp_path: Path) -> None:
    page = write(tmp_path, rows())
    loss = "weighted loss over optimiser step. training: 2 at 1, 0.05 at 40, between 0.05 and 2."
    assert loss in page, "for readers without scripts"
    found = charts(page)
    assert len(found) == len(re.findall('<div class="chart">', page)) and found[0]["description"].startswith(loss)
    assert all(chart["description"].endswith(".") for chart in found)


def test_the_loss_is_compared_with_the_best_constant_prediction(tmp_path: Path) -> None:
    assert explained_variance(rows()) is None and "variance explained" not in write(tmp_path, rows())
    metrics = rows()
    next(row for row in metrics if row["kind"] == "validation").update(
        constant_loss=4.4, constant_layer_01=4.0, constant_layer_02=8.0
    )
    explained = explained_variance(metrics)
    assert explained is not None and explained.constant_loss == 4.4
    assert explained.share == {"1": 0.75, "2": 0.75}
    page = write(tmp_path, metrics)
    assert "<b>75.0%</b><span>of the variance of layer 2 explained at the last validation" in page
    assert shown_share(0.75, "2") == "75.0% of layer 2"
    assert shown_share(-458.139, "12") == "none of layer 12, whose error is 459 times that of a constant"
    assert "variance explained</th>" in page and "<td>0.750</td>" in page


def test_skipped_steps_are_points_on_the_loss(tmp_path: Path) -> None:
    skipped = charts(write(tmp_path, rows()))[0]["series"][-1]
    assert (skipped["label"], skipped["mark"]) == ("skipped step", "points")
    assert skipped["x"] == [7, 30] and skipped["y"] == pytest.approx([2 / 7, 2 / 30], rel=1e-5)


def test_a_random_teacher_is_said(tmp_path: Path) -> None:
    assert "seeded random weights" in write(tmp_path, rows(), teacher_is_random=True)


def test_a_run_that_recorded_little_has_an_honest_page(tmp_path: Path) -> None:
    page = write(tmp_path, [], cache_bytes_per_second=None)
    assert page.count("Nothing was recorded") >= 4
    assert "cache size per second" not in page and "No validation was recorded." in page
    [loss] = (chart for chart in charts(write(tmp_path, rows()[:1])) if "weighted loss" in chart["description"])
    assert loss["series"] == [{"label": "training", "mark": "line", "x": [1], "y": [2.0]}]
    assert loss["description"] == "weighted loss over optimiser step. training: 2 at 1."
    assert "No student is exported yet." in write(tmp_path, [], "No student is exported yet.")


def test_the_same_run_has_the_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path, rows())
    write_run_report(RunFolder(tmp_path), summary=SUMMARY, facts={"corpus": "12 h <of> speech"}, maps=MAPS)
    assert RunFolder(tmp_path).report.read_text() == first


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    [template] = rows()[:1]
    keys = [f"cosine_{kind}_layer_{layer:02d}" for kind in ("masked", "unmasked") for layer in range(1, 13)]
    metrics = []
    for step in range(1, 100_001):
        values = dict(zip(keys, rng.random(len(keys)).tolist(), strict=True)) if step % 10 == 0 else {}
        metrics.append(template | {"step": step, "loss": float(rng.random())} | values)
    noise = [LayerMap(n, rng.normal(size=(1200, 64)), rng.normal(size=(1200, 64)), 0.5) for n in (1, 6, 12)]
    page = write(tmp_path, metrics, FeatureMaps("u-1", 10.0, noise))
    assert len(page) < 2e6
    loss = charts(page)[0]["series"][0]
    assert len(loss["x"]) == 300 and loss["x"][-1] == 100_000
    assert np.mean(loss["y"]) == pytest.approx(np.mean([row["loss"] for row in metrics]), rel=1e-3)
    assert "Each point is the mean of up to 334 rows" in page and "the first 3.3 s are shown" in page


def test_phones_are_named_below_the_features(tmp_path: Path) -> None:
    phones = ["SIL"] * 10 + ["AH"] * 20 + ["-"] * 5 + ["S"] * 115
    page = write(tmp_path, rows(), replace(MAPS, phones=phones))
    assert "with its phones below" in page and "the first 2.2 s are shown" in page
    # Centres of frames 10 to 30 and 35 to 110.
    named = re.findall(r'left: ([\d.]+)%">(AH|S|SIL|-)</span>', page)
    assert set(named) == {(f"{2000 / 110:.2f}", "AH"), (f"{7250 / 110:.2f}", "S")}
    assert "phones below" not in write(tmp_path, rows())


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.metrics() == []
    folder.metrics_file.write_text('{"kind": "train", "step": 1, "loss": 2.5}\n{"kind": "tra')
    assert folder.metrics() == [{"kind": "train", "step": 1, "loss": 2.5}]


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    row = '{"kind": "train", "step": 1, "loss": 2.5}\n'
    folder.metrics_file.write_text(row + row.replace("loss", "lors") + row)
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl is damaged in line 2, which is not a row of metrics; restore"
    ):
        folder.metrics()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_answer_to_the_mouse_without_network(tmp_path: Path, browser: Any, scheme: str) -> None:
    write(tmp_path, rows())
    context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": 390, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    count = page.locator(".chart").count()
    page.wait_for_function("count => document.querySelectorAll('.chart svg').length === count", arg=count)
    assert problems == [] and all(url.startswith(("file:", "data:")) for url in requests)
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "a phone needs no sideways scrolling"
    described = page.locator(".chart").first.get_attribute("aria-label")
    assert described.startswith("weighted loss over optimiser step. training: 2 at 1"), described

    chart = page.locator(".chart").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + 80
    page.mouse.move(*middle)
    page.mouse.move(middle[0] + 4, middle[1])
    tooltip = page.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    text = tooltip.inner_text().split()
    step = int(text[text.index("step") + 1])
    assert float(text[text.index("training") + 1]) == pytest.approx(2 / step, rel=1e-4)

    def labels() -> set[str]:
        return set(chart.locator(".role-axis-label text").all_text_contents())

    before = labels()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -600)
    page.keyboard.up("Control")
    page.wait_for_timeout(300)
    assert labels() != before, "zoomed"
    page.mouse.dblclick(*middle)
    page.wait_for_timeout(300)
    assert labels() == before, "reset"
    line = chart.locator(".mark-line path").first
    assert (
        line.evaluate("path => getComputedStyle(path).stroke")
        == {
            "light": "rgb(0, 114, 178)",
            "dark": "rgb(86, 180, 233)",
        }[scheme]
    )
    context.close()


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
