"""Ablations without training: the runs that a file defines, and files that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ray_distill.pipeline.ablation import definition
from ray_distill.pipeline.ablation.definition import ProbeSection, load_ablation
from ray_distill.pipeline.ablation.sweep import cores_per_worker, count_concurrent_runs
from ray_distill.pipeline.config import ConfigError
from ray_distill.student.training.prefetch import TrainingPlan
from ray_distill.student.training.train_settings import TrainSettings

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
    ("kinds", "needed"),
    [
        (["clean_only"], "clean_only"),
        (["clean_and_masked", "clean_only"], "clean_and_masked"),
        (["masked_everywhere", "clean_only"], "masked_everywhere"),
        (["clean_only", "clean_and_masked", "masked_everywhere"], "masked_everywhere"),
        (["composite_only"], "composite_only"),
    ],
)
def test_the_cache_has_the_fewest_targets_that_serve_all_runs(tmp_path: Path, kinds: list[str], needed: str) -> None:
    variants = {kind: {"cache.targets": kind} for kind in kinds}
    assert load_ablation(write(tmp_path, variants=variants)).needs.cache.targets == needed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"train.epoch": 3}}}, "variant a: train.epoch: unknown key; did you mean train.epochs?"),
        ({"variants": {"a": {"student.dropout": 2}}}, "variant a: student.dropout: must be less than 1"),
        ({"variants": {"a": {"train.batch_size": 3}}}, "variant a: .*train.batch_size is 3 and"),
        (
            {"variants": {True: {}}},
            r'variants\.1: must be text, but YAML reads it as True; put it in quotes, as in "NAME":',
        ),
        ({"variants": ["a"]}, r"variants: \['a'\] is a list, but this key needs a table"),
        (
            {"set": {"train.use_gpu": True}, "variants": {"a": {}, "b": {"train.batch_seconds": "auto"}}},
            "variant b: train.batch_seconds: auto would measure another size for each student and GPU, .*give the seconds$",
        ),
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
            r"teacher: is a section; name one of its keys, as in teacher\.checkpoint",
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
        ({"seed": [1]}, "seed: unknown key; did you mean seeds?"),
        ({"probe": {"manifest": "x.csv", "epoch": 3}}, "probe.epoch: unknown key; did you mean probe.epochs?"),
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
        ("name=a/b", "name: 'a/b' can't be a name; use letters from a to z, digits, '.', '_' and '-'"),
    ],
)
def test_overrides_that_would_do_nothing_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ablation(write(tmp_path), [override])


def test_short_keys_mean_what_they_mean_for_a_run(tmp_path: Path) -> None:
    path = write(tmp_path, base="armhubert-s-100", variants={"a": {}, "b": {"masks.draws": 1}})
    ablation = load_ablation(path, ["corpus=/data/speech", "teacher=/models/x.pt"])
    assert str(ablation.needs.corpus.path) == "/data/speech" and ablation.needs.teacher.checkpoint == "/models/x.pt"
    assert ablation.needs.cache.path == "caches/x-speech-train-clean-100"
    assert ["the cache is caches/x-speech" in note for note in ablation.notes] == [True]
    named = load_ablation(path, ["corpus=/data/speech", "cache=/data/c"])
    assert {run.config.cache.path for run in named.runs} == {"/data/c"} and not named.notes
    with pytest.raises(ConfigError, match=r"corpus: is a section; name one of its keys, as in corpus\.path"):
        load_ablation(path, ["corpus={path: x}"])


def test_another_name_is_another_folder(tmp_path: Path) -> None:
    few = load_ablation(write(tmp_path), ["seeds=[7]", "concurrent=2", "cpus_per_worker=3"])
    assert {run.seed for run in few.runs} == {7}
    assert (few.settings.concurrent, few.settings.cpus_per_worker) == (2, 3)
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


def test_shipped_grids_of_several_teachers_take_another_corpus_and_other_widths() -> None:
    folder = REPOSITORY / "configs/ablations"
    probe = ProbeSection(manifest=Path("labels.csv"))
    targets = load_ablation(folder / "targets.yaml", ["corpus=/data/speech"], probe)
    corpus = "speech-train-clean-100-train-clean-360-train-other-500"
    assert [part.cache.path for part in targets.needs.parts] == [
        f"caches/{name}_base{more}"
        for name, more in (
            ("hubert", f"_ls960-{corpus}"),
            ("hubert", f"_ls960-{corpus}-mvq-16"),
            ("hubert", f"_ls960-{corpus}-mvq-16"),
            ("hubert", f"_ls960-{corpus}-units-500"),
            ("wavlm", f"-{corpus}"),
            ("wavlm", f"-{corpus}-units-500"),
        )
    ]
    narrow = load_ablation(folder / "aggregate.yaml", ["student.target_dim=48"], probe)
    assert {run.config.student["target_dim"] for run in narrow.runs} == {48}


def test_shipped_ablations_are_sound() -> None:
    paths = sorted((REPOSITORY / "configs" / "ablations").glob("*.yaml"))
    names = {path.stem for path in paths}
    assert {"reuse-pattern", "mask-draws", "hint-layers", "objective", "clean-target", "smoke", "targets"} <= names
    for path in paths:
        ablation = load_ablation(path, [], ProbeSection(manifest=Path("labels.csv")))
        assert ablation.settings.name == path.stem and len(ablation.runs) >= 4
    for name in ("objective", "several-teachers", "targets", "aggregate"):
        with pytest.raises(ConfigError, match="have neither losses nor similarities in common; give `probe` too"):
            load_ablation(REPOSITORY / "configs" / "ablations" / f"{name}.yaml")
    targets = load_ablation(
        REPOSITORY / "configs" / "ablations" / "targets.yaml", [], ProbeSection(manifest=Path("a.csv"))
    )
    assert len({part.cache.path for part in targets.needs.parts}) == 5, "one set of caches"


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


def test_passes_count_the_last_epoch_by_its_share() -> None:
    plan = TrainingPlan(np.array([16_000] * 12), TrainSettings(batch_size=2, epochs=10, max_steps=9), 1)
    assert (plan.total_steps, plan.epochs, plan.passes) == (9, 2, 1.5)
