"""The reference of the interface at ``/docs``: Swagger UI, whose files come from the service, so that it needs no network.

Swagger UI has the license Apache-2.0; see the text files of this folder, which are served too.
"""

from pathlib import Path

from fastapi import FastAPI, Response

from ray_distill.serve.api.errors import ServiceError

_FOLDER = Path(__file__).parent
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
_HEADERS = {
    # Swagger UI sets styles in attributes, and has its icons in data URLs.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def add_reference(app: FastAPI) -> None:
    """Add ``/docs`` and the files under ``/docs/`` that it uses. They can be read without an API key."""
    responses: dict[str, tuple[bytes, dict[str, str]]] = {}
    for path in sorted(_FOLDER.iterdir()):
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        if plain.suffix in _MEDIA_TYPES:
            headers = _HEADERS | {"content-type": f"{_MEDIA_TYPES[plain.suffix]}; charset=utf-8"}
            if path.suffix == ".gz":
                headers |= {"content-encoding": "gzip", "cache-control": "max-age=86400"}
            responses[plain.name] = path.read_bytes(), headers

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        content, headers = responses["index.html"]
        return Response(content, headers=headers)

    @app.head("/docs/{name}", include_in_schema=False)
    @app.get("/docs/{name}", include_in_schema=False)
    async def reference_file(name: str) -> Response:
        if name not in responses:
            raise ServiceError("not_found", f"The reference has no file {name[:80]!r}; it is at /docs.")
        content, headers = responses[name]
        return Response(content, headers=headers)
