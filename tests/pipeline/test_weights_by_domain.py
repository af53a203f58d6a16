"""Runs and ablations whose teachers have weights by the domain of the utterance, from the manifest to the report."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from ray_distill.pipeline.ablation.definition import load_ablation
from ray_distill.pipeline.ablation.sweep import _copy_index
from ray_distill.pipeline.config import Config, ConfigError, check_config, dump_config
from ray_distill.pipeline.corpus.labels import LABELS, read_labels
from ray_distill.pipeline.planning.dry_run import plan_run
from ray_distill.pipeline.stages import STAGES, Run
from ray_distill.pipeline.stages.domains import check_domains
from ray_distill.pipeline.stages.export import export_best
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.report import report_run
from ray_distill.pipeline.stages.train import prepare_training, train_student
from ray_distill.student.training.metric_rows import read_rows
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.storage.shard_plan import plan_shards

from ..tiny import TEACHER, tiny_tree

WEIGHTS = ({"speech": 1.0, "audio": 1.0}, {"speech": 0.0, "audio": 0.1})
"""The rule of SPEAR's authors: the second teacher is learnt from audio only."""


@pytest.fixture
def manifest(tmp_path: Path, speech_folder: Path) -> Callable[..., Path]:
    """Writes a manifest of the test speech with some domains in turn."""

    def write(*domains: str) -> Path:
        path = tmp_path / "corpus.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "split", "domain"][: 3 if domains else 2])
            for number, audio in enumerate(sorted(speech_folder.rglob("*.flac"))):
                split = "dev" if "dev" in str(audio) else "train"
                rows.writerow([audio, split, *([domains[number % len(domains)]] if domains else [])])
        return path

    return write


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    def make(*weights: Any, **sections: Any) -> Config:
        teachers = [
            {"name": name, "checkpoint": checkpoint, "weight": weight, "cache": {"path": str(tmp_path / name)}}
            for name, checkpoint, weight in zip("ab", (TEACHER, "random:2x48"), weights or WEIGHTS, strict=True)
        ]
        tree = tiny_tree(
            corpus={"path": str(tmp_path / "corpus.csv")},
            cache={"codec": "fp16", "verify": False},
            runs=str(tmp_path / "runs"),
            masks={"draws": 1, "policy": {"mask_prob": 0.4}},
            train={"batch_seconds": 8, "max_steps": 2, "validate_every": 2, "log_every": 1},
        )
        del tree["teacher"]
        return check_config(tree | {"teachers": teachers} | sections)

    return make


def begin(config: Config, console: Console | None = None) -> Run:
    run = Run(config, console or Console(quiet=True))
    with run.folder.begin(config):
        index_audio(run)
    return run


@pytest.mark.slow
def test_a_run_from_the_manifest_to_the_report(manifest: Callable[..., Path], config: Callable[..., Config]) -> None:
    manifest("speech", "speech", "audio")
    console = Console(width=200)
    with console.capture() as shown:
        run = begin(config(), console)
    assert "format manifest, with 12 speakers, 4 utterances of audio, 8 utterances of speech" in shown.get().replace(
        "\n", " "
    )
    assert {label.domain for label in read_labels(run.folder.corpus).values()} == {"speech", "audio"}
    assert yaml.safe_load(dump_config(run.config))["teachers"][1]["weight"] == WEIGHTS[1]
    assert check_config(yaml.safe_load(dump_config(run.config))) == run.config
    for part in run.parts:
        plan = plan_shards(part.utterances, part.spec.shard_seconds, part.teacher.num_frames)
        build_cache(part.cache.location, part.spec, plan, part.checkpoint, teacher_name=part.teacher.name, workers=None)
    assert "weight speech 0, audio 0.1" in plan_run(run.config, list(STAGES)).facts["teacher b"]
    prepare_training(run, 1, in_process=True)()
    export_best(run)
    summary = report_run(run)
    assert [one["weight"] for one in summary["teachers"]] == list(WEIGHTS)
    last = [row for row in read_rows(run.folder.metrics_file) if row["kind"] == "validation"][-1]
    assert [one["last_validation_loss_by_domain"] for one in summary["teachers"]] == [
        {domain: last[f"teacher_loss_a.{domain}"] for domain in ("speech", "audio")},
        {"audio": last["teacher_loss_b.audio"]},
    ]
    page = run.folder.report.read_text()
    for text in ("Loss of teacher a, domain speech", "Loss of teacher b, domain audio", "weight speech 0, audio 0.1"):
        assert text in page, text
    # The manifest may have changed since the cache was built; then the training is refused before it starts.
    labels = pq.read_table(run.folder.corpus / LABELS)
    pq.write_table(labels.drop_columns(["domain"]), run.folder.corpus / LABELS)
    run.folder.result_file.unlink()
    with pytest.raises(ConfigError, match="^teachers.a.weight: 12 of 12 utterances, such as .*, have no domain, but"):
        train_student(run)


def test_domains_without_a_weight_are_refused_in_the_index_stage(
    manifest: Callable[..., Path], config: Callable[..., Config]
) -> None:
    manifest("speech", "audio", "music")
    message = "^teachers.a.weight: 4 of 12 utterances, such as .*, have the domain music,"
    with pytest.raises(ConfigError, match=message):
        begin(config())
    with pytest.raises(ConfigError, match=message):  # A dry run knows it too.
        plan_run(config(), list(STAGES))
    begin(config(1.0, {"speech": 1, "audio": 0.5, "music": 0}))
    manifest()
    begin(config(1.0, 2.0))
    with pytest.raises(ConfigError, match="^teachers.a.weight: 12 of 12 utterances, such as .*, have no domain, but"):
        begin(config())


def test_domains_of_windows_and_of_nemo(tmp_path: Path, speech_folder: Path, config: Callable[..., Config]) -> None:
    lines = [
        {"audio_filepath": str(audio), "domain": "audio"} for audio in sorted(speech_folder.rglob("train*/**/*.flac"))
    ]
    manifest = tmp_path / "nemo.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    sections = {"corpus": {"path": str(manifest), "max_seconds": 1.0, "long_audio": "cut"}}
    run = begin(config(1.0, 1.0, **sections))
    labels = read_labels(run.folder.corpus)
    assert len(labels) == len(run.utterances) > len(lines)
    assert {label.domain for label in labels.values()} == {"audio"}


def test_an_ablation_varies_weights(
    tmp_path: Path, manifest: Callable[..., Path], config: Callable[..., Config]
) -> None:
    manifest("speech", "audio")
    (tmp_path / "two.yaml").write_text(dump_config(config()))

    def ablation(**text: Any) -> Any:
        tree = {"name": "domains", "base": "two.yaml", "seeds": [0]} | text
        (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return load_ablation(tmp_path / "ablation.yaml")

    grid = ablation(grid={"teachers.b.weight.audio": [0.1, 1.0]})
    assert [run.config.teachers[1].weight for run in grid.runs] == [
        {"speech": 0.0, "audio": 0.1},
        {"speech": 0.0, "audio": 1.0},
    ]
    assert [run.name for run in grid.runs] == ["audio-0.1-seed0", "audio-1.0-seed0"]
    named = ablation(variants={"spear": {}, "number": {"teachers.b.weight": 0.1}, "off": {"teachers.b.weight": 0}})
    assert [run.config.teachers[1].weight for run in named.runs] == [WEIGHTS[1], 0.1, 0.0]
    with pytest.raises(ConfigError, match="can't be a part of a name; make it a named variant under `variants`"):
        ablation(grid={"teachers.b.weight": [WEIGHTS[0], WEIGHTS[1]]})
    # Runs of an ablation have the index of all, also when only its domains have changed.
    shared, run = begin(config()), Run(config(name="other"), Console(quiet=True))
    _copy_index(shared.folder.corpus, run.folder.corpus)
    check_domains(run)
    manifest("speech", "music")
    with pytest.raises(ConfigError, match="have the domain music"):
        begin(config())
    _copy_index(shared.folder.corpus, run.folder.corpus)
    with pytest.raises(ConfigError, match="have the domain music"):
        check_domains(run)
