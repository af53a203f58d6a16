"""The notebooks run, and their committed outputs are those of their code."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = REPOSITORY / "docs" / "notebooks"
PLOTS = {"cache": 1, "distil": 2}


def outputs(notebook: Any) -> list[list[str]]:
    """Return each code cell's outputs: ``image`` for a plot, else the text with its decimal fractions masked."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts = [
                "image" if "image/png" in output.get("data", {}) else output.get("text") or output["data"]["text/plain"]
                for output in cell.outputs
            ]
            found.append([re.sub(r"-?\d+\.\d+", "#", text) for text in texts])
    return found


@pytest.mark.parametrize("name", PLOTS)
def test_committed_outputs_are_complete_and_name_no_path(name: str) -> None:
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    assert not re.search(r"/(?:tmp|home|root|work|usr)/", text) and str(REPOSITORY) not in text
    assert len(text) < 600_000
    plots = [image for cell in outputs(nbformat.reads(text, 4)) for image in cell if image == "image"]
    assert len(plots) == PLOTS[name]
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(PLOTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLOTS)
def test_it_runs_with_the_committed_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    committed = outputs(notebook)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    assert outputs(notebook) == committed
    text = str(notebook.cells)
    if name == "distil":
        cosines = [float(value) for value in re.findall(r"cosine (-?\d\.\d+)", text)]
        assert len(cosines) == 3 and min(cosines) > 0.8, "the student does not follow its teacher"
        spectrum, untrained, student, teacher = (float(value) for value in re.findall(r"error rate (\d+\.\d+)%", text))
        assert teacher < student < spectrum < untrained
