"""A run's folder: what it takes for its own, and what it reports when the cache is gone."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.config import ConfigError, load_config
from pipeline.stages import Run
from student import Student, save_student

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def begin(folder: Path, *overrides: str) -> Run:
    paths = ("teacher.checkpoint=random:2x64", f"cache.path={folder / 'cache'}", f"runs={folder / 'runs'}")
    return Run(load_config(DEMO, [*paths, *overrides]), Console(quiet=True))


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
