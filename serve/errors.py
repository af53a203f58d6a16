"""What the service answers when it can't give features: one JSON shape, one status for each reason."""

from typing import Literal, get_args

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

Reason = Literal[
    "empty",
    "bad_multipart",
    "bad_request",
    "not_found",
    "method_not_allowed",
    "too_large",
    "too_long",
    "undecodable",
    "too_short",
    "bad_layer",
    "bad_parameter",
    "internal",
]

STATUS: dict[Reason, int] = {
    "empty": 400,
    "bad_multipart": 400,
    "bad_request": 400,
    "not_found": 404,
    "method_not_allowed": 405,
    "too_large": 413,
    "too_long": 413,
    "undecodable": 422,
    "too_short": 422,
    "bad_layer": 422,
    "bad_parameter": 422,
    "internal": 500,
}
"""HTTP status of each reason."""

assert set(STATUS) == set(get_args(Reason))


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    reason: Reason = Field(description="A word for programs; each reason always comes with the same status.")
    message: str = Field(description="One sentence for people.")


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ServiceError(Exception):
    """A request the service refuses; becomes an ``ErrorResponse`` with the status of its reason."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The answer to send."""
        body = ErrorResponse(error=ErrorDetail(reason=self.reason, message=self.message))
        return JSONResponse(body.model_dump(), STATUS[self.reason], headers)
