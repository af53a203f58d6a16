"""A few trials of the benchmark: a build or repair that was killed is finished with the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.cache.cache_kills", "--quick", "--output", str(output)]
    subprocess.run(command, check=True, timeout=300, cwd=REPOSITORY)
    record = json.loads(output.read_text())
    assert record["trials"] == 6
    assert record["killed"] >= 4
    assert [record[key] for key in ("different_files", "lost", "twice", "made_again", "problems")] == [0] * 5
    assert any(0 < row["commits_at_kill"] < record["files_committed_by_a_build"] for row in record["rows"])
