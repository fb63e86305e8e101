"""The one error that a client sees, as OpenAI's API writes it."""

from __future__ import annotations

from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered: HTTP status, message, the field that it is about, a word for programs.

    retry_after_s: when to ask again, where that may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Those that say more."""
        wait = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return wait | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
