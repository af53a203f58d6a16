"""The application as a Ray Serve deployment, for clusters.

``serve run ray_distill.serve.deployment:build model=/data/runs/demo/export`` starts it.
"""

import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from ray_distill.serve.app import create_app
from ray_distill.serve.decoding import silence_decoders
from ray_distill.serve.settings import ServeSettings, forget_service_link

_REFUSED = 64
"""Number of requests beyond ``max_requests`` that reach a replica at once, to be refused there."""


def build(arguments: dict[str, Any]) -> Application:
    """Build the application for ``serve run``, ``serve build`` and a RayService's ``import_path``.

    Args:
        arguments: Settings by name, or in the tables ``limits``, ``batch`` and ``backend``; see `ServeSettings`. ``model`` is
            required; ``host``, ``port`` and ``leave_seconds`` have no effect here, since Ray Serve listens.

    Raises:
        ValueError: the model is missing, or a setting is wrong.
    """
    forget_service_link(os.environ)
    settings = ServeSettings(**arguments)
    return _deployment(settings).bind(settings)


def _deployment(settings: ServeSettings) -> Any:
    # Ray Serve lets more requests through than the application admits, so that the application refuses them with its own errors.
    @serve.deployment(
        name="FeatureService",
        max_ongoing_requests=settings.max_requests + _REFUSED,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    @serve.ingress()
    class FeatureService:
        """One replica: an application made by `ray_distill.serve.app.create_app` in the replica's process."""

        def __init__(self, settings: ServeSettings) -> None:
            self._settings = settings

        def __serve_build_asgi_app__(self) -> FastAPI:
            silence_decoders()
            app = create_app(self._settings.model, self._settings, more=self._settings.more)
            self._models = app.state.models
            self._models.load = self._load
            return app

        def check_health(self) -> None:
            """Raise if inference has stopped, so that Ray Serve replaces the replica."""
            if not all(model.engine.alive for model in self._models):
                raise RuntimeError("Inference of a model has stopped or keeps failing.")

        @serve.multiplexed(max_num_models_per_replica=settings.library_loaded)  # type: ignore[untyped-decorator]
        async def _load(self, name: str) -> str:
            """Load a model of the library and let Ray Serve record where it is loaded.

            Ray Serve evicts models by the same rule as `Models`. It then routes requests whose header
            ``serve_multiplexed_model_id`` names the model to replicas that have loaded it. The ``model`` parameter selects the model
            that runs, as it does without Ray.
            """
            await self._models.load_from_library(name)
            return name

    return FeatureService
