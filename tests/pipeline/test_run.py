"""Runs: the results that a folder accepts, the lock, caches shared with other runs, and a report without a cache."""

import io
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from ray_distill.memory import MemoryRanOutError
from ray_distill.pipeline import stages
from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.stages import STAGES, Run, run_stages
from ray_distill.pipeline.stages import plan as plan_stage
from ray_distill.pipeline.stages.cache import cache_targets, check_cache
from ray_distill.pipeline.stages.export import export_best
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.plan import plan_cache
from ray_distill.pipeline.stages.report import report_run
from ray_distill.pipeline.stages.train import initial_student
from ray_distill.student import Student, save_student
from ray_distill.teacher_cache.build.build_cache import BuildReport, build_cache
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.create import grow_cache
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.teachers import Teacher, load_teacher

from ..tiny import demo_config, tiny_student


def make(folder: Path, *overrides: str) -> Run:
    return Run(demo_config(folder, *overrides), Console(quiet=True))


def begin(folder: Path, *overrides: str) -> Run:
    """A run whose folder has its configuration."""
    run = make(folder, *overrides)
    with run.folder.begin(run.config):
        return run


def build(run: Run) -> None:
    """The cache stage without Ray."""
    plan = plan_shards(run.utterances, run.spec.shard_seconds, run.teacher.num_frames)
    build_cache(run.cache.location, run.spec, plan, "random:2x64", teacher_name="random:2x64", workers=None)


@pytest.mark.parametrize(
    ("override", "may_differ"),
    [
        ("train.max_failures=9", True),
        ("train.trackers=[mlflow]", True),
        ("cache.actors=7", True),
        ("cache.verify=false", True),
        ("train.max_steps=2000", True),
        ("train.epochs=2000", True),
        ("train.max_steps=null", True),
        ("train.max_steps=9", False),
        ("train.epochs=9", False),
        ("train.seed=9", False),
        ("train.log_every=9", False),
        ("cache.shard_minutes=9", False),
        ("masks.policy.mask_prob=0.5", False),
        ("student.conv_pos=64", False),
    ],
)
def test_only_keys_that_change_no_result_may_differ(tmp_path: Path, override: str, may_differ: bool) -> None:
    run = begin(tmp_path)
    begin(tmp_path, override)  # Nothing has been made yet.
    begin(tmp_path)
    # A version that lacked this key has not recorded it.
    tree = yaml.safe_load(run.folder.config_file.read_text())
    del tree["train"]["ema_decay"]
    run.folder.config_file.write_text(yaml.safe_dump(tree))
    run.folder.metrics_file.write_text("")
    begin(tmp_path)
    begin(tmp_path, "cache.shard_minutes=null")  # It takes that of the cache.
    begin(tmp_path)
    if may_differ:
        begin(tmp_path, override)
    else:
        key, value = override.split("=")
        with pytest.raises(
            ConfigError, match=rf"holds a run with another .*\({key} is .* there and {value}.* here\); choose"
        ):
            begin(tmp_path, override)
        assert run.folder.config() == run.config, "the refused configuration is not stored"


def test_a_damaged_or_missing_checkpoint_is_named_by_the_export(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.folder.result_file.write_text("{}")
    with pytest.raises(
        ValueError, match=r"the checkpoint .*best, from which the student would be exported, is missing; restore"
    ):
        export_best(run)
    save_student(Student(tiny_student()), run.folder.best)
    weights = run.folder.best / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=rf"^{weights} is not a safetensors file"):
        export_best(run)
    assert not run.folder.export.exists()
    weights.write_bytes(whole)
    export_best(run)
    shutil.rmtree(run.folder.best)
    export_best(run)
    assert (run.folder.export / "model.safetensors").read_bytes() == whole, "an export outlives its checkpoint"


def test_a_finished_training_that_is_made_longer_is_reopened(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.folder.result_file.write_text(json.dumps({"steps": 1000}))
    begin(tmp_path, "cache.actors=2")
    assert run.folder.is_trained and not run.folder.finished_before, "the same length keeps the result"
    begin(tmp_path, "train.max_steps=1200")
    assert not run.folder.is_trained
    assert run.folder.finished_before == [run.folder.path / "train-001000.json"]
    with pytest.raises(ConfigError, match=r"only a larger train\.epochs or train\.max_steps continues it"):
        begin(tmp_path, "train.max_steps=1100")


def test_a_stage_that_runs_out_of_memory_names_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(stages._LOWER) == set(STAGES)
    monkeypatch.setitem(stages._STAGES, "index", lambda run: torch.empty(2**58))
    with pytest.raises(
        MemoryRanOutError, match="^memory ran out in the index stage; lower corpus.max_seconds, or stop"
    ):
        run_stages(make(tmp_path), ["index"])


def test_files_without_a_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ConfigError, match=r"runs/demo contains files but no run \(no config.yaml\); choose another name"
    ):
        begin(tmp_path)
    assert (tmp_path / "runs" / "demo" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("text", ["", "name: [", "- a list\n", "name: demo\n", "\udcff"])
def test_a_damaged_configuration_beside_results_is_named(tmp_path: Path, text: str) -> None:
    run = begin(tmp_path)
    run.folder.metrics_file.write_text("")
    begin(tmp_path)
    run.folder.config_file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"demo/config.yaml is damaged, .* choose another name=\.\.\."):
        begin(tmp_path)


def test_a_kill_leaves_the_old_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path)
    before = run.folder.config_file.read_text()
    write = Path.write_text

    def killed(path: Path, text: str) -> int:
        done = write(path, text[:100])
        if "config.yaml" not in path.name:
            return done
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path, "train.seed=1")
    assert run.folder.config_file.read_text() == before


def test_a_report_without_the_cache_says_so(tmp_path: Path, speech_folder: Path) -> None:
    run = begin(tmp_path, f"corpus.path={speech_folder}")
    index_audio(run)
    student, _ = initial_student(run)
    save_student(Student(student), run.folder.export, {})
    keys = ("steps", "skipped_steps", "seconds", "first_validation_loss", "best_validation_loss")
    run.folder.result_file.write_text(json.dumps(dict.fromkeys(keys, 1)))
    summary = report_run(run)
    assert summary["cache_bytes"] is None
    page = run.folder.report.read_text()
    assert f"The cache at {tmp_path / 'cache'} no longer exists" in page and 'href="summary.json"' in page


def test_runs_beside_each_other_decode_their_corpus_once(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(tmp_path, f"corpus.path={speech_folder}")
    index_audio(first)
    monkeypatch.setattr("ray_distill.pipeline.corpus.decoding_work.decode", lambda *_: pytest.fail("decoded again"))
    second = begin(tmp_path, f"corpus.path={speech_folder}", "name=second")
    index_audio(second)
    assert second.utterances == first.utterances and second.folder.path != first.folder.path


def test_another_run_that_adds_to_the_cache_stops_nobody(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_distill.pipeline.stages.cache.init_ray", lambda: pytest.fail("something is built"))
    run = begin(tmp_path, f"corpus.path={speech_folder}", "cache.codec=fp16")
    index_audio(run)
    build(run)
    more = run.spec.masks.model_copy(update={"draws": run.spec.masks.draws + 1})
    cache = grow_cache(Cache.open(run.cache), run.spec.model_copy(update={"masks": more}), {})
    assert cache.missing()
    default = make(tmp_path, f"corpus.path={speech_folder}", "cache.codec=fp16", "cache.shard_minutes=null")
    default.corpus = run.corpus
    assert default.spec.shard_seconds == run.spec.shard_seconds == 180
    cache_targets(run)  # The run lacks nothing itself.
    check_cache(run)
    (tmp_path / "cache" / "masked" / "draw=0" / "part-00000.parquet").unlink()
    with pytest.raises(CacheError, match="is damaged: .*draw=0/part-00000.parquet is missing; .*`ray-distill"):
        check_cache(run)


def test_batches_that_workers_find_are_said(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    gpu = ("cache.batch_seconds=auto", "cache.gpus_per_actor=1", "cache.precision=fp32")
    config = demo_config(tmp_path, f"corpus.path={speech_folder}", "cache.codec=fp16", *gpu)
    run = Run(config, Console(file=said, width=300))
    with run.folder.begin(run.config):
        index_audio(run)
    assert run.spec.batch_seconds == "auto"

    def on_gpus(*arguments: Any, on_note: Callable[[str], None], **options: Any) -> BuildReport:
        """Build without Ray, and tell of two GPUs."""
        assert options["workers"].gpus_per_actor == 1
        monkeypatch.undo()
        spec = run.spec.model_copy(update={"batch_seconds": 60.0})
        build_cache(arguments[0], spec, arguments[2], "random:2x64", teacher_name="random:2x64", workers=None)
        on_note("batches of 240 s of audio (auto) on one")
        on_note("batches of 480 s of audio (auto) on [other]")
        return BuildReport(2, 0, 1.0, 30.0, 1.0, (240.0, 480.0))

    for name, value in (("init_ray", lambda: None), ("require_resources", lambda *_: None), ("build_cache", on_gpus)):
        monkeypatch.setattr(f"ray_distill.pipeline.stages.cache.{name}", value)
    cache_targets(run)
    text = said.getvalue()
    assert "cache   batches of 240 s of audio (auto) on one\n" in text and "(auto) on [other]\n" in text
    assert "cache   2 shards written in 1 s (0.50 h of audio per minute), in batches of 240 to 480 s (auto): " in text
    # A later run with auto takes what is there, also without a GPU.
    again = begin(tmp_path, f"corpus.path={speech_folder}", "name=again", "cache.codec=fp16", gpu[0], gpu[2])
    index_audio(again)
    assert again.spec.batch_seconds == 60
    cache_targets(again)


def test_a_codec_fitted_to_little_audio_is_said(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_distill.pipeline.stages.cache.init_ray", lambda: None)
    monkeypatch.setattr("ray_distill.pipeline.stages.cache.require_resources", lambda *_: None)

    def build_here(*arguments: Any, **options: Any) -> BuildReport:
        return build_cache(*arguments, teacher_name=options["teacher_name"], workers=None)

    monkeypatch.setattr("ray_distill.pipeline.stages.cache.build_cache", build_here)
    texts = {}
    for codec in ("pca", "fp16"):
        config = demo_config(
            tmp_path,
            f"corpus.path={speech_folder}",
            f"cache.codec={codec}",
            f"cache.path={tmp_path / codec}",
            f"name={codec}",
        )
        for time in ("first", "again"):
            run = Run(config, Console(file=(said := io.StringIO()), width=300))
            with run.folder.begin(run.config):
                index_audio(run)
                cache_targets(run)
            texts[codec, time] = said.getvalue()
    error = max(float(codec.error.max()) for codec in Cache.open(tmp_path / "pca").codecs(0))
    sentence = f" s of training audio, so it fits other audio badly: its error is up to {error:.0%} of a layer's standard deviation"
    assert [key for key, text in texts.items() if sentence in text] == [("pca", "first")]
    assert not any("fits other audio" in text for key, text in texts.items() if key != ("pca", "first"))


def test_a_plan_gives_back_the_memory_of_a_gpu(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path, f"corpus.path={speech_folder}", "cache.codec=fp16", "cache.gpus_per_actor=1")
    index_audio(run)
    loaded: list[weakref.ref[Teacher]] = []
    freed: list[bool] = []

    def load(spec: str, device: str) -> Teacher:
        assert device == "cuda"
        teacher = load_teacher(spec)
        loaded.append(weakref.ref(teacher))
        return teacher

    monkeypatch.setattr(plan_stage, "load_teacher", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(loaded[0]() is None))
    plan_cache(run)
    assert freed == [True]


@pytest.mark.slow
def test_a_cache_of_another_machines_precision_is_read_but_not_added_to(tmp_path: Path, speech_folder: Path) -> None:
    settings = (f"corpus.path={speech_folder}", "cache.codec=fp16")
    run = begin(tmp_path, *settings, "cache.gpus_per_actor=1")
    index_audio(run)
    assert run.spec.precision == "fp16"
    build(run)
    for more in ((), ("cache.precision=fp16",)):
        again = begin(tmp_path, *settings, f"name=again{len(more)}", "cache.gpus_per_actor=0", *more)
        index_audio(again)
        plan_cache(again)
        cache_targets(again)
        check_cache(again)
    again = begin(tmp_path, *settings, "name=draws", "masks.draws=9")
    index_audio(again)
    for stage in (plan_cache, cache_targets):
        with pytest.raises(
            ConfigError, match="fp16 needs GPUs, and the cache at .* set cache.precision=fp32 and a new"
        ):
            stage(again)
    elsewhere = begin(tmp_path, *settings, "name=elsewhere", f"cache.path={tmp_path / 'other'}")
    index_audio(elsewhere)
    assert elsewhere.spec.precision == "fp32"


def test_online_targets_in_fp16_need_a_gpu(tmp_path: Path, speech_folder: Path) -> None:
    run = begin(tmp_path, f"corpus.path={speech_folder}", "train.targets=online", "cache.precision=fp16")
    index_audio(run)
    with pytest.raises(ConfigError, match="fp16 needs GPUs; set train.use_gpu=true, or set cache.precision=fp32$"):
        plan_cache(run)
    run = begin(tmp_path, f"corpus.path={speech_folder}", "train.targets=online", "cache.precision=bf16", "name=bf16")
    index_audio(run)
    plan_cache(run)
