"""``ray-distill teachers list|show``."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.planning.cache_cost import TYPICAL_BYTES_PER_VALUE
from ray_distill.pipeline.planning.teacher_facts import facts_of, published_facts
from ray_distill.teacher_cache.teachers import HUGGINGFACE_LOADERS, TeacherError
from tests.hub_server import running_hub, use_hub

RESULT = Path(__file__).resolve().parents[3] / "benchmarks/results/cache/codec_rate_distortion_whisper.json"


def test_the_sizes_are_those_of_the_benchmark() -> None:
    measured = json.loads(RESULT.read_text())
    names = {"fp16": "fp16", "int8": "int8", "pca": "pca:0.5", "layer-pca": "layer-pca:0.5"}
    values = measured["layers"] * measured["dim"]
    rows = {row["codec"]: row["bytes_per_frame"] / values for row in measured["rows"]}
    for codec, size in TYPICAL_BYTES_PER_VALUE.items():
        assert size == pytest.approx(rows[names[codec]], rel=0.01)


def test_published_facts() -> None:
    facts = published_facts()
    assert len({teacher.name for teacher in facts}) == len(facts) > 20
    assert {teacher.kind for teacher in facts} <= HUGGINGFACE_LOADERS.keys(), "only what can be loaded is listed"
    base = next(teacher for teacher in facts if teacher.name == "facebook/hubert-base-ls960")
    assert base.bytes_per_hour["fp16"] == 3600 * 50 * 12 * 768 * 2
    listed = CliRunner().invoke(application, ["teachers", "list", "--json"])
    assert json.loads(listed.output)[0]["bytes_per_hour"] == base.bytes_per_hour
    shown = CliRunner().invoke(application, ["teachers", "list"], env={"COLUMNS": "80"})
    assert "OWNER/NAME[@REVISION]" in shown.output
    assert all(teacher.name in shown.output for teacher in facts)


def test_facts_of_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builtin = facts_of("builtin:phone-hubert")
    assert (builtin.kind, builtin.layers, builtin.width, builtin.mask_embedding) == ("hubert", 6, 128, True)
    assert builtin.to_download == 0 and builtin.parameters == 902_304
    bundle = facts_of("torchaudio:HUBERT_BASE")
    assert bundle.layers is None and bundle.to_download is None and bundle.bytes_per_hour == {}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "hubert", "num_hidden_layers": 12, "hidden_size": 768}')
    torch.save({"x": torch.zeros(1000)}, folder / "pytorch_model.bin")
    with running_hub() as hub:
        use_hub(hub, tmp_path / "hub-cache", monkeypatch)
        hub.add("facebook/hubert-base-ls960", folder)
        facts = facts_of("mean-mask:facebook/hubert-base-ls960")
        assert (facts.kind, facts.layers, facts.width, facts.license) == ("hubert", 12, 768, "apache-2.0")
        assert facts.parameters is None and facts.to_download == (folder / "pytorch_model.bin").stat().st_size
        shown = CliRunner().invoke(application, ["teachers", "show", "facebook/hubert-base-ls960"])
        assert "12 of width 768" in shown.output and "cache, pca" in shown.output
        assert hub.downloaded() == ["config.json"]
    with pytest.raises(TeacherError, match="there is no teacher 'nobody'"):
        facts_of("nobody")
