"""Read the audio of one request, raw, multipart or base64 in JSON, and never more than the limit."""

import base64
import binascii
import re
from typing import Any

import anyio
import orjson
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Message

from ray_distill.serve.api.admission import HeldBytes
from ray_distill.serve.api.errors import ServiceError

MAX_FILES = 64
_MAX_DELIMITERS = 1000
_DATA_URL = re.compile(r"\A\s*data:[^,]{0,100};base64,", re.IGNORECASE)
_MEMBER = re.compile(rb'"([^"\\]*)"\s*:')  # In valid JSON; a name with a backslash is not found.
_OTHER_TYPES = ("", "application/octet-stream", "application/ogg", "application/x-www-form-urlencoded")


def media_type_of(request: Request) -> str:
    """Return the media type of the Content-Type header in lower case; empty if the header is missing."""
    return str(request.headers.get("content-type", "")).partition(";")[0].strip().lower()


def is_json(request: Request) -> bool:
    """Return whether the body is JSON, which may hold parameters."""
    return media_type_of(request) == "application/json"


async def read_body(request: Request, max_bytes: int, held: HeldBytes) -> tuple[list[bytes], dict[str, Any], bool]:
    """Read the audio files of a request, in order.

    ``multipart/form-data`` holds one or more files in fields named ``file``. ``application/json`` holds base64 in ``input``, a string
    or a list of strings, beside parameters; it may have line breaks or the prefix of a data URL. For audio and video types,
    application/octet-stream and the type that curl's --data-binary sends, the body is the file itself. The limit counts the body as
    it arrives, so it also holds for chunked bodies and wrong lengths.

    Args:
        request: Request whose body has not been read yet.
        max_bytes: Largest body accepted, multipart and JSON syntax included.
        held: Memory that the request holds; it grows as the body arrives.

    Returns:
        The files, the other members of a JSON body, and whether the client sent a list (JSON) or several files.

    Raises:
        ServiceError: ``length_required``, ``too_large``, ``overloaded``, ``unsupported_media_type``, ``empty`` or ``bad_body``.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = "The body must not be compressed: send it without a Content-Encoding header."
        raise ServiceError("unsupported_media_type", message, {"accept-encoding": "identity"})
    too_large = ServiceError("too_large", f"The request body is larger than the limit of {max_bytes} bytes.")
    declared = request.headers.get("content-length")
    if declared is None and "transfer-encoding" not in request.headers:
        raise ServiceError("length_required", "Send a Content-Length header, or use chunked transfer encoding.")
    if declared and declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    received = 0
    media_type = media_type_of(request)
    # A form is there twice: as the parser's parts, and as the files that are read from them.
    copies = 2 if media_type == "multipart/form-data" else 1

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        count = len(message.get("body", b""))
        received += count
        if received > max_bytes:
            raise too_large
        held.acquire(copies * count)
        return message

    limited = Request(request.scope, receive)
    members: dict[str, Any] = {}
    is_list = False
    if media_type == "multipart/form-data":
        files = await _read_multipart(limited)
        held.release(received)
        is_list = len(files) > 1
    elif media_type == "application/json":
        files, members, is_list = await anyio.to_thread.run_sync(_read_json, await limited.body())
    elif media_type in _OTHER_TYPES or media_type.startswith(("audio/", "video/")):
        files = [await limited.body()]
    else:
        raise ServiceError(
            "unsupported_media_type",
            "Send the audio as audio/*, application/octet-stream, multipart/form-data or application/json.",
        )
    if not all(files):
        which = "no audio" if len(files) == 1 else "an empty file"
        raise ServiceError("empty", f"The request contains {which}: send the bytes of an audio file.")
    return files, members, is_list


class _InMemoryParser(MultiPartParser):
    """Parser that writes nothing to the disk, since the body is within the limits of memory."""

    spool_max_size = 2**62


async def _read_multipart(request: Request) -> list[bytes]:
    message = (
        f"A multipart/form-data body must be valid and contain 1 to {MAX_FILES} files, all in fields named 'file'."
    )
    try:
        parser = _InMemoryParser(request.headers, request.stream(), max_files=MAX_FILES, max_fields=MAX_FILES)
        form = await parser.parse()
    # KeyError: there is no boundary. UnicodeError: the charset is unknown or wrong.
    except (MultiPartException, KeyError, UnicodeError, LookupError) as error:
        raise ServiceError("bad_body", message) from error
    parts = form.multi_items()
    if not parts:
        raise ServiceError("bad_body", message)
    for name, part in parts:
        field = f"The field {name[:40]!r} of the form"
        if name != "file" and isinstance(part, UploadFile):
            raise ServiceError("bad_body", f"{field} has a file: name the field of each file 'file'.")
        if name != "file":
            raise ServiceError("bad_body", f"{field} is no file: parameters go into the query string, as in ?layer=2.")
        if not isinstance(part, UploadFile):
            raise ServiceError("bad_body", f"{field} has text and no file: with curl, write -F file=@speech.flac.")
    return [await part.read() for _, part in parts if isinstance(part, UploadFile)]


def _read_json(body: bytes) -> tuple[list[bytes], dict[str, Any], bool]:
    if not body:
        raise ServiceError("empty", "The request contains no audio: put the base64 of an audio file into 'input'.")
    # Base64 has none of these characters. Nested lists or a million members would need many times the memory of the body.
    if sum(body.count(delimiter) for delimiter in (b",", b"[", b"{")) > _MAX_DELIMITERS:
        raise ServiceError(
            "bad_body", f"A JSON body may contain at most {_MAX_DELIMITERS} commas and opening brackets."
        )
    message = f"A JSON body must be an object whose 'input' is the base64 of an audio file, or a list of 1 to {MAX_FILES} of them."
    try:
        # Unlike json, it refuses halves of surrogate pairs, which no other library accepts.
        members = orjson.loads(body)
        names = [found[1] for found in _MEMBER.finditer(body)]
        if repeated := [name for name in members if names.count(name.encode()) > 1]:
            raise ServiceError(
                "bad_body", f"The JSON body has the member {repeated[0][:40]!r} several times; give it once."
            )
        audio = members.pop("input")
        is_list = isinstance(audio, list)
        texts = audio if is_list else [audio]
        if not 1 <= len(texts) <= MAX_FILES:
            raise ServiceError("bad_body", message)
        return [_decode_base64(text) for text in texts], members, is_list
    except (ValueError, AttributeError, TypeError, KeyError, binascii.Error) as error:
        raise ServiceError("bad_body", message) from error


def _decode_base64(text: str) -> bytes:
    """Decode base64 that may have white space, as the command base64 writes it, or the prefix of a data URL."""
    plain = _DATA_URL.sub("", text, count=1)
    return base64.b64decode(b"".join(plain.encode("ascii").split()), validate=True)
