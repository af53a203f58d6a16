"""Runs with a teacher other than HuBERT: configurations that are refused, and the same run after a correction."""

from pathlib import Path

import pytest
import transformers
from rich.console import Console

from ray_distill.pipeline.config import ConfigError, load_config
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.cache import absolute_checkpoint
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.plan import plan_cache

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
    assert absolute_checkpoint("layer-norm:mean-mask:ast") == f"layer-norm:mean-mask:{ast}"
    assert absolute_checkpoint("ast") == str(ast)
    assert absolute_checkpoint("random:2x32") == "random:2x32"
