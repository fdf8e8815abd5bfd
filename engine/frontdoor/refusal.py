"""Every answer that is not an image: HTTP status, and the error body that clients of the OpenAI API know how to read."""

from __future__ import annotations

import math
from typing import Any

from aiohttp import web

from traces.problems import InputError

STATUS_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "invalid_request_error",
    405: "invalid_request_error", 408: "timeout_error", 411: "invalid_request_error", 413: "invalid_request_error",
    415: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error", 499: "client_closed_request",
    500: "server_error", 503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip
"""The ``type`` of each status, after https://platform.openai.com/docs/guides/error-codes."""


class RequestRefusedError(Exception):
    """Ends the handling of a request with an error body.

    Args:
        status: HTTP status; 499 means that the client has gone, and nobody reads it.
        code: Short name of the cause, stable, for programs and metrics.
        message: What is wrong, the value seen, what is allowed, what to do.
        param: The field at fault, as ``loras[0].id``.
        retry_after_s: When it is worth trying again.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = STATUS_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds, at least 1, where a second attempt is worth it; ``WWW-Authenticate`` with 401."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="diffplan"'
        return headers

    def response(self) -> web.Response:
        """The answer itself."""
        return web.json_response(self.body(), status=self.status, headers=self.headers())


def refusal_of(error: InputError, code: str = "invalid_value") -> RequestRefusedError:
    """400 with every problem of the input in one message; ``param`` is the field of the first one."""
    return RequestRefusedError(400, code, str(error), param=error.problems[0].where.removeprefix("request ") or None)
