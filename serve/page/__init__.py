"""The page at ``/``: hear, see and compare the features of audio files in a browser.

Static files without a build step and without anything from elsewhere; their numbers come from ``/v1/features``, which the page
asks as any client does.
"""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

from ray_distill.serve.api.errors import ServiceError

_FOLDER = Path(__file__).parent
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing but this service's own files, no inline script or style, no strings made into markup, in nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # A new release is seen at once; an unchanged file costs a 304.
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Adds ``/`` and the files it names under ``/page/``; anyone may read them, with or without an API key."""
    answers = {
        path.name: (path.read_bytes(), _MEDIA_TYPES[path.suffix])
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _MEDIA_TYPES
    }

    def answer(name: str, request: Request) -> Response:
        content, media_type = answers[name]
        headers = _HEADERS | {"etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer("index.html", request)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str, request: Request) -> Response:
        if name not in answers:
            raise ServiceError("not_found", f"There is no {name[:80]!r} in the page; it begins at /.")
        return answer(name, request)
