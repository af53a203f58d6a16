"""Runs with a teacher other than HuBERT: configurations that are refused, and the same run after a correction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from rich.console import Console

from ray_distill.pipeline.config import ConfigError, load_config
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.export import export_best
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.plan import plan_cache
from ray_distill.pipeline.student_export import open_student
from ray_distill.student import Student, save_student
from ray_distill.teacher_cache.teachers import resolve_teacher
from tests.hub_server import running_hub, use_hub
from tests.teacher_cache.teachers.huggingface_folders import ENCODER
from tests.tiny import demo_config, tiny_student

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def ast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AST with random weights that takes audio of 0.175 to 2.025 s."""
    folder = tmp_path_factory.mktemp("teacher") / "ast"
    config = transformers.ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_length=200
    )
    transformers.ASTModel(config).save_pretrained(folder)
    return folder


def test_a_corrected_command_goes_on(ast: Path, tmp_path: Path, speech_folder: Path) -> None:
    def run(*overrides: str) -> Run:
        paths = (f"corpus.path={speech_folder}", f"cache.path={tmp_path / 'cache'}", f"runs={tmp_path / 'runs'}")
        begun = Run(load_config(DEMO, [*paths, *overrides]), Console(quiet=True))
        index_audio(begun)
        plan_cache(begun)
        return begun

    with pytest.raises(
        ConfigError, match=f"ast has no mask embedding.*teacher.checkpoint=mean-mask:{ast} for a substitute embedding"
    ):
        run(f"teacher.checkpoint={ast}")
    stand_in = f"teacher.checkpoint=mean-mask:{ast}"
    with pytest.raises(
        ConfigError, match=r"takes audio of 0.175 to 2.02494 s, but 1 utterance is longer; .*max_seconds=2.02 "
    ):
        run(stand_in)
    with pytest.raises(ConfigError, match=r"1 utterance is shorter; set corpus.min_seconds=0.7 "):
        begun = run(stand_in, "corpus.max_seconds=2.02")
        begun.teacher.min_samples = 11_200
        plan_cache(begun)
    with pytest.raises(ConfigError, match=r"takes audio of 0.7 s or more, but 1 utterance is shorter;"):
        begun.teacher.max_samples = None
        plan_cache(begun)
    begun = run(stand_in, "corpus.max_seconds=2.02")
    # Maps of 10 TB for each second of audio above one.
    begun.teacher.map_bytes = lambda samples: max(0, samples - 16_000) * 625_000_000  # type: ignore[method-assign]
    with pytest.raises(
        ConfigError,
        match=r"ast needs [\d.]+ GB for the attention maps of an utterance of 2 s, .*; set corpus.max_seconds=0",
    ):
        plan_cache(begun)
    begun = run(stand_in, "corpus.max_seconds=2.02")
    assert len(begun.corpus.utterances) == 11 and len(begun.corpus.skipped) == 1
    student = begun.config.resolve_student(2, 32, begun.teacher.patches)
    assert student.patches is not None and student.patches.rows == 12


def test_workers_find_a_teacher_with_options(ast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ast.parent)
    assert resolve_teacher("layer-norm:mean-mask:ast") == f"layer-norm:mean-mask:{ast}"
    assert resolve_teacher("ast") == str(ast)
    assert resolve_teacher("random:2x32") == "random:2x32"


def test_an_export_names_the_commit_of_its_teacher(tmp_path: Path, speech_folder: Path) -> None:
    source = f"hf://owner/tiny@{'b' * 40}"
    run = Run(
        demo_config(tmp_path, f"corpus.path={speech_folder}", "teacher.checkpoint=mean-mask:owner/tiny"), Console()
    )
    run.checkpoint = f"mean-mask:{source}"
    save_student(Student(tiny_student()), run.folder.best)
    run.folder.result_file.write_text("{}")
    run.keep_checkpoint()
    export_best(run)
    moved = tmp_path / "elsewhere" / "deep" / "student"
    moved.parent.mkdir(parents=True)
    run.folder.export.rename(moved)
    _, origin = open_student(moved)
    assert (origin["teacher"], origin["teacher_source"]) == ("owner/tiny", source)
    (moved / "teacher.json").write_text("[]")
    with pytest.raises(ValueError, match=r"teacher.json is damaged; restore it from a copy, or remove it"):
        open_student(moved)


def test_a_run_keeps_the_commit_of_a_branch_that_moves(
    tmp_path: Path, speech_folder: Path, make_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        model = transformers.HubertModel(transformers.HubertConfig(**ENCODER))
        model.save_pretrained(folder)
    overrides = (f"corpus.path={speech_folder}", "teacher.checkpoint=owner/tiny")
    with running_hub() as hub:
        use_hub(hub, tmp_path / "hub-cache", monkeypatch)
        first = hub.add("owner/tiny", folders[0])
        begun = Run(demo_config(tmp_path, *overrides), Console(quiet=True))
        begun.folder.path.mkdir(parents=True)
        begun.keep_checkpoint()
        hub.add("owner/tiny", folders[0])
        same = Run(demo_config(tmp_path, *overrides, "name=same"), Console(quiet=True))
        assert same.checkpoint != begun.checkpoint == f"hf://owner/tiny@{first}"
        second = hub.add("owner/tiny", folders[1])
        resumed = Run(demo_config(tmp_path, *overrides), Console(quiet=True))
        assert resumed.checkpoint == begun.checkpoint
        assert not resumed.folder.has_results, (
            "another configuration may replace a run that has only its teacher's commit"
        )
        other = Run(demo_config(tmp_path, *overrides, "teacher.checkpoint=mean-mask:owner/tiny"), Console(quiet=True))
        assert other.checkpoint == f"mean-mask:hf://owner/tiny@{second}"
        other.checkpoint = str(folders[0])
        other.keep_checkpoint()
        assert not resumed.folder.teacher_file.exists(), "the name of a path has nothing to keep"

        make_cache(tmp_path / "cache", begun.checkpoint, layers=(1, 2))
        moved = Run(demo_config(tmp_path, *overrides, "name=moved"), Console(quiet=True))
        index_audio(moved)
        with pytest.raises(
            ConfigError,
            match=f"other weights than commit {first} .*; set teacher.checkpoint=owner/tiny@{first}, or cache",
        ):
            _ = moved.spec
        assert same.teacher.fingerprint == begun.teacher.fingerprint
        index_audio(same)
        assert same.spec.teacher == begun.teacher.fingerprint, "a commit with the same weights is the same teacher"
