"""Read the audio bytes of one request, raw or multipart, never holding more than the limit."""

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from serve.errors import ServiceError


async def read_audio_bytes(request: Request, max_bytes: int) -> bytes:
    """The bytes of the audio file in a request.

    A ``multipart/form-data`` body must hold one file, in the field ``file``; a body of any other content type is the
    file itself. The limit counts the whole body as it arrives, so it also holds for chunked bodies and false lengths.

    Args:
        request: whose body nobody has read yet.
        max_bytes: largest body accepted, form framing included.

    Raises:
        ServiceError: ``too_large``, ``empty`` or ``bad_multipart``.
    """
    too_large = ServiceError("too_large", f"The request body is larger than the limit of {max_bytes} bytes.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise too_large
        return message

    limited = Request(request.scope, receive)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    audio = await (_read_multipart(limited) if media_type == "multipart/form-data" else limited.body())
    if not audio:
        raise ServiceError("empty", "The request holds no audio: send the bytes of an audio file.")
    return audio


async def _read_multipart(request: Request) -> bytes:
    try:
        async with request.form(max_files=1, max_fields=0) as form:
            file = form.get("file")
            if isinstance(file, UploadFile):
                return await file.read()
    except HTTPException as error:
        raise ServiceError("bad_multipart", _ONE_FILE) from error
    raise ServiceError("bad_multipart", _ONE_FILE)


_ONE_FILE = "A multipart/form-data body must be well formed and hold exactly one file, in the field 'file'."
