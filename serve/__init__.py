"""The feature service: a distilled student over HTTP. ``python -m serve --model FOLDER`` starts it."""

from serve.app import create_app

__all__ = ["create_app"]
