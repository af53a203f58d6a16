"""The report of an ablation: comparisons over seeds, tables and page, from the folders that runs leave."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_distill.pipeline.ablation.definition import Ablation, load_ablation
from ray_distill.pipeline.probing.linear_probe import Outcome
from ray_distill.pipeline.probing.probe_record import probe_folder, probe_settings, read_probes, write_outcomes
from ray_distill.pipeline.probing.task import read_task
from ray_distill.pipeline.reports.ablation_report import write_ablation_report
from ray_distill.pipeline.reports.ablation_results import RunResult, read_results
from ray_distill.pipeline.reports.ablation_summary import AblationSummary, Metric, by_teacher, layer_range
from ray_distill.pipeline.reports.ablation_tables import results_table
from ray_distill.pipeline.reports.seed_statistics import compare, critical_t
from ray_distill.pipeline.reports.teacher_time import teacher_hours
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.teacher_cache.storage.build_statistics import PassTime, TeacherTime

BASE: dict[str, Any] = {
    "name": "base",
    "corpus": {"path": "corpus"},
    "teacher": {"checkpoint": "random:2x32"},
    "masks": {"draws": 2},
    "cache": {"path": "cache"},
    "student": {"encoder_embed_dim": 32, "encoder_attention_heads": 4, "conv_pos_groups": 4},
    "train": {"batch_seconds": 8},
}


def load(folder: Path, **changes: Any) -> Ablation:
    tree = {"name": "widths", "base": BASE} | changes
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_ablation(path, [f"runs={folder}", f"cache.path={folder / 'cache'}"])


def folders(ablation: Ablation) -> list[RunFolder]:
    return [RunFolder(run.config.folder) for run in ablation.runs]


def test_a_difference_is_significant_only_beyond_the_variation_over_seeds() -> None:
    for freedom, value in ((4, 2.776), (11, 2.2010), (30, 2.0423), (1000, 1.9623)):
        assert critical_t(freedom) == pytest.approx(value, rel=2e-3 if freedom <= 10 else 1e-4)
    far = compare([3.0, 3.1, 2.9], [1.0, 1.1, 0.9])
    assert (
        far is not None
        and far.significant
        and far.deviations == pytest.approx(20)
        and far.difference == pytest.approx(2)
    )
    near = compare([1.05, 1.15, 0.95], [1.0, 1.1, 0.9])
    assert near is not None and not near.significant and near.deviations == pytest.approx(0.5)
    single = compare([3.0], [1.0])
    assert single is not None and single.deviations is None and not single.significant
    equal = compare([1.0, 1.0], [1.0, 1.0])
    assert equal is not None and not equal.significant and equal.deviations == 0
    assert compare([], [1.0]) is None


def test_teacher_hours_count_the_passes_that_runs_would_have_made() -> None:
    time = TeacherTime(clean=PassTime(100.0, 1000.0), masked=PassTime(240.0, 2000.0))
    online, built = teacher_hours(time, 3600.0, 15.0, 10.0) or (0, 0)
    assert online == pytest.approx(15 * 0.1 + 10 * 0.12) and built == pytest.approx(340 / 3600)
    assert teacher_hours(TeacherTime(), 3600.0, 1.0, 1.0) is None, "a cache of an earlier version"


@pytest.fixture
def finished(tmp_path: Path) -> Ablation:
    """Folders as runs leave them: b's loss is higher than a's by more than seeds do; b's second run failed."""
    variants = {"a": {}, "b": {"masks.draws": 1}, "c": {"train.ema_decay": 0.9}}
    ablation = load(tmp_path, seeds=[0, 1, 2], variants=variants)
    for run in ablation.runs:
        folder = run.config.folder
        folder.mkdir(parents=True)
        if (run.variant, run.seed) == ("b", 1):
            continue
        loss = {"a": 1.0, "b": 2.0, "c": 1.01}[run.variant] + 0.02 * run.seed
        rows = [
            {"kind": "validation", "step": step, "loss": loss + extra}
            | {f"cosine_unmasked_layer_{layer:02d}": 0.5 - 0.1 * loss for layer in (1, 2)}
            for step, extra in ((0, 1.0), (5, 0.0), (9, 0.2))
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        trained = {"steps": 9, "seconds": 18.0, "best_step": 5, "best_validation_loss": loss}
        (folder / "train.json").write_text(json.dumps(trained))
        (folder / "summary.json").write_text(json.dumps({"student_parameters": 1234}))
    return ablation


def report(ablation: Ablation) -> tuple[str, list[dict[str, str]], list[dict[str, str]]]:
    results = read_results(folders(ablation), {"b-seed1": "the loss was not finite <b>"})
    page = write_ablation_report(ablation, results)
    tables = [list(csv.DictReader((ablation.folder / name).open())) for name in ("table.csv", "runs.csv")]
    return page.read_text(), tables[0], tables[1]


def test_layers_are_named_by_their_teachers() -> None:
    assert layer_range(["01", "02", "03"]) == "layers 1-3" and layer_range(["04"]) == "layer 4"
    assert layer_range(["a_01", "a_02", "b_2_04", "b_2_08"]) == "a layers 1-2 and b_2 layers 4, 8"
    assert by_teacher(["01", "02"]) == [["01", "02"]] and by_teacher(["a_01", "b_01"]) == [["a_01"], ["b_01"]]


def test_similarities_to_a_teacher_that_a_run_leaves_out_are_not_compared(tmp_path: Path) -> None:
    two = {key: value for key, value in BASE.items() if key not in ("teacher", "cache")}
    two["teachers"] = [
        {"name": name, "checkpoint": f"random:2x{dim}", "cache": name} for name, dim in (("a", 32), ("b", 48))
    ]
    row = {"step": 0} | {f"cosine_unmasked_layer_{name}_{layer:02d}": 0.5 for name in "ab" for layer in (1, 2)}
    training = {"best_step": 0, "best_validation_loss": 1.0}

    def layers(*changes: dict[str, Any]) -> list[str]:
        named = {f"v{number}": change for number, change in enumerate(changes)}
        tree = {"name": "two", "base": two, "variants": named, "seeds": [0], "probe": {"manifest": "labels.csv"}}
        (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
        ablation = load_ablation(tmp_path / "two.yaml", [f"runs={tmp_path}"])
        results = [RunResult(run.name, training, "", [row], None, []) for run in ablation.runs]
        return AblationSummary(ablation, results).layers

    assert layers({}, {"train.max_grad_norm": 1.0}) == ["a_01", "a_02", "b_01", "b_02"]
    assert layers({}, {"teachers.b.weight": 0}) == ["a_01", "a_02"]
    assert layers({"teachers.a.weight": 0}, {"teachers.b.weight": 0}) == []
    assert layers({}, {"train.aggregate": "concatenate"}) == layers({}, {"teachers.b.frames": "nearest"}) == []


def test_the_report_compares_variants_and_names_failures(finished: Ablation) -> None:
    page, table, runs = report(finished)
    assert [row["variant"] for row in table] == ["a", "b", "c"]
    assert [row["seeds"] for row in table] == ["3", "2", "3"]
    assert float(table[0]["validation loss: mean"]) == pytest.approx(1.02)
    assert float(table[0]["validation loss: standard deviation"]) == pytest.approx(0.02)
    assert float(table[1]["validation loss: difference"]) == pytest.approx(1.0)
    assert [row["validation loss: significant"] for row in table] == ["", "True", "False"]
    assert [row["state"] for row in runs].count("finished") == 8
    failed = next(row for row in runs if row["run"] == "b-seed1")
    assert (failed["state"], failed["failure"]) == ("failed", "the loss was not finite <b>")
    assert "b-seed1 failed: the loss was not finite &lt;b&gt;" in page
    assert "b compared with a: worse in validation loss (+1.0000, " in page
    assert "c compared with a: no significant difference in validation loss (+0.0100, " in page
    assert "cosine, layers 1-2" in page and "1,234" in page
    assert '<a href="c-seed2/report.html">' in page and "9 steps in 18 s, validation loss 2.0400" in page
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "<script src" not in page and "http" not in markup.replace("https://vega.github.io/schema/", "").replace(
        "http-equiv", ""
    )
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["name"] == "widths" and summary["said"][0].startswith("b compared with a: worse in validation loss")
    assert write_ablation_report(finished, read_results(folders(finished))).read_text() != page
    assert report(finished)[0] == page, "the same runs give the same bytes"


def test_a_difference_of_percentages_is_in_points() -> None:
    rate = Metric("phones, frame error rate", lambda run: None, True, digits=3, percent=True)
    assert (rate.format(0.754), rate.format_difference(-0.0051)) == ("75.4%", "-0.5 points")
    assert Metric("validation loss", lambda run: None, True).format_difference(0.01) == "+0.0100"


def test_the_dots_of_a_chart_are_the_seeds_of_a_variant(finished: Ablation) -> None:
    page, *_ = report(finished)
    charts = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    loss = charts[0]["description"]
    assert loss == (
        "validation loss (lower is better), by group. a: mean 1.02 of 1, 1.02, 1.04. b: mean 2.02 of 2, 2.04. "
        "c: mean 1.03 of 1.01, 1.03, 1.05."
    )
    rows = [row for dataset in charts[0]["spec"]["datasets"].values() for row in dataset]
    assert [row["name"] for row in rows if row.get("group") == "b"] == ["seed 0", "seed 2"]


def test_the_terminal_shows_the_main_metrics(finished: Ablation) -> None:
    table = results_table(finished, read_results(folders(finished)))
    assert [column.header for column in table.columns] == ["variant", "seeds", "validation loss", "cosine, layers 1-2"]
    losses = list(table.columns[2].cells)
    assert losses[0] == "1.0200 ± 0.0200" and str(losses[1]).startswith("2.0200 ± 0.0283\n+1.0000 (+")
    assert str(losses[1]).endswith(" SD), worse") and str(losses[2]).endswith(" SD), no significant difference")


def test_probes_count_with_the_students_result_and_the_requested_settings(finished: Ablation, tmp_path: Path) -> None:
    (tmp_path / "pitch.csv").write_text("path,label,split\na,x,train\nb,y,train\nc,x,test\n")
    task = read_task(tmp_path / "pitch.csv")
    asked, other = (probe_settings(tmp_path / "pitch.csv", "characters", epochs, 0) for epochs in (20, 1))
    for folder in folders(finished):
        for settings, value in ((asked, 0.5), (other, 0.25)):
            outcomes = [
                Outcome(source, "accuracy", v, v, v, None, [1.0], 0.0)
                for source, v in (("teacher", 0.9), ("student", value))
            ]
            place = probe_folder(folder.path, "pitch", settings)
            write_outcomes(place, outcomes, task, "pitch", {}, settings, run_student=1)

    def means(settings: dict[str, Any] | None) -> dict[str, float]:
        reference = read_probes(folders(finished)[0].path, asked)
        page = write_ablation_report(finished, read_results(folders(finished), None, settings), reference)
        assert "pitch, accuracy of the references: teacher 90.0% (90.0% to 90.0%); student" in page.read_text()
        row = next(csv.DictReader((finished.folder / "table.csv").open()))
        return {key: float(value) for key, value in row.items() if key.startswith("pitch") and key.endswith("mean")}

    assert means(asked) == {"pitch, accuracy: mean": 0.5}
    both = means(None)
    assert sorted(both.values()) == [0.25, 0.5] and all("epochs" in name for name in both), both


@pytest.mark.parametrize(
    "change", [{"train.loss": "l1"}, {"train.hint_weight": 0.5}, {"train.cosine_weight": 1.0}, {"teacher.layers": [2]}]
)
def test_losses_of_different_definitions_are_not_compared(
    tmp_path: Path, finished: Ablation, change: dict[str, Any]
) -> None:
    ablation = load(tmp_path, seeds=[0], variants={"a": {}, "b": change})
    page, table, _ = report(ablation)
    assert "validation losses can&#39;t be compared" in page
    assert "validation loss: mean" not in table[0] and "cosine, layer 2: mean" in table[0]
    assert "b compared with a: not testable (one seed each): cosine, layer 2 (" in page
    assert not any(math.isnan(float(row["cosine, layer 2: mean"])) for row in table)
