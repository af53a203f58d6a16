"""A run's folder: what it takes for its own, and what it reports when the cache is gone."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.stages import Run
from ray_distill.student import Student, save_student
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.storage.cache import Cache, grow_cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.shard_plan import plan_shards

from ..tiny import demo_config


def begin(folder: Path, *overrides: str) -> Run:
    return Run(demo_config(folder, *overrides), Console(quiet=True))


def build(run: Run) -> None:
    """The cache stage without Ray."""
    plan = plan_shards(run.utterances, run.spec.shard_seconds, run.teacher.num_frames)
    build_cache(run.cache.location, run.spec, plan, "random:2x64", teacher_name="random:2x64", workers=None)


@pytest.mark.parametrize("text", ["", "name: [", "- a list\n", "name: demo\n", "\udcff"])
def test_a_damaged_configuration_beside_results_is_named(tmp_path: Path, text: str) -> None:
    run = begin(tmp_path)
    (run.folder / "metrics.jsonl").write_text("")
    begin(tmp_path)
    (run.folder / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"demo/config.yaml is damaged, .* choose another name=\.\.\."):
        begin(tmp_path)


def test_a_kill_leaves_the_old_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path)
    before = (run.folder / "config.yaml").read_text()
    write = Path.write_text

    def killed(path: Path, text: str) -> int:
        write(path, text[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path, "train.seed=1")
    assert (run.folder / "config.yaml").read_text() == before


def test_a_report_without_the_cache_says_so(tmp_path: Path, speech_folder: Path) -> None:
    run = begin(tmp_path, f"corpus.path={speech_folder}")
    run.index()
    student, _ = run.first_student()
    save_student(Student(student), run.folder / "export", {})
    keys = ("steps", "skipped_steps", "seconds", "first_validation_loss", "best_validation_loss")
    (run.folder / "train.json").write_text(json.dumps(dict.fromkeys(keys, 1)))
    summary = run.report()
    assert summary["cache_bytes"] is None
    page = (run.folder / "report.html").read_text()
    assert f"The cache at {tmp_path / 'cache'} is gone" in page and 'href="summary.json"' in page


def test_another_run_that_adds_to_the_cache_stops_nobody(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_distill.pipeline.stages.init_ray", lambda: pytest.fail("something is built"))
    run = begin(tmp_path, f"corpus.path={speech_folder}", "cache.codec=fp16")
    run.index()
    build(run)
    more = run.spec.masks.model_copy(update={"draws": run.spec.masks.draws + 1})
    cache = grow_cache(Cache.open(run.cache), run.spec.model_copy(update={"masks": more}), {})
    assert cache.missing()
    run.cache_targets()  # Nothing of its own is missing.
    run.check_cache()
    (tmp_path / "cache" / "masked" / "draw=0" / "part-00000.parquet").unlink()
    with pytest.raises(CacheError, match="the cache is not sound: .*draw=0/part-00000.parquet is missing; `python"):
        run.check_cache()


@pytest.mark.slow
def test_a_cache_of_another_machines_precision_is_read_but_not_added_to(tmp_path: Path, speech_folder: Path) -> None:
    settings = (f"corpus.path={speech_folder}", "cache.codec=fp16")
    run = begin(tmp_path, *settings, "cache.gpus_per_actor=1")
    run.index()
    assert run.spec.precision == "fp16"
    build(run)
    for more in ((), ("cache.precision=fp16",)):
        again = begin(tmp_path, *settings, f"name=again{len(more)}", "cache.gpus_per_actor=0", *more)
        again.index()
        again.plan()
        again.cache_targets()
        again.check_cache()
    again = begin(tmp_path, *settings, "name=draws", "masks.draws=9")
    again.index()
    for stage in (again.plan, again.cache_targets):
        with pytest.raises(
            ConfigError, match="precision fp16 needs cache.gpus_per_actor; .* the cache at .* is of that"
        ):
            stage()
    elsewhere = begin(tmp_path, *settings, "name=elsewhere", f"cache.path={tmp_path / 'other'}")
    elsewhere.index()
    assert elsewhere.spec.precision == "fp32"


def test_online_targets_in_fp16_need_a_gpu(tmp_path: Path, speech_folder: Path) -> None:
    run = begin(tmp_path, f"corpus.path={speech_folder}", "train.targets=online", "cache.precision=fp16")
    run.index()
    with pytest.raises(ConfigError, match="cache.precision fp16 needs train.use_gpu; on CPUs use fp32 or bf16"):
        run.plan()
    run = begin(tmp_path, f"corpus.path={speech_folder}", "train.targets=online", "cache.precision=bf16", "name=bf16")
    run.index()
    run.plan()
