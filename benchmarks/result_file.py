"""The result file of a benchmark: measurements with the machine, versions, commit and command."""

import json
import multiprocessing
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def write_result(path: Path, **measured: Any) -> None:
    """Write ``measured`` as JSON, after machine, versions, commit and command."""
    record = {
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "pyarrow", "ray") if find_spec(name)},
        "commit": _COMMIT,
        "command": " ".join(["python -m", module_name(Path(sys.argv[0])), *sys.argv[1:]]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | measured, indent=2) + "\n")


def module_name(script: Path) -> str:
    """Return the name for ``python -m`` of a script of this repository, or the file's name if it is elsewhere."""
    script = script.resolve()
    if not script.is_relative_to(REPOSITORY):
        return script.name
    return ".".join(script.relative_to(REPOSITORY).with_suffix("").parts)


def machine() -> dict[str, Any]:
    """Return the CPU's name, the number of cores, and the GPU's name or None."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": multiprocessing.cpu_count(), "gpu": gpu}


def commit() -> str:
    """Return the repository's commit, with ``-dirty`` if the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


_COMMIT = commit()
"""The commit when the benchmark began, since a long one may end at another."""
