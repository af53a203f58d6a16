"""Read the audio of one request, raw, multipart or base64 in JSON, never holding more than the limit."""

import base64
import binascii
import json
from typing import Any

import anyio
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from ray_distill.serve.api.admission import Held
from ray_distill.serve.api.errors import ServiceError

MAX_FILES = 64
_MOST_MARKS = 1000
_OTHER_TYPES = ("", "application/octet-stream", "application/ogg", "application/x-www-form-urlencoded")


def media_type_of(request: Request) -> str:
    """Of the Content-Type, in small letters; empty where there is none."""
    return str(request.headers.get("content-type", "")).partition(";")[0].strip().lower()


def is_json(request: Request) -> bool:
    """Whether the body may hold parameters."""
    return media_type_of(request) == "application/json"


async def read_body(request: Request, max_bytes: int, held: Held) -> tuple[list[bytes], dict[str, Any], bool]:
    """The audio files of a request, in order.

    ``multipart/form-data`` holds one or more files in fields named ``file``; ``application/json`` holds base64 in ``input``,
    a string or a list of strings, beside parameters; the body of an audio or video type, of application/octet-stream or of
    what curl's --data-binary says is the file itself. The limit counts the whole body as it arrives, so it also holds for
    chunked bodies and false lengths.

    Args:
        request: whose body nobody has read yet.
        max_bytes: largest body accepted, framing included.
        held: what the request holds; grows as the body arrives.

    Returns:
        The files, the JSON body's other members, and whether the client sent a list (JSON) or several files.

    Raises:
        ServiceError: ``length_required``, ``too_large``, ``overloaded``, ``unsupported_media_type``, ``empty`` or ``bad_body``.
    """
    too_large = ServiceError("too_large", f"The request body is larger than the limit of {max_bytes} bytes.")
    declared = request.headers.get("content-length")
    if declared is None and "transfer-encoding" not in request.headers:
        raise ServiceError("length_required", "Send a Content-Length, or the body chunked.")
    if declared and declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        count = len(message.get("body", b""))
        received += count
        if received > max_bytes:
            raise too_large
        held.take(count)
        return message

    limited = Request(request.scope, receive)
    media_type = media_type_of(request)
    members: dict[str, Any] = {}
    many = False
    if media_type == "multipart/form-data":
        files = await _read_multipart(limited)
        many = len(files) > 1
    elif media_type == "application/json":
        files, members, many = await anyio.to_thread.run_sync(_read_json, await limited.body())
    elif media_type in _OTHER_TYPES or media_type.startswith(("audio/", "video/")):
        files = [await limited.body()]
    else:
        raise ServiceError(
            "unsupported_media_type",
            "Send audio/*, application/octet-stream, multipart/form-data or application/json.",
        )
    if not all(files):
        raise ServiceError("empty", "The request holds no audio: send the bytes of an audio file.")
    return files, members, many


async def _read_multipart(request: Request) -> list[bytes]:
    message = (
        f"A multipart/form-data body must be well formed and hold 1 to {MAX_FILES} files, all in fields named 'file'."
    )
    try:
        async with request.form(max_files=MAX_FILES, max_fields=0) as form:
            parts = form.multi_items()
            if parts and all(name == "file" and isinstance(part, UploadFile) for name, part in parts):
                return [await part.read() for _, part in parts if isinstance(part, UploadFile)]
    except (HTTPException, UnicodeError) as error:  # UnicodeError: of a charset that can't be read.
        raise ServiceError("bad_body", message) from error
    raise ServiceError("bad_body", message)


def _read_json(body: bytes) -> tuple[list[bytes], dict[str, Any], bool]:
    if not body:
        raise ServiceError("empty", "The request holds no audio: put the base64 of an audio file into 'input'.")
    # Base64 has none of these. Lists in lists, or a million members, would take many times the body's bytes of memory.
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MOST_MARKS:
        raise ServiceError("bad_body", f"A JSON body may hold at most {_MOST_MARKS} commas and brackets.")
    message = (
        f"A JSON body must be an object whose 'input' is the base64 of an audio file, or a list of 1 to {MAX_FILES}."
    )
    try:
        members = json.loads(body)
        given = members.pop("input")
        many = isinstance(given, list)
        texts = given if many else [given]
        if not 1 <= len(texts) <= MAX_FILES:
            raise ServiceError("bad_body", message)
        return [base64.b64decode(text.encode("ascii"), validate=True) for text in texts], members, many
    # RecursionError: json's answer to a body of brackets.
    except (ValueError, AttributeError, TypeError, KeyError, binascii.Error, RecursionError) as error:
        raise ServiceError("bad_body", message) from error
