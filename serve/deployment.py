"""The application as a Ray Serve deployment, for clusters.

``serve run ray_distill.serve.deployment:build model=/data/runs/demo/export`` starts it.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application

from ray_distill.serve.api.admission import Limits
from ray_distill.serve.app import create_app
from ray_distill.serve.decoding import silence_decoders
from ray_distill.serve.inference.backends import BackendOptions
from ray_distill.serve.inference.engine import BatchLimits

_GROUPS: dict[str, Any] = {"limits": Limits, "batch": BatchLimits, "backend": BackendOptions}


def build(arguments: dict[str, Any]) -> Application:
    """The application for ``serve run``, ``serve build`` and a RayService's ``import_path``.

    Args:
        arguments: keywords of `app.create_app`, of which ``limits``, ``batch`` and ``backend`` are tables; ``model`` must
            be there.

    Raises:
        ValueError: no model is named, or a table doesn't fit.
    """
    if "model" not in arguments:
        raise ValueError("no model is named; give args: {model: /data/runs/NAME/export}")
    given = dict(arguments)
    for name in _GROUPS.keys() & given.keys():
        try:
            given[name] = TypeAdapter(_GROUPS[name]).validate_python(given[name])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (name, *first["loc"])))
            raise ValueError(f"{place} is wrong: {first['msg'].lower()}") from error
    return _deployment(given.get("library_loaded", 4)).bind(**given)


def _deployment(library_loaded: int) -> Any:
    # More may be ongoing than the application admits, so that it is the application that refuses, in its own words.
    @serve.deployment(name="FeatureService", max_ongoing_requests=320, graceful_shutdown_timeout_s=40)
    @serve.ingress()
    class FeatureService:
        """One replica: `ray_distill.serve.app.create_app`, built where it runs."""

        def __init__(self, **arguments: Any) -> None:
            self._arguments = arguments

        def __serve_build_asgi_app__(self) -> FastAPI:
            silence_decoders()
            app = create_app(**self._arguments)
            self._models = app.state.models
            self._models.load = self._load
            return app

        def check_health(self) -> None:
            """Ray Serve replaces a replica whose inference has stopped."""
            if not all(model.engine.alive for model in self._models):
                raise RuntimeError("a model takes no work")

        @serve.multiplexed(max_num_models_per_replica=library_loaded)  # type: ignore[untyped-decorator]
        async def _load(self, name: str) -> str:
            """Ray Serve notes what is loaded where, with the same rule of which goes first as `models.Models`.

            Requests whose header ``serve_multiplexed_model_id`` names it then come to replicas that have it. The ``model`` parameter
            chooses what is run, as without Ray.
            """
            await self._models.load_from_library(name)
            return name

    return FeatureService
