"""The record of a run's starts: command, time and version of the code."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ray_distill.pipeline.run_starts import clone_commit, code_version, read_starts, record_start


def test_starts_are_recorded_until_a_training_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "starts.jsonl"
    assert read_starts(file) == []
    for arguments, first in ((["a"], True), (["b c"], False), (["d"], False)):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/ray-distill", "run", *arguments])
        record_start(file, first=first)
    starts = read_starts(file)
    assert [start["command"] for start in starts] == ["ray-distill run a", "ray-distill run 'b c'", "ray-distill run d"]
    assert all(start["time"].endswith("UTC") and start["code"] for start in starts)
    monkeypatch.setattr(sys, "argv", ["/clone/ray_distill/__main__.py", "demo"])
    record_start(file, first=True)
    assert [start["command"] for start in read_starts(file)] == ["python -m ray_distill demo"]
    file.write_text('{"time": "noon"}\n')
    with pytest.raises(ValueError, match="starts.jsonl is damaged; restore it from a copy, or remove it"):
        read_starts(file)


def test_the_version_is_the_commit_of_a_clone(tmp_path: Path) -> None:
    assert code_version(tmp_path) == f"version {version('ray-distill')}"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "one")
    commit = f"commit {git('rev-parse', 'HEAD')}"
    assert code_version(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert code_version(tmp_path) == f"{commit}, with changes"
    # An environment in the clone of another project, whose commit says nothing of the package in it.
    installed = tmp_path / ".venv" / "ray_distill"
    installed.mkdir(parents=True)
    assert code_version(installed) == f"version {version('ray-distill')}" and clone_commit(installed) is None
