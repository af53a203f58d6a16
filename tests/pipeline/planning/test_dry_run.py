"""The dry run: what it checks, what it says, and that it writes nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.config import Config, ConfigError, dump_config, load_config
from ray_distill.pipeline.planning.dry_run import plan_run
from ray_distill.pipeline.ray_session import require_gpus
from ray_distill.pipeline.stages import STAGES, Run, run_stages
from ray_distill.pipeline.stages.train import initial_student
from ray_distill.student import Student
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from tests.hub_server import running_hub, use_hub
from tests.teacher_cache.teachers.huggingface_folders import save_tiny

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
Make = Callable[..., CacheSpec]
OF_THE_CACHE = (
    "teacher.checkpoint=random:2x32",
    "masks={draws: 2, seed: 3, policy: {mask_prob: 0.5, mask_length: 4}}",
    "cache.codec=fp32",
    "cache.shard_minutes=0.08333333333333333",
    "cache.batch_seconds=6",
)
"""Settings of the cache that the fixture make_cache builds."""


def configure(folder: Path, *overrides: str) -> Config:
    paths = (f"corpus.path={folder / 'corpus'}", f"cache.path={folder / 'cache'}", f"runs={folder / 'runs'}")
    return load_config(DEMO, [*paths, *overrides])


def test_a_new_run_is_planned_and_nothing_is_written(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["run", "--config", "demo", f"corpus.path={speech_folder}", "--dry-run"]
    shown = CliRunner().invoke(application, arguments, env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.output
    for text in (
        "9 train files, 3 validation files",
        "builtin:phone-hubert: 902,304 parameters, 6 layers of width 128, 6 used",
        "225,688 parameters",
        f"build the cache at {tmp_path / 'caches' / 'demo'}",
        "train from the first step",
        "train-tones      9      -  train       folder train-tones",
        "nothing was started or written",
    ):
        assert text in shown.output
    assert sorted(tmp_path.rglob("*")) == before


def test_the_size_of_batches_is_told(tmp_path: Path, speech_folder: Path) -> None:
    def facts(*overrides: str) -> str:
        return plan_run(configure(tmp_path, *overrides), list(STAGES)).facts["training"]

    auto = ("train.batch_seconds=auto", "train.use_gpu=true")
    assert "batches of 10 s of audio, 1 worker" in facts()
    assert "batches of 4 utterances, 1 worker" in facts("train.batch_seconds=null", "train.batch_size=4")
    assert "batches of as much audio as fits (auto), found on the GPU at the start, 1 worker" in facts(*auto)
    run = configure(tmp_path, *auto)
    state = run.folder / "checkpoints" / "last" / "state.pt"
    state.parent.mkdir(parents=True)
    torch.save({"state": {"step": 10, "batch_seconds": 97.5}}, state)
    (run.folder / "config.yaml").write_text(dump_config(run))
    assert "batches of 97.5 s of audio (auto), 1 worker" in facts(*auto)


def test_batches_that_each_gpu_finds_are_told(tmp_path: Path, make_cache: Make) -> None:
    auto = (*OF_THE_CACHE, "cache.batch_seconds=auto")
    on_gpu = (*auto, "cache.gpus_per_actor=1")
    plan = plan_run(configure(tmp_path, *on_gpu), ["index", "cache"])
    assert plan.facts["cache"].endswith(": fp32, clean_and_masked, batches found on each GPU (auto)")
    with pytest.raises(
        ConfigError, match=r"^cache.batch_seconds auto .* on the CPU; give the seconds, as in \S+=120, or set"
    ):
        plan_run(configure(tmp_path, *auto), ["index", "cache"])
    assert "cache" not in plan_run(configure(tmp_path, *auto), ["index", "plan"]).stages, (
        "the machine that trains builds nothing"
    )
    # An existing cache keeps its size, and then a CPU can add to it.
    make_cache(tmp_path / "cache")
    plan = plan_run(configure(tmp_path, *auto), ["index", "cache"])
    assert "auto" not in plan.facts["cache"] and plan.stages["cache"].startswith("reuse the cache at")
    assert (
        plan_run(configure(tmp_path, *auto, "masks.draws=5"), ["index", "cache"])
        .stages["cache"]
        .startswith("add 3 mask draws")
    )


def test_the_students_size_is_that_of_the_run(tmp_path: Path, speech_folder: Path) -> None:
    plan = plan_run(configure(tmp_path), list(STAGES))
    settings, _ = initial_student(Run(configure(tmp_path), Console(quiet=True)))
    assert plan.facts["student"].startswith(f"{sum(p.numel() for p in Student(settings).parameters()):,} parameters")


def test_only_selected_stages_are_planned(tmp_path: Path, speech_folder: Path) -> None:
    assert list(plan_run(configure(tmp_path), ["plan", "index"]).stages) == ["index", "plan"]


def test_work_of_an_earlier_stage_that_is_missing_is_told(tmp_path: Path, speech_folder: Path) -> None:
    config = configure(tmp_path)
    for stages, message in (
        (["plan"], "has no complete corpus index; run the index stage first"),
        (["index", "train"], "there is no teacher cache at .*; run the cache stage first"),
        (["export"], "the run demo has no finished training to export; run the train stage first"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_run(config, stages)


def test_a_place_where_no_cache_can_be_is_told(tmp_path: Path, speech_folder: Path) -> None:
    (tmp_path / "cache").write_text("a")
    with pytest.raises(CacheError, match=r"/cache is a file, but a cache is a folder; give the path of a folder"):
        plan_run(configure(tmp_path), list(STAGES))
    (tmp_path / "cache").unlink()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("a")
    with pytest.raises(
        CacheError, match=r"holds files \(such as thesis.tex\) but no cache.json; set cache.path to an empty"
    ):
        plan_run(configure(tmp_path), list(STAGES))


def test_the_place_of_an_audio_store_is_not_that_of_a_cache(tmp_path: Path, source_utterances: list[Utterance]) -> None:
    build_audio_store(tmp_path / "cache", CacheSpec.of_audio("x", 5), plan_audio(source_utterances, 5), workers=None)
    with pytest.raises(
        CacheError, match=r"^the cache at \S+/cache is an audio store, which has no targets; set cache.path to another"
    ):
        plan_run(configure(tmp_path, *OF_THE_CACHE), ["index", "cache"])


def test_finished_work_is_reused(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "cache")
    config = configure(tmp_path, *OF_THE_CACHE)
    assert plan_run(config, ["index", "cache"]).stages["cache"].startswith(f"reuse the cache at {tmp_path / 'cache'}")
    more = configure(tmp_path, *OF_THE_CACHE, "masks.draws=5")
    assert plan_run(more, ["index", "cache"]).stages["cache"].startswith("add 3 mask draws to the cache at")
    next((tmp_path / "cache" / "commits").rglob("*.json")).unlink()
    assert plan_run(config, ["index", "cache"]).stages["cache"].startswith("write 1 missing file of the cache at")
    run = tmp_path / "runs" / "demo"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    assert plan_run(config, ["index", "train"]).stages["train"].startswith("resume from the last checkpoint in")
    (run / "train.json").write_text("{}")
    assert plan_run(config, ["index", "train"]).stages["train"] == "nothing, since the training is finished"
    longer = configure(tmp_path, *OF_THE_CACHE, "train.max_steps=1001")
    assert (
        plan_run(longer, ["index", "train"]).stages["train"].startswith("continue the finished training from its last")
    )


def test_online_targets_need_no_cache(tmp_path: Path, speech_folder: Path) -> None:
    plan = plan_run(configure(tmp_path, "train.targets=online"), list(STAGES))
    assert "cache" not in plan.facts and plan.stages["cache"] == "nothing, since targets are online"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corpus.path=/nowhere/at/all"], "there is no corpus at /nowhere/at/all"),
        (["corpus.train_splits=[none]"], "has no split 'none'"),
        (["teacher.checkpoint=/nowhere.pt"], "there is no teacher '/nowhere.pt'"),
        (["teacher.checkpoint=torchaudio:HUBERT"], "no pre-trained bundle 'HUBERT'"),
        (["teacher.checkpoint=torchaudio:HUBERT_BASE"], "has no mask embedding"),
        (["teacher.layers=[7]"], "there is no layer 7; builtin:phone-hubert has layers 1 to 6"),
    ],
)
def test_mistakes_are_found(tmp_path: Path, speech_folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_run(configure(tmp_path, *overrides), list(STAGES))


def test_a_teacher_on_the_hub_is_not_downloaded(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = Path(save_tiny("hubert", tmp_path / "single"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(single / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(bytes(700_000))
    with running_hub() as hub:
        use_hub(hub, tmp_path / "hub-cache", monkeypatch)
        commit = hub.add("owner/single", single)
        hub.add("owner/pickled", pickled)
        teacher = plan_run(configure(tmp_path, "teacher.checkpoint=owner/single"), ["index"]).facts["teacher"]
        assert teacher.startswith(
            f"owner/single@{commit[:12]}: 60,400 parameters, 3 layers of width 32, 3 used, 0.2 MB to"
        )
        config = configure(tmp_path, "teacher.checkpoint=owner/pickled")
        teacher = plan_run(config, ["index"]).facts["teacher"]
        assert (
            "3 layers of width 32 by its config.json; its weights are not checked, 0.7 MB to download (pytorch"
            in teacher
        )
        with pytest.raises(
            ConfigError, match=r"there is no layer 4; owner/pickled@\w+ has layers 1 to 3 by its config.json"
        ):
            plan_run(configure(tmp_path, "teacher.checkpoint=owner/pickled", "teacher.layers=[4]"), ["index"])
        assert not any(path.suffix in (".bin", ".safetensors") for path in (tmp_path / "hub-cache").rglob("*"))


def test_a_folder_without_audio_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "notes.txt").write_text("no audio")
    with pytest.raises(ValueError, match="no audio"):
        plan_run(configure(tmp_path), list(STAGES))


def test_a_cache_with_another_codec_is_refused(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "cache")
    with pytest.raises(CacheError, match="codec: 'fp32' -> 'int8'"):
        plan_run(configure(tmp_path, *OF_THE_CACHE, "cache.codec=int8"), list(STAGES))


def test_a_damaged_checkpoint_is_refused_by_its_header(tmp_path: Path, speech_folder: Path, shared: Path) -> None:
    checkpoint = tmp_path / "teacher.pt"
    shutil.copy(shared / "teacher" / "hubert_small.pt", checkpoint)
    config = configure(tmp_path, f"teacher.checkpoint={checkpoint}")
    assert "6 layers of width 192" in plan_run(config, ["index"]).facts["teacher"]
    torch.save({"model": {}}, checkpoint)
    with pytest.raises(ValueError, match=r"teacher\.pt has neither 'cfg' nor 'args'"):
        plan_run(config, ["index"])
    checkpoint.write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(ValueError, match="is not a readable PyTorch checkpoint"):
        plan_run(config, ["index"])


def test_the_folder_of_another_run_is_refused(tmp_path: Path, speech_folder: Path) -> None:
    config = configure(tmp_path)
    with Run(config, Console(quiet=True)).folder.begin(config):
        config.folder.joinpath("metrics.jsonl").write_text("")
    assert plan_run(config, ["index"]).name == "demo"
    with pytest.raises(ConfigError, match=r"another configuration \(train\.seed is 0 there and 9 here\)"):
        plan_run(configure(tmp_path, "train.seed=9"), ["index"])


def test_a_student_that_does_not_fit_and_missing_gpus_are_told(tmp_path: Path, speech_folder: Path) -> None:
    recipe = DEMO.with_name("armhubert-s-100.yaml")
    paths = [f"corpus={speech_folder}", f"runs={tmp_path}"]
    with pytest.raises(
        ValueError, match="the student predicts 12 layers of width 768, but the targets have 3 layers of width 48"
    ):
        plan_run(load_config(recipe, ["teacher=random:3x48", *paths]), list(STAGES))
    small = [*paths, "teacher=random:2x32", "train.use_gpu=true", "train.workers=3", "cache.gpus_per_actor=0.5"]
    config = load_config(DEMO, small)
    there = torch.cuda.device_count()
    if there < 3:
        assert "the training needs 3 GPUs" in plan_run(config, list(STAGES)).stages["train"]
        with pytest.raises(
            ConfigError, match=r"train\.use_gpu, .*: the training needs 3 GPUs.*submit the job to a cluster, or run"
        ):
            require_gpus(config)
    require_gpus(load_config(DEMO, paths))


def test_a_student_with_other_frames_is_refused_before_the_cache_is_built(tmp_path: Path, speech_folder: Path) -> None:
    config = configure(tmp_path, "student.conv_layers=[[32, 10, 5], [32, 8, 4]]")
    message = r"the student makes \d+ frames from an utterance of 16000 samples, but the targets have 49; .*student\.conv_layers$"
    with pytest.raises(ValueError, match=message):
        plan_run(config, list(STAGES))
    with pytest.raises(ValueError, match=message):
        run_stages(Run(config, Console(quiet=True)), ["index", "plan", "cache", "train"])
    assert not (tmp_path / "cache").exists()


def test_the_dry_run_of_an_ablation_names_the_variant(tmp_path: Path, speech_folder: Path) -> None:
    grid = tmp_path / "grid.yaml"
    text = f"""name: grid
base: demo
set: {{corpus.path: {speech_folder}, cache.path: {tmp_path / "cache"}, runs: {tmp_path / "runs"}}}
variants:
  as-it-is:
  none: {{student.attention_reuse: none}}
"""
    grid.write_text(text)
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(application, ["ablate", str(grid), "--dry-run"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.output
    for line in (
        "as-it-is: 225,688 parameters, 6 layers of width 56; train from the first step",
        "none: 244,840 parameters, 6 layers of width 56; train from the first step",
        f"build the cache at {tmp_path / 'cache'}",
        "nothing was started or written",
    ):
        assert line in shown.output
    grid.write_text(f"{text}  b: {{teacher.layers: [9]}}\n")
    refused = CliRunner().invoke(application, ["ablate", str(grid), "--dry-run"])
    assert refused.exit_code == 2 and "error: variant b: teacher.layers: there is no layer 9" in refused.stderr
    assert sorted(tmp_path.rglob("*")) == before
