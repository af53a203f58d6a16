"""Ablations without training: the runs that a file defines, files that are refused, and the report on given results."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from ray_distill.pipeline.ablation import definition
from ray_distill.pipeline.ablation.definition import Ablation, ProbeSection, load_ablation
from ray_distill.pipeline.ablation.sweep import cores_per_worker, count_concurrent_runs
from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.probing.probe import Outcome, probe_folder, probe_settings, read_task, write_outcomes
from ray_distill.pipeline.reports.ablation_report import compare, read_results, saved_hours, t_95, write_ablation_report
from ray_distill.pipeline.stages import Run
from ray_distill.student.training.prefetch import TrainingPlan
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.storage.build_statistics import PassTime, TeacherTime

from ...tiny import tiny_tree

REPOSITORY = Path(__file__).resolve().parents[3]
BASE = tiny_tree(masks={"draws": 2})


def write(folder: Path, **changes: Any) -> Path:
    tree = {"name": "widths", "base": BASE, "seeds": [0, 1], "variants": {"a": {}, "b": {"masks.draws": 1}}} | changes
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_variants_grid_and_seeds_make_runs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = write(
        tmp_path,
        base="base.yaml",
        set={"train.epochs": 7},
        variants={"l1": {"train.loss": "l1"}, "mse": {}},
        grid={"student.attention_reuse": ["none", [False, True]], "masks.draws": [1, 4]},
    )
    ablation = load_ablation(path, ["runs=/data/runs", "train.learning_rate=0.25"])
    assert len(ablation.variants) == 8 and len(ablation.runs) == 16
    assert ablation.variants[3].name == "l1-attention_reuse-01-draws-4"
    assert [run.seed for run in ablation.runs] == [0] * 8 + [1] * 8, "all variants with the first seed come first"
    run = ablation.runs[11]
    assert run.name == "l1-attention_reuse-01-draws-4-seed1"
    assert run.config.folder == Path("/data/runs/widths/l1-attention_reuse-01-draws-4-seed1")
    assert (run.config.train.loss, run.config.train.epochs, run.config.train.seed) == ("l1", 7, 1)
    assert run.config.train.learning_rate == 0.25
    assert run.config.student["attention_reuse"] == [False, True]


def test_one_cache_has_what_all_runs_need(tmp_path: Path) -> None:
    variants = {
        "few": {"teacher.layers": [2], "masks.draws": 1},
        "many": {"teacher.layers": [1], "masks.draws": 3},
        "clean": {"teacher.layers": [1], "cache.targets": "clean_only"},
    }
    needs = load_ablation(write(tmp_path, variants=variants)).needs
    assert needs.teacher.layers == [1, 2] and needs.masks.draws == 3 and needs.cache.targets == "clean_and_masked"
    variants["all"] = {}
    assert load_ablation(write(tmp_path, variants=variants)).needs.teacher.layers is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"train.epoch": 3}}}, "variant a: train.epoch: unknown key; allowed here: accumulate"),
        ({"variants": {"a": {"student.dropout": 2}}}, "variant a: student.dropout: Input should be less than 1"),
        ({"variants": {"a": {"train.batch_size": 3}}}, "variant a: .*exactly one of train.batch_size"),
        ({"variants": {"a": {"cache.codec": "int8"}}}, "cache.codec: can't differ between runs"),
        ({"variants": {"a": {"corpus.path": "x"}}}, "corpus.path: can't differ between runs"),
        (
            {"variants": {"a": {"train.seed": 3}}},
            "train.seed: can't be set here; give the seeds of all variants as `seeds`",
        ),
        ({"set": {"train.seed": 3}}, "train.seed: can't be set here; give the seeds of all variants as `seeds`"),
        ({"set": {"name": "other"}}, "name: can't be set here; runs are named after their variants"),
        (
            {"variants": {"a": {}, "b": {"teacher": {"checkpoint": "other.pt"}}}},
            r"teacher: is a section; name one of its keys, as in teacher\.KEY",
        ),
        ({"variants": {"a": {}, "b": {"student": {"attention_reuse": "none"}}}}, "student: is a section"),
        ({"grid": {"train": [{"loss": "l1"}]}}, "train: is a section"),
        ({"set": {"train": {"epochs": 7}}}, "train: is a section"),
        ({"variants": {"a": {}, "b": {"teacher.checkpoint": "other.pt"}}}, "teacher.checkpoint: can't differ"),
        (
            {"variants": {"a": {"train.targets": "online"}}},
            "train.targets: can't differ between runs; all runs of an ablation train from one cache",
        ),
        (
            {"set": {"train.targets": "online"}},
            "train.targets: must be cached; all runs of an ablation train from one cache",
        ),
        ({"variants": {"a": {}, "b": {}}}, "variants a and b are the same configuration"),
        ({"variants": {"a/b": {}}}, "'a/b' can't name a folder"),
        ({"variants": {}}, "give variants, a grid, or both"),
        ({"grid": {"train.loss": []}}, "grid: train.loss has no values"),
        ({"grid": {"train.loss": ["l1"], "masks.draws": [1]}}, "masks.draws: is in the grid and in a variant"),
        ({"grid": {"masks.policy": [{"mask_prob": 1}]}, "variants": {}}, "can't be a part of a name"),
        (
            {"variants": {"a": {}, "b": {"masks.policy.mask_prob": 0.2}}},
            "variant b: masks: mask draw 0 has another",
        ),
        (
            {"variants": {"a": {}, "b": {"masks.seed": 9}}},
            "variant b: masks: mask draw 0 has another policy or seed",
        ),
        ({"variants": {"a": {"cache.targets": "composite_only"}, "b": {}}}, "composite_only stores no clean targets"),
        ({"variants": {"a": {"train.objective": "star", "student.heads": "none"}, "b": {}}}, "give `probe` too"),
        ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"seed": [1]}, "seed: unknown key; allowed here: base"),
        ({"probe": {"manifest": "x.csv", "epoch": 3}}, "probe.epoch: unknown key; allowed here: epochs"),
        ({"base": "nowhere.yaml"}, "no configuration file at .*nowhere.yaml"),
        ({"set": {"name.x": 3}}, "'name.x' can't be set"),
    ],
)
def test_what_can_not_be_is_refused_with_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ablation(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("masks.draws=3", "masks.draws: is varied by the ablation"),
        ("masks={draws: 3}", "masks: is a section"),
        ("train.seed=3", "train.seed: can't be set here; give the seeds of all variants as `seeds`"),
        ("name=a/b", "name: String should match pattern"),
    ],
)
def test_overrides_that_would_do_nothing_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ablation(write(tmp_path), [override])


def test_another_name_is_another_folder(tmp_path: Path) -> None:
    ablation = load_ablation(write(tmp_path), ["name=again", "runs=/data"])
    assert ablation.settings.name == "again" and ablation.folder == Path("/data/again")
    assert ablation.runs[0].config.folder == Path("/data/again/a-seed0")


def test_the_documented_example_is_sound(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "in-depth" / "ablations.md").read_text().partition("## Define an ablation")[2]
    example = text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "ablations").mkdir()
    (tmp_path / "ablations" / "example.yaml").write_text(example)
    base = "armhubert-s-100.yaml"
    (tmp_path / base).write_text((REPOSITORY / "configs" / base).read_text())
    assert len(load_ablation(tmp_path / "ablations" / "example.yaml").runs) == 2 * 2 * 3
    assert definition.__doc__ is not None
    brief = yaml.safe_load(definition.__doc__.partition("\n\n")[2])
    assert brief == {key: value for key, value in yaml.safe_load(example).items() if key != "question"}


def test_shipped_ablations_are_sound() -> None:
    paths = sorted((REPOSITORY / "configs" / "ablations").glob("*.yaml"))
    names = {path.stem for path in paths}
    assert {"reuse-pattern", "mask-draws", "hint-layers", "objective", "clean-target", "smoke"} <= names
    for path in paths:
        ablation = load_ablation(path, [], ProbeSection(manifest=Path("labels.csv")))
        assert ablation.settings.name == path.stem and len(ablation.runs) >= 4


def test_room_on_machines_and_clusters() -> None:
    two_cores, gpus = [{"CPU": 2.0}], [{"CPU": 0.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}]
    one = TrainSettings(batch_size=1)
    assert cores_per_worker(two_cores, one) == 2 and count_concurrent_runs(two_cores, one, 2) == 1, (
        "one run at a time on one machine"
    )
    assert count_concurrent_runs(two_cores, one, 1) == 2
    assert cores_per_worker(two_cores, TrainSettings(batch_size=1, workers=2)) == 1
    assert cores_per_worker(two_cores, TrainSettings(batch_size=1, workers=3)) == 1
    on_gpu = TrainSettings(batch_size=1, workers=2, use_gpu=True)
    assert cores_per_worker(gpus, on_gpu) == 1 and count_concurrent_runs(gpus, on_gpu, 1) == 4
    assert count_concurrent_runs(gpus, on_gpu, 8) == 2, "cores run out before GPUs"
    assert count_concurrent_runs(two_cores, on_gpu, 1) == 0


def test_a_difference_is_shown_only_beyond_what_seeds_do() -> None:
    for freedom, value in ((4, 2.776), (11, 2.2010), (30, 2.0423), (1000, 1.9623)):
        assert t_95(freedom) == pytest.approx(value, rel=2e-3 if freedom <= 10 else 1e-4)
    far = compare([3.0, 3.1, 2.9], [1.0, 1.1, 0.9])
    assert far is not None and far.shown and far.spreads == pytest.approx(20) and far.difference == pytest.approx(2)
    near = compare([1.05, 1.15, 0.95], [1.0, 1.1, 0.9])
    assert near is not None and not near.shown and near.spreads == pytest.approx(0.5)
    single = compare([3.0], [1.0])
    assert single is not None and single.spreads is None and not single.shown
    equal = compare([1.0, 1.0], [1.0, 1.0])
    assert equal is not None and not equal.shown and equal.spreads == 0
    assert compare([], [1.0]) is None


def test_saved_hours_count_the_passes_that_runs_would_have_made() -> None:
    work = TeacherTime(clean=PassTime(100.0, 1000.0), masked=PassTime(240.0, 2000.0))
    online, built = saved_hours(work, 3600.0, {True: 10.0, False: 5.0}) or (0, 0)
    assert online == pytest.approx(15 * 0.1 + 10 * 0.12) and built == pytest.approx(340 / 3600)
    assert saved_hours(TeacherTime(), 3600.0, {True: 1.0, False: 0.0}) is None, "a cache of an earlier version"


def test_passes_count_the_last_epoch_by_its_share() -> None:
    plan = TrainingPlan(np.array([16_000] * 12), TrainSettings(batch_size=2, epochs=10, max_steps=9), 1)
    assert (plan.total_steps, plan.epochs, plan.passes) == (9, 2, 1.5)


@pytest.fixture
def finished(tmp_path: Path) -> Ablation:
    """Folders of finished runs. The loss of b exceeds that of a by more than the spread over seeds, and a run of b failed."""
    path = write(tmp_path, seeds=[0, 1, 2], variants={"a": {}, "b": {"masks.draws": 1}, "c": {"train.ema_decay": 0.9}})
    ablation = load_ablation(path, [f"runs={tmp_path}", f"cache.path={tmp_path / 'cache'}"])
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
    folders = [run.config.folder for run in ablation.runs]
    results = read_results(folders, {"b-seed1": "the loss was not finite <b>"})
    shared = Run(ablation.needs, Console(quiet=True))
    page = write_ablation_report(ablation, results, shared)
    tables = [list(csv.DictReader((ablation.folder / name).open())) for name in ("table.csv", "runs.csv")]
    return page.read_text(), tables[0], tables[1]


def test_the_report_compares_and_says_what_failed(finished: Ablation) -> None:
    page, table, runs = report(finished)
    assert [row["variant"] for row in table] == ["a", "b", "c"]
    assert [row["seeds"] for row in table] == ["3", "2", "3"]
    assert float(table[0]["validation loss: mean"]) == pytest.approx(1.02)
    assert float(table[0]["validation loss: spread"]) == pytest.approx(0.02)
    assert float(table[1]["validation loss: difference"]) == pytest.approx(1.0)
    assert [row["validation loss: difference shown"] for row in table] == ["", "True", "False"]
    assert [row["state"] for row in runs].count("finished") == 8
    failed = next(row for row in runs if row["run"] == "b-seed1")
    assert (failed["state"], failed["failure"]) == ("failed", "the loss was not finite <b>")
    assert "b-seed1 failed: the loss was not finite &lt;b&gt;" in page
    assert "b against a: worse in validation loss (+1.0000, " in page
    assert "c against a: no difference shown in validation loss (+0.0100, " in page
    assert "cosine, layers 1-2" in page and "1,234" in page
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_probes_count_with_the_students_figure_and_the_settings_asked_for(finished: Ablation, tmp_path: Path) -> None:
    (tmp_path / "pitch.csv").write_text("path,label,split\na,x,train\nb,y,train\nc,x,test\n")
    task = read_task(tmp_path / "pitch.csv")
    asked, other = (probe_settings(tmp_path / "pitch.csv", "characters", epochs, 0) for epochs in (20, 1))
    folders = [run.config.folder for run in finished.runs]
    for folder in folders:
        for settings, value in ((asked, 0.5), (other, 0.25)):
            outcomes = [
                Outcome(source, "accuracy", v, v, v, None, [1.0], 0.0)
                for source, v in (("teacher", 0.9), ("student", value))
            ]
            write_outcomes(probe_folder(folder, "pitch", settings), outcomes, task, "pitch", {}, settings, own=1)
    shared = Run(finished.needs, Console(quiet=True))

    def means(probing: dict[str, Any] | None) -> dict[str, float]:
        write_ablation_report(finished, read_results(folders, probing=probing), shared)
        row = next(csv.DictReader((finished.folder / "table.csv").open()))
        return {key: float(value) for key, value in row.items() if key.startswith("pitch") and key.endswith("mean")}

    assert means(asked) == {"pitch, accuracy: mean": 0.5}
    both = means(None)
    assert sorted(both.values()) == [0.25, 0.5] and all("epochs" in name for name in both), both


def test_losses_of_different_kinds_are_not_compared(tmp_path: Path, finished: Ablation) -> None:
    variants = {"a": {}, "b": {"train.loss": "l1"}}
    path = write(tmp_path, seeds=[0], variants=variants)
    ablation = load_ablation(path, [f"runs={tmp_path}", f"cache.path={tmp_path / 'cache'}"])
    page, table, _ = report(ablation)
    assert "validation losses can&#x27;t be compared" in page
    assert "validation loss: mean" not in table[0] and "cosine, layer 2: mean" in table[0]
    assert "b against a: not told from chance with one seed each in cosine, layer 2 (" in page
    assert not any(math.isnan(float(row["cosine, layer 2: mean"])) for row in table)
