"""The same application as a Ray Serve deployment, for clusters: ``serve run serve.deployment:build model=/data/runs/demo/export``."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from serve.app import create_app


@serve.deployment(name="FeatureService", max_ongoing_requests=64, max_queued_requests=256)
@serve.ingress()
class FeatureService:
    """One replica: `serve.app.create_app` with these arguments, built where it runs."""

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(**self._arguments)


def build(arguments: dict[str, Any]) -> Application:
    """The application for ``serve run`` and for a RayService's ``import_path``.

    Args:
        arguments: keywords of `serve.app.create_app`; ``model`` must be there.

    Raises:
        ValueError: no model is named.
    """
    if "model" not in arguments:
        raise ValueError("no model is named; give args: {model: /data/runs/NAME/export}")
    return FeatureService.bind(**arguments)  # type: ignore[attr-defined]
