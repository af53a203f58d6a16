"""The served models: what a path may be, and closing while other threads load some."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray_distill.serve.inference.models import Models, ServedModel, default_name
from ray_distill.serve.settings import AppSettings
from ray_distill.student import Student, save_student


def test_all_models_are_closed_while_a_request_loads_another() -> None:
    models = Models(AppSettings(), lambda batch: None)
    closed: list[str] = []

    def put(name: str) -> None:
        def close() -> None:
            closed.append(name)
            put(f"loaded after {name}")

        engine: Any = SimpleNamespace(close=close)
        models._models[name] = ServedModel(name, engine)

    put("first")
    put("second")
    models.close()
    assert closed == ["first", "second"] and models.get(None).name == "first"


def test_the_folder_of_a_run_is_served_as_its_export(student: Student, tmp_path: Path) -> None:
    save_student(student, tmp_path / "demo" / "export", None)
    models = Models(AppSettings(), lambda batch: None)
    models.put(default_name(tmp_path / "demo"), tmp_path / "demo")
    models.put("export", tmp_path / "demo" / "export")
    assert models.get("demo").engine.backend.revision == models.get("export").engine.backend.revision
    models.close()
