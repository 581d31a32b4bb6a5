"""Errors that a request is answered with: a status, and JSON in the shape that OpenAI's clients read.

    {"error": {"message": "...", "type": "invalid_request_error", "param": null, "code": "queue_full"}}

`type` is one of few, `code` says which refusal it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffpress.runtime.errors import DiffpressError, InvalidInputError

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
SERVER_ERROR = 500
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


class RequestError(DiffpressError):
    """A request that gets no images.

    Attributes:
        status: HTTP status.
        code: What happened, for programs.
        headers: Further headers of the response.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] = NO_HEADERS) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        default = "server_error" if self.status >= SERVER_ERROR else "invalid_request_error"
        kind = TYPES.get(self.status, default)
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


def request_error(error: Exception) -> RequestError:
    """Return what a request is answered with if its handling raised this; no message of an unexpected error leaves."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InvalidInputError):
        return RequestError(400, "invalid_value", str(error))
    return RequestError(SERVER_ERROR, "internal_error", "internal error; the server's log has the reason")


def after(seconds: int) -> dict[str, str]:
    """Return the header that asks a client to come back after `seconds`."""
    return {"retry-after": str(seconds)}
