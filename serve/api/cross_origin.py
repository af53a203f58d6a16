"""Requests of pages from other origins (CORS), whose refusals have the form of all errors."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ray_distill.serve.api.errors import ServiceError


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's middleware; a refused preflight request gets `ErrorResponse` instead of plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the response to a preflight request."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        reason = bytes(response.body).decode().removeprefix("Disallowed CORS ")
        reason = f"one of its {reason}" if reason == "headers" else f"its {reason}"
        message = f"The service does not allow this request from other origins: {reason} is not allowed."
        return ServiceError("bad_request", message, kept).response()
