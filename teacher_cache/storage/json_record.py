"""Small JSON records that contain their own SHA-256, so that any change of a byte is noticed."""

import hashlib
import json
from typing import Any

SEAL = "seal"
"""Key of a record's SHA-256."""
MAX_RECORD_BYTES = 16 << 20
"""Maximum size of a record that is read. A record of a thousand mask policies has less than a megabyte."""


def encode_record(record: dict[str, Any]) -> bytes:
    """Encode a record as canonical JSON (sorted keys, indent 2, final newline) with its SHA-256 under the key ``seal``."""
    assert SEAL not in record
    return _canonical(record | {SEAL: hashlib.sha256(_canonical(record)).hexdigest()})


def decode_record(data: bytes) -> dict[str, Any]:
    """Decode the bytes of `encode_record`.

    Raises:
        ValueError: If any byte was changed.
    """
    try:
        record = json.loads(data)
        checksum = record.pop(SEAL)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not a JSON record with a checksum ({type(error).__name__})") from error
    if encode_record(record) != data or checksum != hashlib.sha256(_canonical(record)).hexdigest():
        raise ValueError("its checksum does not match its content")
    checked: dict[str, Any] = record
    return checked


def _canonical(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, sort_keys=True, indent=2) + "\n").encode()
