"""``python -m serve`` as its users start and stop it."""

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from student import Student, save_student

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "serve"]


@pytest.fixture(scope="module")
def export(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's export folder with a tiny student in it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "export"
    save_student(student, folder, None)
    return folder


def test_it_serves_until_sigterm_and_exits_cleanly(export: Path) -> None:
    audio = io.BytesIO()
    soundfile.write(audio, np.sin(np.arange(16_000) / 20), 16_000, format="WAV")
    command = [*COMMAND, "--model", str(export), "--port", "0", "--max-seconds", "5"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(filter(None, (re.search(r"running on (http://\S+)", line) for line in process.stderr)))[1]
            with httpx.Client(base_url=address, trust_env=False) as client:
                info = client.get("/info").json()
                assert (info["models"][0]["id"], info["limits"]["max_seconds"]) == ("tiny", 5.0)
                features = client.post("/v1/features", content=audio.getvalue()).json()
                assert features["shape"] == [49, info["models"][0]["dim"]]
                chunked = client.post("/v1/features", content=iter([audio.getvalue()[:999], audio.getvalue()[999:]]))
                assert chunked.json() == features
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read()
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    assert "Traceback" not in log


def test_a_missing_model_folder_is_one_sentence(tmp_path: Path) -> None:
    command = [*COMMAND, "--model", str(tmp_path / "nothing")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: There is no model folder at '.*nothing': .*\.\n", done.stderr)


def test_a_folder_without_a_student_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--model", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
