"""The served models while other threads load some."""

from types import SimpleNamespace
from typing import Any

from ray_distill.serve.inference.models import Models, ServedModel
from ray_distill.serve.settings import AppSettings


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
