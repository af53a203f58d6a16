"""Errors of the service: one JSON shape, and one HTTP status for each type of error."""

from typing import Literal, get_args

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

ErrorType = Literal[
    "empty",
    "undecodable",
    "bad_body",
    "bad_request",
    "unauthorized",
    "not_found",
    "model_not_found",
    "method_not_allowed",
    "length_required",
    "too_large",
    "too_long",
    "unsupported_media_type",
    "too_short",
    "bad_layer",
    "bad_parameter",
    "overloaded",
    "rate_limited",
    "client_disconnected",
    "internal",
    "not_ready",
    "deadline",
]

STATUS: dict[ErrorType, int] = {
    "empty": 400,
    "undecodable": 400,
    "bad_body": 400,
    "bad_request": 400,
    "unauthorized": 401,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "length_required": 411,
    "too_large": 413,
    "too_long": 413,
    "unsupported_media_type": 415,
    "too_short": 422,
    "bad_layer": 422,
    "bad_parameter": 422,
    "overloaded": 429,
    "rate_limited": 429,
    "client_disconnected": 499,
    "internal": 500,
    "not_ready": 503,
    "deadline": 504,
}
"""HTTP status of each type of error."""

assert set(STATUS) == set(get_args(ErrorType))


class ErrorResponse(BaseModel):
    """The body of every error response."""

    error: str = Field(description="What is wrong, in one sentence.")
    error_type: ErrorType = Field(description="Type of the error, for programs; each type has a fixed status.")


class ServiceError(Exception):
    """A request that the service refuses; it becomes an ``ErrorResponse`` with the status of its type.

    Args:
        error_type: Key of ``STATUS``.
        message: One sentence that the client may see.
        headers: Headers of the response, such as Retry-After. Default: none.
    """

    def __init__(self, error_type: ErrorType, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.error_type: ErrorType = error_type
        self.message = message
        self.headers = headers or {}

    def response(self) -> JSONResponse:
        """Return the response to send."""
        body = ErrorResponse(error=self.message, error_type=self.error_type)
        return JSONResponse(body.model_dump(), STATUS[self.error_type], self.headers)
