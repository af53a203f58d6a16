"""The page at ``/``, which plays audio files, and shows and compares their features in a browser.

It consists of static files, without a build step and without external resources. Like any client, it gets features from
``/v1/features``.
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
    ".flac": "audio/flac",  # The samples: one sentence in two voices of espeak-ng.
}
_HEADERS = {
    # Only files of this service, no inline scripts or styles, no markup made from strings, and no embedding in frames.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Browsers see a new release at once; an unchanged file is answered with 304.
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add ``/`` and the files under ``/page/`` that it uses. They can be read without an API key."""
    contents = {
        path.name: (path.read_bytes(), _MEDIA_TYPES[path.suffix])
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _MEDIA_TYPES
    }

    def respond(name: str, request: Request) -> Response:
        content, media_type = contents[name]
        headers = _HEADERS | {"etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return respond("index.html", request)

    @app.head("/page/{name}", include_in_schema=False)
    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str, request: Request) -> Response:
        if name not in contents:
            raise ServiceError("not_found", f"The page has no file {name[:80]!r}; the page is at /.")
        return respond(name, request)
