"""Small JSON records that know when they were altered: canonical text with the SHA-256 of the rest inside."""

import hashlib
import json
from typing import Any


def sealed(record: dict[str, Any]) -> bytes:
    """The record as canonical JSON (sorted keys, indent 2, final newline) with a ``seal`` of its other keys."""
    assert "seal" not in record
    return _text(record | {"seal": hashlib.sha256(_text(record)).hexdigest()})


def unsealed(data: bytes) -> dict[str, Any]:
    """What was sealed. ValueError where any byte is not as `sealed` wrote it."""
    try:
        record = json.loads(data)
        seal = record.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"it is no sealed record ({type(error).__name__})") from error
    if sealed(record) != data or seal != hashlib.sha256(_text(record)).hexdigest():
        raise ValueError("its seal does not match its content")
    checked: dict[str, Any] = record
    return checked


def _text(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, sort_keys=True, indent=2) + "\n").encode()
