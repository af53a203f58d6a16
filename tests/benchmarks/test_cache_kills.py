"""A few of the benchmark's kills: what a killed build or repair leaves is finished to the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "cache_kills.py"


def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "kills.json"
    subprocess.run([sys.executable, str(SCRIPT), "--quick", "--output", str(output)], check=True, timeout=300)
    record = json.loads(output.read_text())
    assert record["trials"] == 6
    assert record["killed"] >= 4
    assert [record[key] for key in ("different_files", "lost", "twice", "made_again", "problems")] == [0] * 5
    assert any(0 < row["commits_at_kill"] < record["files_committed_by_a_build"] for row in record["rows"])
