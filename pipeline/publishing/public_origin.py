"""The record of a student's origin as it may be published: without the places of files on this machine."""

import re
from typing import Any

from ray_distill.student.exporters.origin import Origin

_PLACE = re.compile(r"(?:(?<![a-z0-9+.-])(?!hf://)[a-z][a-z0-9+.-]*://|(?<![\w:/])[/~]|(?<=[a-z]:)/(?!/))\S*")
"""A URI other than ``hf://``, or an absolute path, also after an option such as ``mean-mask:``."""


def public_origin(origin: Origin) -> Origin:
    """Return a copy of a record in which each absolute path and each URI is replaced by its last part."""
    return {key: _public(value) for key, value in origin.items()}


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str):
        return _PLACE.sub(lambda place: place[0].rstrip("/").rpartition("/")[2], value)
    return value
